"""OpenAI's API as pure functions: what is accepted, what is refused and how, and the exact shapes that go back."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import openai.types as openai_types
import openai.types.chat as openai_chat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import errors
from cluster.errors import LuthierError, Overloaded
from serving import scrape
from serving.answers import Answer, ChatAnswer, CompletionAnswer
from serving.calls import ChoiceEvent
from serving.engine.protocol import TokenEvent, TokenLogprob
from serving.protocol import (
    ChatRequest,
    CompletionRequest,
    InvalidRequest,
    choice_seed,
    describe,
    describe_status,
    parse,
)

USER = [{"role": "user", "content": "hello"}]


def chat(**given: Any) -> ChatRequest:
    return parse(json.dumps({"model": "m", "messages": USER, **given}).encode(), ChatRequest)


def completion(**given: Any) -> CompletionRequest:
    return parse(json.dumps({"model": "m", "prompt": "hello", **given}).encode(), CompletionRequest)


def test_every_supported_parameter_reaches_the_engine() -> None:
    params = chat(
        temperature=0.5, top_p=0.9, top_k=7, max_tokens=3, stop=["a", "b"], seed=5, logprobs=True, top_logprobs=2
    ).params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 7, 3)
    assert (params.stop, params.seed, params.logprobs) == (("a", "b"), 5, 2)
    params = chat(
        presence_penalty=-2,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        min_tokens=200,  # more than the default of completions: the limit of a chat is the context
        ignore_eos=True,
        logit_bias={"5": -100, "0": 1.5},
    ).params
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (-2, 0.5, 1.1)
    assert (params.min_tokens, params.ignore_eos, params.logit_bias) == (200, True, ((5, -100.0), (0, 1.5)))
    assert completion(logprobs=0).params.logprobs == 0
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(top_k=-1).params.top_k == 0


def form(kind: str, **json_schema: Any) -> dict[str, Any]:
    """A response_format, with a schema if one is given."""
    return {"response_format": {"type": kind, **({"json_schema": json_schema} if json_schema else {})}}


SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "null"}}}


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            "json_schema",
            json.dumps(SCHEMA),  # in its own order, which the answer follows
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": {}}}, "json_schema", "{}"),
        ({"structured_outputs": {"json_object": True, "regex": None}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex", "[a-z]+"),
        ({"structured_outputs": {"choice": ["yes", "é"]}}, "choice", '["yes", "\\u00e9"]'),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}, "response_format": {"type": "text"}},
            "lark",
            'start: "a"',
        ),
    ],
)
def test_what_the_answer_must_be_reaches_the_engine(given: dict[str, Any], kind: str, text: str) -> None:
    for request in (chat(**given), completion(**given)):
        grammar = request.params.grammar
        assert grammar is not None
        assert (grammar.kind, grammar.text, grammar.param) == (kind, text, next(iter(given)))


def test_the_limit_is_what_was_asked_or_openais_default() -> None:
    assert chat().limit is None
    assert chat(max_completion_tokens=9).limit == 9
    assert chat(max_tokens=9, max_completion_tokens=9).limit == 9
    assert completion().limit == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts_are_text_or_tokens_one_or_many(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


def test_messages_become_roles_and_text() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        # What OpenAI's client sends when an answer is put back into the conversation as it came.
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    assert chat(messages=messages).prompts == (
        (
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "c"},
        ),
    )


OFF = {
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "service_tier": "auto",
    "user": "somebody",
    "store": False,
}


@pytest.mark.parametrize(("name", "value"), OFF.items())
def test_parameters_that_are_off_are_welcome(name: str, value: Any) -> None:
    assert chat(**{name: value}).params == chat().params
    assert chat(**{name: None}) == chat()


@pytest.mark.parametrize("prompt", [[], [[]], [[5], []], ["a"] * 200])
def test_a_prompt_that_is_none_or_too_many_is_refused_by_name(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty", None),
        ({"frequency_penalty": -2.1}, "frequency_penalty", None),
        ({"frequency_penalty": False}, "frequency_penalty", None),
        ({"repetition_penalty": 0}, "repetition_penalty", None),
        ({"repetition_penalty": -1}, "repetition_penalty", None),
        ({"min_tokens": -1}, "min_tokens", None),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", None),
        ({"ignore_eos": 1}, "ignore_eos", None),
        ({"logit_bias": {"5": 101}}, "logit_bias", None),
        ({"logit_bias": {"5": "1"}}, "logit_bias", None),
        ({"logit_bias": {"-5": 1}}, "logit_bias", None),
        ({"logit_bias": {"05": 1}}, "logit_bias", None),
        ({"logit_bias": {"hello": 1}}, "logit_bias", None),
        ({"logit_bias": [5]}, "logit_bias", None),
        ({"response_format": "json"}, "response_format", None),
        (form("xml"), "response_format", None),
        (form("json_schema"), "response_format", None),
        (form("json_object", name="n", schema={}), "response_format", None),
        (form("json_schema", name="n"), "response_format", "missing_required_parameter"),
        (form("json_schema", name="n", schema=5), "response_format", None),
        ({**form("json_object"), "structured_outputs": {"regex": "a"}}, "structured_outputs", None),
        ({"structured_outputs": {}}, "structured_outputs", None),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", None),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", None),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", None),
        ({"guided_json": {}}, "guided_json", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"store": 0}, "store", "unsupported_parameter"),
        ({"temprature": 0}, "temprature", "unknown_parameter"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs", "unknown_parameter"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 5}, "model", None),
        ({"messages": []}, "messages", None),
        ({"messages": "hello"}, "messages", None),
        ({"temperature": 2.1}, "temperature", None),
        ({"temperature": -0.1}, "temperature", None),
        ({"temperature": "1"}, "temperature", None),
        ({"temperature": True}, "temperature", None),
        ({"top_p": 0}, "top_p", None),
        ({"top_p": 1.01}, "top_p", None),
        ({"top_k": -2}, "top_k", None),
        ({"n": 0}, "n", None),
        ({"n": 129}, "n", None),
        ({"n": 1.5}, "n", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", None),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", None),
        ({"stop": ""}, "stop", None),
        ({"stop": ["a", ""]}, "stop", None),
        ({"stop": 5}, "stop", None),
        ({"seed": "five"}, "seed", None),
        ({"stream": 1}, "stream", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
        ({"logprobs": 2}, "logprobs", None),
        ({"prompt": "hello"}, "prompt", "unknown_parameter"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages", None),
        ({"messages": [{"content": "no role"}]}, "messages", None),
        ({"messages": [{"role": "user"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", None),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(given: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**given).prompts, chat(**given).params  # messages and some ranges are checked here
    assert (caught.value.param, caught.value.code) == (param, code)
    assert param in str(caught.value)
    described = describe(caught.value)
    assert described.status == 400
    assert described.body["error"]["param"] == param


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"messages": USER}, "messages"),
    ],
)
def test_completions_refuse_by_name_too(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**given)
    assert caught.value.param == param or param in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'{"model": NaN}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',  # half a surrogate pair
        b"\xff",
        b'"text"',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(body, ChatRequest)


@given(
    st.binary() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(repr).map(str.encode)
)
def test_no_body_at_all_raises_anything_else(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(body, CompletionRequest)


@given(
    st.dictionaries(
        st.sampled_from([*ChatRequest.model_fields, *OFF, "unheard_of"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
    )
)
def test_any_json_object_is_a_request_or_a_400(given: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequest):
        request = parse(json.dumps({"model": "m", "messages": USER, **given}).encode(), ChatRequest)
        assert request.params.temperature >= 0
        assert all(message["role"] for prompt in request.prompts for message in prompt)


def test_a_choices_seed_is_its_own_and_the_first_is_the_requests() -> None:
    assert choice_seed(None, 3) is None
    assert choice_seed(7, 0) == 7
    seeds = [choice_seed(seed, index) for seed in range(10) for index in range(10)]
    assert len(set(seeds)) == 100


def _all_errors() -> list[type[LuthierError]]:
    return [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, LuthierError) and kind is not errors.ConfigError
    ]


@pytest.mark.parametrize("kind", _all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_has_openais_shape(kind: type[LuthierError]) -> None:
    described = describe(kind("what is wrong"))
    assert 400 <= described.status < 600
    error = described.body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] == "what is wrong"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.UnknownModel("m"), 404, "model_not_found"),
        (errors.AdapterNotFound("m"), 404, "model_not_found"),
        (errors.RequestError("m"), 400, None),
        (errors.AdapterRefused("m"), 422, "adapter_refused"),
        (errors.ObjectDamaged("m"), 500, "adapter_damaged"),
        (errors.ObjectNotFound("m"), 500, "adapter_damaged"),
        (errors.StoreUnreachable("m"), 503, "store_unavailable"),
        (Overloaded("m", 7), 429, "overloaded"),
        (errors.NotServing("m", 7), 503, "not_serving"),
    ],
)
def test_errors_have_their_codes(error: LuthierError, status: int, code: str | None) -> None:
    described = describe(error)
    assert (described.status, described.code) == (status, code)


def test_full_says_when_to_come_back_and_a_bug_says_nothing_of_our_insides() -> None:
    assert describe(Overloaded("full", 7)).headers == {"retry-after": "7"}
    hidden = describe(KeyError("/home/secret"))
    assert hidden.status == 500
    assert "secret" not in json.dumps(hidden.body)


def test_unknown_routes_and_methods_have_the_shape() -> None:
    assert describe_status(404, "", "/v2").body["error"]["message"].startswith("no route /v2")
    assert describe_status(405, "", "/v1/models").status == 405


def event(text: str, finish: Any = None, token: int | None = 1, logprob: float | None = None) -> TokenEvent:
    chosen = TokenLogprob(1, text, logprob) if logprob is not None else None
    top = (TokenLogprob(1, text, logprob), TokenLogprob(2, "é", -3.0)) if logprob is not None else ()
    return TokenEvent(token, text, chosen, top, finish)


def make(kind: Callable[..., Answer], **given: Any) -> Answer:
    answer = kind(id="id-1", created=5, model="m", wants_logprobs=given.pop("wants_logprobs", False), **given)
    answer.usage.prompt_tokens = 4
    return answer


def test_a_whole_chat_answer_is_openais() -> None:
    events = [ChoiceEvent(1, event("b", "length")), ChoiceEvent(0, event("a")), ChoiceEvent(0, event("", "stop"))]
    whole = make(ChatAnswer).whole(events)
    parsed = openai_chat.ChatCompletion.model_validate(whole)
    assert [(each.index, each.message.content, each.finish_reason) for each in parsed.choices] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert whole["choices"][0]["logprobs"] is None


def test_a_chat_stream_is_openais() -> None:
    answer = make(ChatAnswer, includes_usage=True)
    chunks = [*answer.opening(0)]
    for batch in ([event("he")], [event("l"), event("lo")], [event("", "stop")]):
        chunks += answer.chunks([ChoiceEvent(0, each) for each in batch])
    chunks += answer.closing()
    parsed = [openai_chat.ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
    assert parsed[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in parsed[1:3]] == ["he", "llo"]
    assert chunks[3]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert "usage" not in next(make(ChatAnswer).opening(0))
    assert list(make(ChatAnswer).closing()) == []


def test_logprobs_have_both_of_openais_shapes() -> None:
    events = [ChoiceEvent(0, event("ab", None, 1, -0.5)), ChoiceEvent(0, event("\ufffd", "length", 1, -1.0))]
    content = make(ChatAnswer, wants_logprobs=True).whole(events)["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "ab",
        "logprob": -0.5,
        "bytes": [97, 98],
        "top_logprobs": [
            {"token": "ab", "logprob": -0.5, "bytes": [97, 98]},
            {"token": "é", "logprob": -3.0, "bytes": [195, 169]},
        ],
    }
    assert content[1]["bytes"] is None  # a part of a character

    whole = make(CompletionAnswer, wants_logprobs=True).whole(events)
    openai_types.Completion.model_validate(whole)
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["ab", "\ufffd"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"ab": -0.5, "é": -3.0}, {"\ufffd": -1.0, "é": -3.0}],
        "text_offset": [0, 2],
    }


def test_a_completion_stream_is_openais() -> None:
    answer = make(CompletionAnswer, wants_logprobs=True)
    chunks = [*answer.opening(0)]
    for each in (event("ab", None, 1, -0.5), event("c", "length", 1, -0.6)):
        chunks += answer.chunks([ChoiceEvent(0, each)])
    for chunk in chunks:
        openai_types.Completion.model_validate({**chunk, "choices": []})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["ab", "c", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:2]] == [[0], [2]]


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_an_answer_that_broke_off_is_never_passed_off_as_whole(reason: Any) -> None:
    events = [ChoiceEvent(0, event("a")), ChoiceEvent(0, TokenEvent(None, "", finish_reason=reason, error="no memory"))]
    with pytest.raises(LuthierError, match="no memory"):
        make(ChatAnswer).whole(events)
    with pytest.raises(LuthierError, match="ended early"):
        list(make(ChatAnswer).chunks(events))


def test_metrics_of_two_nodes_become_one_text() -> None:
    export = (
        '# HELP ray_tasks Ray\'s own\n# TYPE ray_tasks gauge\nray_tasks{a="1"} 5\n'
        "# HELP ray_luthier_requests_total Requests\n# TYPE ray_luthier_requests_total counter\n"
        'ray_luthier_requests_total{code="200",otel_scope_name="x",node="NODE"} 3.0\n'
        "# TYPE ray_luthier_kv_blocks gauge\nray_luthier_kv_blocks 7\n"
    )
    assert scrape.merge([export.replace("NODE", node) for node in "ab"]) == (
        "# HELP luthier_requests_total Requests\n# TYPE luthier_requests_total counter\n"
        'luthier_requests_total{code="200",node="a"} 3.0\n'
        'luthier_requests_total{code="200",node="b"} 3.0\n'
        "# TYPE luthier_kv_blocks gauge\nluthier_kv_blocks 7\nluthier_kv_blocks 7\n"
    )
