"""The whole serving side over real HTTP: real Ray, real Serve, the native engine, OpenAI's own client."""

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from cluster import registry
from cluster.models import ModelConfig
from cluster.records import Artefact, BaseModelRef
from serving import deploy
from serving.calls import ReplicaStatus
from serving.config import ReplicaConfig
from serving.protocol import choice_seed
from tests.serving.conftest import NEAR_TIE, LoraRecipe, TinyModel, make_tokenizer
from tests.serving.endpoint import APPLICATION, BASE, DEADLINE_S, NAMES, Served, deployed, poll, serving_config


@pytest.fixture(scope="module")
def served(
    local_ray: None, tiny: Callable[[str], TinyModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One replica."""
    with deployed(tiny("qwen3"), tmp_path_factory.mktemp("serving")) as served:
        yield served


USER: list[Any] = [{"role": "user", "content": "Sort the numbers 3 1 2."}]
LONG = 400  # tokens; the context is 512, so that a stream of this length can be left in its middle


def post(served: Served, path: str, body: Any, **kwargs: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{served.url}{path}", content=content, timeout=60, **kwargs)


def chat_body(**given: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": USER, "max_tokens": 8, "temperature": 0, **given}


def chat_tokens(text: str) -> list[int]:
    tokenizer = make_tokenizer()
    return list(tokenizer(f"<|user|>{text}<|end|><|assistant|>", add_special_tokens=False)["input_ids"])


def expected_text(served: Served, name: str, prompt: list[int], max_tokens: int) -> str:
    """What peft and `generate` answer greedily; the caller's prompts must not lie on a tie."""
    return text_of(served, served.recipes.get(name), prompt, max_tokens)


def text_of(served: Served, recipe: LoraRecipe | None, prompt: list[int], max_tokens: int) -> str:
    """The same by an adapter's recipe; None is the base."""
    expected = served.model.expected(recipe, prompt, max_tokens)
    assert min(expected.margins) > NEAR_TIE, f"{recipe}: this prompt lies on a near tie, choose another"
    return str(make_tokenizer().decode(expected.tokens, skip_special_tokens=True))


def test_the_base_answers_and_says_so(served: Served) -> None:
    raw = served.client().chat.completions.with_raw_response.create(
        model=BASE, messages=USER, max_tokens=8, temperature=0
    )
    answer = raw.parse()
    prompt = chat_tokens(USER[0]["content"])
    assert answer.choices[0].message.content == expected_text(served, BASE, prompt, 8)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 8)
    assert answer.usage.total_tokens == len(prompt) + 8
    assert answer.model == BASE
    assert raw.headers["x-luthier-adapter"] == BASE
    assert raw.headers["x-luthier-digest"] == served.base.revision


@pytest.mark.parametrize(
    "reference", ["skill-3", "skill-3@1", "skill-3@stable", f"{BASE}:skill-3", f"{BASE}:skill-3@1"]
)
def test_an_adapter_answers_to_every_form_of_its_name(served: Served, reference: str) -> None:
    raw = served.client().chat.completions.with_raw_response.create(
        model=reference, messages=USER, max_tokens=8, temperature=0
    )
    assert raw.parse().choices[0].message.content == expected_text(
        served, "skill-3", chat_tokens(USER[0]["content"]), 8
    )
    assert raw.headers["x-luthier-adapter"] == "skill-3@1"
    assert raw.headers["x-luthier-digest"] == registry.record(served.store, "skill-3", 1).digest


@pytest.mark.parametrize(
    "name", ["skill-99", "skill-3@9", "skill-3@01", "skill-3@canary", "other:skill-3", "Not A Name", "", "skill-3@"]
)
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_an_unknown_model_is_a_404_that_names_what_there_is(served: Served, name: str, path: str) -> None:
    body = {"model": name, "max_tokens": 2} | ({"messages": USER} if "chat" in path else {"prompt": "a"})
    refused = post(served, path, body)
    assert refused.status_code == 404
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert BASE in error["message"]
    for adapter in NAMES:
        assert adapter in error["message"]


def test_openais_client_raises_its_own_errors(served: Served) -> None:
    client = served.client()
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody' here"):
        client.chat.completions.create(model="nobody", messages=USER)
    with pytest.raises(openai.BadRequestError, match="store is not supported"):
        client.chat.completions.create(model=BASE, messages=USER, store=True)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_an_adapter_of_another_base_is_refused(served: Served) -> None:
    recipe = LoraRecipe(300)
    served.publish("foreign", recipe, BaseModelRef(name="other-base", revision="r9", licence="mit"))
    refused = post(served, "/chat/completions", chat_body(model="foreign@1"))
    assert refused.status_code == 404
    assert "belongs to base other-base at revision r9" in refused.json()["error"]["message"]
    assert "foreign" not in httpx.get(f"{served.url}/models").text


def test_an_adapter_that_its_licences_refuse_never_answers(served: Served) -> None:
    folder = served.model.adapter(LoraRecipe(301))
    base = Artefact(kind="base", name=BASE, licence="apache-2.0")
    chains = {"trained-on-nc": "cc-by-nc-4.0", "trained-on-llamas": "llama3.3"}
    for name, licence in chains.items():
        made = Artefact(kind="teacher" if "llama" in name else "data", name="lab/source", licence=licence)
        registry.publish(served.store, name, folder, served.base, "run-301", 301, artefacts=(base, made))
    for path, body in (("/chat/completions", chat_body()), ("/completions", {"prompt": "a", "max_tokens": 2})):
        for reference in ("trained-on-nc@1", f"{BASE}:trained-on-nc@1"):
            refused = post(served, path, {**body, "model": reference})
            assert refused.status_code == 403, refused.text
            error = refused.json()["error"]
            assert (error["code"], error["param"]) == ("licence_refused", "model")
            assert "lab/source is under CC-BY-NC-4.0" in error["message"]
    assert httpx.get(f"{served.url}/models/trained-on-nc@1").status_code == 403
    assert "trained-on-nc" not in httpx.get(f"{served.url}/models").text
    with pytest.raises(openai.PermissionDeniedError, match="does not allow commercial use"):
        served.client().chat.completions.create(model="trained-on-nc@1", messages=USER)
    shown = httpx.get(f"{served.url}/models/trained-on-llamas@1").json()
    assert (shown["built_with"], shown["display_name"]) == (["Built with Llama"], "llama-trained-on-llamas@1")
    assert shown["licences"] == ["Apache-2.0", "llama3.3"]
    assert post(served, "/chat/completions", chat_body(model="trained-on-llamas@1")).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat_body(temprature=1), "temprature"),
        (chat_body(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
        (chat_body(max_tokens=0), "max_tokens"),
        (b"{not json", None),
        (b"", None),
    ],
)
def test_a_bad_request_is_a_400_in_openais_shape(served: Served, body: Any, param: str | None) -> None:
    refused = post(served, "/chat/completions", body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_is_a_400_before_any_stream_begins(served: Served, stream: bool) -> None:
    refused = post(served, "/chat/completions", chat_body(max_tokens=512, stream=stream))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "512 tokens" in error["message"]


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/chat/completions", {"messages": [{"role": "user", "content": "w" * 20_000_000}]}),
        ("/completions", {"prompt": "word " * 400_000}),
    ],
)
def test_a_text_of_megabytes_is_refused_without_tokenising_it(served: Served, path: str, given: Any) -> None:
    """Within the 60 s of `post`: the tokenizer takes minutes for the first, and everybody would wait for it."""
    refused = post(served, path, {"model": BASE, "max_tokens": 2, **given})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "characters are more than that in any tokens" in error["message"]


def test_a_whole_answer_may_be_larger_than_a_message_of_grpc(served: Served) -> None:
    given: dict[str, Any] = {"model": BASE, "prompt": "a", "max_tokens": 100, "n": 100, "logprobs": 20}
    answer = served.client().completions.create(**given, extra_body={"ignore_eos": True})
    assert [len((choice.logprobs and choice.logprobs.tokens) or []) for choice in answer.choices] == [100] * 100


def test_a_token_that_the_model_has_not_is_a_400(served: Served) -> None:
    refused = post(served, "/completions", {"model": BASE, "prompt": [5, 99999], "max_tokens": 2})
    assert refused.status_code == 400
    assert "99999" in refused.json()["error"]["message"]


def test_unknown_routes_and_methods_are_in_openais_shape(served: Served) -> None:
    assert httpx.get(f"{served.url}/nothing").json()["error"]["message"].startswith("no route /v1/nothing")
    wrong = httpx.get(f"{served.url}/chat/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    assert "POST" in wrong.headers["allow"]


def test_models_lists_the_base_and_every_adapter(served: Served) -> None:
    client = served.client()
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert {BASE, *NAMES} <= set(listed)
    assert listed["skill-0"]["parent"] == BASE
    assert listed["skill-0"]["adapter"] == "skill-0@1"
    assert client.models.retrieve("skill-0@1").model_dump()["digest"] == listed["skill-0"]["digest"]


@pytest.mark.parametrize("name", [BASE, "skill-1"])
def test_a_stream_gives_what_the_whole_answer_gives(served: Served, name: str) -> None:
    client = served.client()
    given: dict[str, Any] = {"model": name, "messages": USER, "max_tokens": 24, "temperature": 1, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**given)
    texts, finish, usage, roles = ["", ""], ["", ""], None, []
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            texts[choice.index] += choice.delta.content or ""
            finish[choice.index] = choice.finish_reason or finish[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert finish == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert roles == ["assistant"] * 2


def test_the_bytes_of_a_stream_are_openais(served: Served) -> None:
    with httpx.stream("POST", f"{served.url}/chat/completions", json=chat_body(stream=True), timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-luthier-adapter"] == BASE
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_a_seed_repeats_and_choices_differ(served: Served) -> None:
    client = served.client()

    def sample(seed: int | None, n: int) -> list[str]:
        answer = client.completions.create(model=BASE, prompt="a", max_tokens=16, temperature=1, seed=seed, n=n)
        return [choice.text for choice in answer.choices]

    three = sample(11, 3)
    assert sample(11, 3) == three
    assert sample(11, 1) == three[:1]
    assert sample(choice_seed(11, 1), 1) == three[1:2]
    assert len(set(three)) == 3
    assert sample(12, 1) != three[:1]
    assert sample(None, 1) != sample(None, 1)


def test_several_prompts_are_numbered_prompt_by_prompt(served: Served) -> None:
    prompts = [served.model.prompt(seed, 6) for seed in (31, 32)]
    answer = served.client().completions.create(model=BASE, prompt=prompts, max_tokens=5, temperature=0, n=2)
    texts = [expected_text(served, BASE, prompt, 5) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (12, 20)


def test_stop_strings_end_the_text_and_stay_out(served: Served) -> None:
    client = served.client()
    given: dict[str, Any] = {"model": BASE, "prompt": "hello", "max_tokens": 40, "temperature": 1, "seed": 5}
    text = client.completions.create(**given).choices[0].text
    stop = next(text[at : at + 3] for at in range(10, len(text) - 3) if "\ufffd" not in text[at : at + 3])
    for stops in (stop, [stop, "never there"]):
        choice = client.completions.create(**given, stop=stops).choices[0]
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"


def test_an_answer_is_held_to_its_schema_and_what_cannot_be_held_to_is_a_400(served: Served) -> None:
    client = served.client()
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }

    def ask(schema: dict[str, Any], **given: Any) -> Any:
        form: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
        # 450 tokens hold the longest answer there is, all its whitespace included.
        return client.chat.completions.create(
            model="skill-1", messages=USER, max_tokens=450, seed=3, response_format=form, **given
        )

    answer = ask(schema, n=3, presence_penalty=0.5)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), schema)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(schema, presence_penalty=0.5, stream=True))
    assert streamed == answer.choices[0].message.content
    word = client.completions.create(
        model=BASE, prompt="a", max_tokens=16, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert word.choices[0].text in ("yes", "no")

    with pytest.raises(openai.BadRequestError, match="the grammar leaves no token"):
        client.completions.create(
            model=BASE, prompt="a", max_tokens=16, extra_body={"structured_outputs": {"regex": "a{1000000}"}}
        )

    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            ask({"type": "array", "uniqueItems": True}, stream=stream)
        assert caught.value.param == "response_format"
        with pytest.raises(openai.BadRequestError, match="vocabulary of 384") as caught:
            client.completions.create(model=BASE, prompt="a", logit_bias={"384": 1}, stream=stream)
        assert caught.value.param == "logit_bias"


def test_chat_logprobs(served: Served) -> None:
    answer = served.client().chat.completions.create(
        model=BASE, messages=USER, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for token in logprobs.content:
        assert [each.logprob for each in token.top_logprobs] == sorted(
            (each.logprob for each in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token  # greedy takes the best
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert len(token.top_logprobs) == 3


def test_completion_logprobs_and_their_absence(served: Served) -> None:
    client = served.client()
    given: dict[str, Any] = {"model": "skill-2", "prompt": "hello", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**given, logprobs=2).choices[0].logprobs
    assert whole is not None
    assert len(whole.tokens or []) == len(whole.token_logprobs or []) == len(whole.text_offset or []) == 6
    assert client.completions.create(**given).choices[0].logprobs is None
    streamed: list[float] = []
    for chunk in client.completions.create(**given, logprobs=2, stream=True):
        for choice in chunk.choices:
            streamed += choice.logprobs.token_logprobs or [] if choice.logprobs else []
    assert streamed == pytest.approx(whole.token_logprobs, abs=1e-5)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_everything(served: Served, stream: bool) -> None:
    """Nobody waits for the rest: the engine stops within steps, and its blocks and the adapter are free again."""
    poll(lambda: served.status().running == 0, "an idle engine")
    before = served.status()
    body = {"model": "skill-5", "prompt": [7] * 20, "max_tokens": LONG, "n": 4, "temperature": 1, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{served.url}/completions", json=body, timeout=60) as response:
            assert len(list(itertools.islice((line for line in response.iter_lines() if line), 3))) == 3
    else:

        async def leave() -> None:
            async with httpx.AsyncClient(timeout=60) as client:
                request = asyncio.create_task(client.post(f"{served.url}/completions", json=body))
                await asyncio.to_thread(poll, lambda: served.status().running == 4, "it runs")
                request.cancel()

        asyncio.run(leave())
    poll(lambda: served.status().cancelled == before.cancelled + 1, "the request is cancelled")
    poll(lambda: served.status().kv_blocks_used == 0, "all blocks are free")
    after = served.status()
    assert (after.running, after.waiting) == (0, 0)
    assert after.requests == before.requests + 4
    assert after.generated_tokens - before.generated_tokens < 4 * LONG
    assert post(served, "/completions", {**body, "stream": False, "max_tokens": 2}).status_code == 200


def test_32_at_once_over_8_adapters_and_the_base_answer_as_peft_does(served: Served) -> None:
    """Streaming and not, of different lengths: each answer is its own adapter's, and batches held several."""
    before = served.status()
    names = [*NAMES, BASE]
    jobs = [(names[number % 9], served.model.prompt(500 + number, 5 + number % 11), 24) for number in range(32)]

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        name, prompt, max_tokens = jobs[number]
        given: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        if number % 2:
            return (await client.completions.create(**given)).choices[0].text
        stream = await client.completions.create(**given, stream=True)
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def main() -> list[str]:
        async with served.async_client() as client:
            return await asyncio.gather(*(ask(client, number) for number in range(32)))

    answers = asyncio.run(main())
    tokenizer = make_tokenizer()
    clear = 0
    for (name, prompt, max_tokens), text in zip(jobs, answers, strict=True):
        expected = served.model.expected(served.recipes.get(name), prompt, max_tokens)
        if min(expected.margins) > NEAR_TIE:
            clear += 1
            assert text == tokenizer.decode(expected.tokens, skip_special_tokens=True), name
    assert clear >= 28, "too many of these prompts lie on near ties to say much"
    after = served.status()
    assert after.mixed_steps > before.mixed_steps
    assert after.max_adapters_in_step >= 3
    assert set(after.adapters) <= {f"{name}@1" for name in NAMES} | set(before.adapters)


def test_more_adapters_than_places_are_served_all_the_same(served: Served) -> None:
    """The engine has eight places; twelve adapters at once take turns."""
    recipes = {f"extra-{number}": LoraRecipe(400 + number) for number in range(12)}
    for name, recipe in recipes.items():
        served.publish(name, recipe)
    prompt = served.model.prompt(77, 9)

    async def main() -> list[str]:
        async with served.async_client() as client:
            given: dict[str, Any] = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
            answers = await asyncio.gather(
                *(client.completions.create(model=f"{name}@1", **given) for name in recipes for _ in range(2))
            )
            return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(main())
    expected = [served.model.expected(recipe, prompt, 8) for recipe in recipes.values() for _ in range(2)]
    tokenizer = make_tokenizer()
    clear = [(text, each) for text, each in zip(texts, expected, strict=True) if min(each.margins) > NEAR_TIE]
    assert len(clear) >= 20
    for text, each in clear:
        assert text == tokenizer.decode(each.tokens, skip_special_tokens=True)
    assert len(served.status().adapters) <= 8


def test_a_moved_alias_and_a_new_adapter_are_live_without_a_restart(served: Served) -> None:
    client = served.client()

    def weights(model: str) -> str | None:
        try:
            raw = client.completions.with_raw_response.create(model=model, prompt="a", max_tokens=1)
        except openai.NotFoundError:
            return None
        return raw.headers["x-luthier-adapter"]

    assert weights("moving") is None  # and that is remembered, for as long as an alias
    first = served.publish("moving", LoraRecipe(350))
    registry.set_alias(served.store, "moving", "stable", first, why="first")
    poll(lambda: weights("moving") == "moving@1", "a new name is live")
    second = served.publish("moving", LoraRecipe(351))
    assert weights("moving") == "moving@1", "publishing moves no alias"
    registry.set_alias(served.store, "moving", "stable", second, why="better")
    poll(lambda: weights("moving") == "moving@2", "a moved alias is live")
    registry.set_alias(served.store, "moving", "stable", first, why="rolled back")
    poll(lambda: weights("moving") == "moving@1", "a rollback is live")
    assert weights("moving@2") == "moving@2"
    registry.set_alias(served.store, "moving", "stable", None, why="withdrawn")
    poll(lambda: weights("moving") is None, "a withdrawn alias answers no more, nor does the base for it")


def test_a_release_and_its_way_back_under_traffic_make_no_error_and_no_mixture(served: Served) -> None:
    """50 requests a second; every answer is the one of the version that its header names."""
    recipes = {"released@1": LoraRecipe(300), "released@2": LoraRecipe(301, r=3)}
    first, second = (served.publish("released", recipe) for recipe in recipes.values())
    registry.set_alias(served.store, "released", "stable", first, why="first")
    prompt = chat_tokens(USER[0]["content"])
    texts = {name: text_of(served, recipe, prompt, 6) for name, recipe in recipes.items()}
    assert len(set(texts.values())) == 2
    seen: list[str] = []
    over = asyncio.Event()

    async def ask(client: httpx.AsyncClient) -> None:
        body = chat_body(model="released", max_tokens=6)
        response = await client.post(f"{served.url}/chat/completions", json=body)
        assert response.status_code == 200, response.text
        version = response.headers["x-luthier-adapter"]
        assert response.json()["choices"][0]["message"]["content"] == texts[version]
        seen.append(version)

    async def traffic() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=DEADLINE_S, limits=limits) as client, asyncio.TaskGroup() as asked:
            while not over.is_set():
                asked.create_task(ask(client))
                await asyncio.sleep(0.02)

    async def move() -> None:
        for version in (second, first):
            await asyncio.to_thread(poll, lambda: len(set(seen[-20:])) == 1 and len(seen) > 20, "all answer alike")
            registry.set_alias(served.store, "released", "stable", version, why="moved")
            await asyncio.to_thread(poll, lambda v=version: seen[-1] == f"released@{v}", "the move is live")
        over.set()

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic())
            group.create_task(move())

    asyncio.run(both())
    assert set(seen) == {"released@1", "released@2"}


def test_a_damaged_adapter_is_an_error_of_its_own_and_hurts_nobody(served: Served) -> None:
    served.publish("damaged", LoraRecipe(360))
    path = served.store._root / "adapters/damaged/1/adapter_model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-4] + b"\0\0\0\0" if good[-4:] != b"\0\0\0\0" else good[:-4] + b"\1\1\1\1")
    refused = post(served, "/chat/completions", chat_body(model="damaged@1"))
    assert refused.status_code == 500
    assert refused.json()["error"]["code"] == "adapter_damaged"
    path.write_bytes(good)

    def answers() -> bool:  # once `retry_failed_s` is over
        return post(served, "/chat/completions", chat_body(model="damaged@1")).status_code == 200

    poll(answers, "the adapter is whole again")


def test_an_adapter_that_the_engine_cannot_take_is_refused(served: Served) -> None:
    served.publish("too-large", LoraRecipe(361, r=16))  # max_rank is 8
    refused = post(served, "/chat/completions", chat_body(model="too-large@1"))
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "adapter_refused"


def test_health_readiness_and_metrics(served: Served) -> None:
    root = served.url.removesuffix("/v1")
    assert httpx.get(f"{root}/healthz").json() == {"status": "ok"}
    assert "<title>Luthier</title>" in httpx.get(root).text, "the chat page"
    ready = httpx.get(f"{root}/readyz")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "model": BASE})
    post(served, "/chat/completions", chat_body(model="skill-0"))
    wanted = (
        "luthier_requests_total{",
        "luthier_generated_tokens_total{",
        "luthier_kv_blocks{",
        "luthier_first_token_seconds_bucket{",
        "luthier_token_seconds_bucket{",
        "luthier_adapter_tokens_total{",
        'adapter="skill-0@1"',
        f'model="{BASE}"',
    )
    poll(lambda: all(each in httpx.get(f"{root}/metrics").text for each in wanted), f"{wanted} in /metrics")
    lines = httpx.get(f"{root}/metrics").text.splitlines()
    assert all(line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith("luthier_") for line in lines)


def test_another_port_or_application_is_refused_before_anything_changes(served: Served) -> None:
    model = ModelConfig(name=BASE, source=str(served.model.folder), licence="apache-2.0", dtype="fp32")
    port = httpx.URL(served.url).port
    assert port is not None
    with pytest.raises(deploy.ConfigError, match="already listens on"):
        deploy.deploy(serving_config(model, served.store.url, port + 1), 5, lambda line: None)
    other = serving_config(model, served.store.url, port).model_copy(update={"name": "second"})
    with pytest.raises(deploy.ConfigError, match="tiny-serving is served here already"):
        deploy.deploy(other, 5, lambda line: None)
    assert deploy.applications() == [APPLICATION]


def test_load_adds_a_replica_that_brings_the_adapters_along_and_its_going_cuts_no_stream(served: Served) -> None:
    """One adapter is asked for; then streams of the base alone, many until a second replica is up, and few until it is
    gone again: it has some when it is told to go, and they end as all do."""
    model = ModelConfig(name=BASE, source=str(served.model.folder), licence="apache-2.0", dtype="fp32")
    port = httpx.URL(served.url).port
    assert port is not None
    scaled = ReplicaConfig(
        min=1, max=2, target_ttft_s=0.5, catch_up_s=1.0, downscale_delay_s=3.0, drain_timeout_s=60.0, cpus=0.5
    )
    config = serving_config(model, served.store.url, port).model_copy(update={"replicas": scaled})
    deploy.deploy(config, DEADLINE_S * 2, lambda line: None)
    poll(lambda: len(served.replicas()) == 1, "one replica")
    served.client().completions.create(model="skill-5", prompt="a", max_tokens=1)
    seen: list[list[ReplicaStatus]] = []
    stages = {"many": threading.Event(), "few": threading.Event()}

    def streams(number: int) -> list[tuple[int, int]]:
        """Asked for, and ended as they should."""
        counted = []
        client = served.client()
        for stage, choices in (("many", 8), ("few", 1)):
            while not stages[stage].is_set():
                body: Any = {"model": BASE, "prompt": [9, 8, number], "max_tokens": LONG, "n": choices, "seed": number}
                with client.completions.create(**body, stream=True) as stream:
                    ends = [choice.finish_reason for chunk in stream for choice in chunk.choices]
                counted.append((choices, sum(each in ("stop", "length") for each in ends)))
        return counted

    def has_come() -> bool:
        replicas = served.replicas()
        return len(replicas) == 2 and all("skill-5@1" in each.adapters for each in replicas)

    def has_gone() -> bool:
        seen.append(served.replicas())
        return len(seen[-1]) == 1

    with ThreadPoolExecutor(6) as clients:
        running = [clients.submit(streams, number) for number in range(6)]
        try:
            poll(has_come, "a second replica that holds the adapter which the first was asked for")
            stages["many"].set()
            poll(has_gone, "the second replica has gone again")
        finally:
            for each in stages.values():
                each.set()
        counted = [each for client in running for each in client.result()]
    assert min(each.running for each in seen[-2]) > 0, "both replicas ran streams when one was told to go"
    assert all(asked == ended for asked, ended in counted)


def test_with_no_replica_it_is_ready_wakes_none_by_saying_so_and_a_request_wakes_one(served: Served) -> None:
    model = ModelConfig(name=BASE, source=str(served.model.folder), licence="apache-2.0", dtype="fp32")
    port = httpx.URL(served.url).port
    assert port is not None
    asleep = ReplicaConfig(min=0, max=1, downscale_delay_s=0.5, cpus=0.5)
    config = serving_config(model, served.store.url, port).model_copy(update={"replicas": asleep})
    deploy.deploy(config, DEADLINE_S * 2, lambda line: None)
    poll(lambda: not served.replicas(), "no replica is left")
    root = served.url.removesuffix("/v1")
    for _ in range(20):
        assert httpx.get(f"{root}/readyz").json() == {"ready": True, "model": BASE}
    assert not served.replicas()
    completion = served.client().completions.create(model="skill-5", prompt="a", max_tokens=1)
    assert completion.model == "skill-5"
    assert len(served.replicas()) == 1


def test_an_update_cuts_no_stream_and_then_two_replicas_share_the_adapters(served: Served) -> None:
    """Last, because the endpoint has two replicas afterwards."""
    model = ModelConfig(name=BASE, source=str(served.model.folder), licence="apache-2.0", dtype="fp32")
    port = httpx.URL(served.url).port
    assert port is not None
    body: Any = {"model": BASE, "prompt": [9, 8, 7], "max_tokens": LONG, "temperature": 1, "seed": 1, "n": 64}
    running: list[int] = []

    def tell(line: str) -> None:
        running.append(sum(replica.running for replica in served.replicas()))

    with served.client().completions.create(**body, stream=True, stream_options={"include_usage": True}) as stream:
        first = next(iter(stream))
        deploy.deploy(serving_config(model, served.store.url, port, num_replicas=2), DEADLINE_S * 2, tell)
        chunks = [first, *stream]
    assert running[0] > 0, "the update began while the stream ran"
    ended = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason in ("stop", "length")]
    assert sorted(ended) == list(range(64))
    assert chunks[-1].usage is not None
    poll(lambda: len(served.replicas()) == 2, "two replicas")

    # Requests for an adapter go where it is, once Serve's router has heard of it: about 100 ms after the load.
    # Until then another replica may load it too, so each attempt takes another adapter and lets the news pass first.
    # Without affinity the chance that 40 requests all go to the same one of two is 2 ** -39.
    attempts = iter([*NAMES, *(f"extra-{number}@1" for number in range(12))])

    def stays() -> bool:
        name = next(attempts)
        given: Any = {"model": name, "prompt": "a", "max_tokens": 1}
        client = served.client()
        client.completions.create(**given)
        for _ in range(20):
            served.replicas()
        before = [replica.requests for replica in sorted(served.replicas(), key=lambda each: each.replica)]
        for _ in range(40):
            client.completions.create(**given)
        after = [replica.requests for replica in sorted(served.replicas(), key=lambda each: each.replica)]
        return 40 in [late - early for late, early in zip(after, before, strict=True)]

    poll(stays, "an adapter's requests stay with one replica")
