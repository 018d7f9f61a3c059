"""What is said to vLLM and made of its answers: pure parts, tested where vLLM is not installed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from cluster.config import load
from cluster.errors import ConfigError, InvalidRequest, ModelError
from serving.config import EngineConfig, ServingConfig, VllmConfig
from serving.engine.adapter import read_adapter
from serving.engine.grammar import Grammars
from serving.engine.protocol import GenerationRequest, Grammar, SamplingParams, TokenEvent
from serving.engine.vllm_answer import Answer
from serving.engine.vllm_api import Chunk, Json, Token, completion_body, read_chunk
from serving.engine.vllm_command import VllmOptions, command, environment, find_python
from serving.engine.vllm_facts import ModelFacts, read_facts
from serving.engine.vllm_grammar import structured_outputs
from serving.engine.vllm_zero import write_zero_adapter
from tests.serving.conftest import make_tokenizer

if TYPE_CHECKING:
    from tests.serving.conftest import TinyModel

EOS = 1
FACTS = ModelFacts(make_tokenizer(), 384, 512, frozenset({EOS}))
OPTIONS = VllmOptions(python=Path("/venv/bin/python"))


def answer(tokens: list[int], cuts: list[int], stop: tuple[str, ...], end: str | None) -> list[TokenEvent]:
    """The events of tokens that arrive in chunks cut at `cuts`, the last of them with vLLM's reason."""
    taker = Answer(GenerationRequest("a", [5], None, SamplingParams(stop=stop)), FACTS)
    events: list[TokenEvent] = []
    edges = [0, *sorted({cut % len(tokens) for cut in cuts} - {0}), len(tokens)]
    for start, after in itertools.pairwise(edges):
        choice: Json = {"token_ids": tokens[start:after], "finish_reason": end if after == len(tokens) else None}
        events += taker.take(read_chunk({"choices": [choice]}, None))
        if events and events[-1].finish_reason:
            break
    return events


TOKENS = st.lists(st.integers(0, 383), min_size=1, max_size=24)


@given(TOKENS, st.lists(st.integers(0, 100)), st.sampled_from([(), ("e",), ("the", "o")]))
def test_an_answer_does_not_depend_on_how_its_tokens_were_cut_into_chunks(
    tokens: list[int], cuts: list[int], stop: tuple[str, ...]
) -> None:
    one_by_one = answer(tokens, list(range(len(tokens))), stop, "length")
    assert answer(tokens, cuts, stop, "length") == one_by_one
    assert [event.finish_reason for event in one_by_one[:-1]] == [None] * (len(one_by_one) - 1)
    seen = [event.token_id for event in one_by_one]
    assert seen == tokens[: len(seen)]
    text = "".join(event.text for event in one_by_one)
    whole = FACTS.decode([token for token in seen if token is not None and token != EOS])
    found = [at for at in (whole.find(each) for each in stop) if at >= 0]
    assert text == (whole[: min(found)] if found else whole)
    is_stopped = bool(found) or seen[-1] == EOS
    assert one_by_one[-1].finish_reason == ("stop" if is_stopped else "length")


def test_an_end_that_openai_does_not_know_is_an_error() -> None:
    events = answer([300, 301], [1], (), "repetition")
    assert [event.finish_reason for event in events] == [None, None, "error"]
    assert events[-1].error == "vLLM ended the answer: repetition"


def test_the_best_candidates_are_told_and_the_chosen_one_beside_them() -> None:
    told = {
        "token_logprobs": [-4.0],
        "top_logprobs": [{"token_id:300": -4.0, "token_id:7": -0.5, "token_id:301": -1.5}],
    }
    chunk = read_chunk({"choices": [{"token_ids": [300], "finish_reason": None, "logprobs": told}]}, 2)
    assert [(each.token_id, each.logprob) for each in chunk.tokens[0].top] == [(7, -0.5), (301, -1.5)]
    (event,) = Answer(GenerationRequest("a", [5], None, SamplingParams(logprobs=2)), FACTS).take(chunk)
    assert event.logprob is not None
    assert (event.logprob.token_id, event.logprob.token, event.logprob.logprob) == (300, FACTS.decode([300]), -4.0)
    assert [each.token for each in event.top_logprobs] == [FACTS.decode([7]), FACTS.decode([301])]


@pytest.mark.parametrize("body", [{"error": {"message": "no", "code": 400}}, {"error": "no"}])
def test_an_error_in_a_stream_is_vllms_own_words(body: Json) -> None:
    assert read_chunk(body, None) == Chunk(error="no")


def test_a_request_says_every_parameter_and_leaves_text_to_us() -> None:
    params = SamplingParams(max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, stop=("x",), seed=2**63 + 5, logprobs=2)
    body = completion_body(GenerationRequest("a", [5, 6], "sha256:d", params), {EOS, 4})
    assert {
        key: body[key] for key in ("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "logprobs")
    } == {
        "model": "sha256:d",
        "prompt": [5, 6],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "logprobs": 2,
    }
    assert body["seed"] == 5, "taken modulo 2**63, as by the native engine"
    assert "stop" not in body
    assert (body["ignore_eos"], body["stop_token_ids"]) == (True, [EOS, 4])
    assert json.loads(json.dumps(body)) == body


def test_vllm_sees_nothing_of_the_stores_secrets_or_of_ray(tmp_path: Path) -> None:
    ours = {
        "AWS_SECRET_ACCESS_KEY": "secret",
        "RAY_AUTH_TOKEN": "secret",
        "HF_TOKEN": "secret",
        "VLLM_API_KEY": "secret",
        "LUTHIER_CACHE": "/cache",
        "CUDA_VISIBLE_DEVICES": "3",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "HOME": "/home/me",
        "PATH": "/bin",
    }
    seen = environment(ours, OPTIONS, tmp_path)
    assert "secret" not in seen.values()
    assert "LUTHIER_CACHE" not in seen
    passed = {name: seen[name] for name in ("CUDA_VISIBLE_DEVICES", "VLLM_LOGGING_LEVEL", "HOME")}
    assert passed == {"CUDA_VISIBLE_DEVICES": "3", "VLLM_LOGGING_LEVEL": "DEBUG", "HOME": "/home/me"}
    assert seen["PATH"] == "/venv/bin:/bin"


@pytest.mark.parametrize(("rank", "slot"), [(1, 1), (2, 8), (64, 64), (65, 128), (512, 512)])
def test_every_rank_that_the_config_takes_has_a_slot_size_of_vllms(rank: int, slot: int, tmp_path: Path) -> None:
    config = VllmConfig(max_rank=rank)
    options = VllmOptions(python=Path("python"), max_rank=config.max_rank)
    assert f"--max-lora-rank={slot}" in command(tmp_path, options, tmp_path / "api")


def test_a_missing_environment_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"nowhere/python is not there; make one with scripts/setup-vllm"):
        find_python(str(tmp_path / "nowhere" / "python"))
    monkeypatch.setenv("LUTHIER_VLLM_PYTHON", "/bin/sh")
    assert find_python(None) == Path("/bin/sh")


def test_the_facts_of_a_model_are_those_of_the_native_engine(
    tiny: Callable[[str], TinyModel], drive: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("gemma3_multimodal")
    facts, native = read_facts(model.folder), drive(model).core._model.facts
    assert (facts.vocabulary, facts.max_context, facts.eos_ids) == (
        native.vocabulary,
        native.max_sequence_tokens,
        native.eos_ids,
    )
    with pytest.raises(ModelError, match="cannot be read"):
        read_facts(tmp_path)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral", "gemma2", "qwen3_moe"])
def test_the_zero_adapter_fits_its_model_and_changes_nothing(
    architecture: str, tiny: Callable[[str], TinyModel], drive: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(architecture)
    write_zero_adapter(model.folder, tmp_path / "zero")
    adapter = read_adapter("zero", tmp_path / "zero", drive(model).core.target)
    ((module, pair),) = adapter.pairs.items()
    assert adapter.rank == 1
    assert not pair.a.any()
    assert not pair.b.any()
    judge = PeftModel.from_pretrained(model.load(), tmp_path / "zero")
    assert judge.base_model.targeted_module_names == [module]


def test_a_model_without_linear_layers_that_we_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can serve it on a GPU only"):
        write_zero_adapter(tmp_path, tmp_path / "zero")


HEAD = "name: a\nmodel: {name: b, source: ./b, licence: mit}\nstore: file:///tmp/s\n"


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ("", EngineConfig()),
        ("engine: native", EngineConfig()),
        ("engine: {max_adapters: 3}", EngineConfig(max_adapters=3)),
        ("engine: vllm", VllmConfig()),
        ("engine: {kind: vllm, max_adapters: 3}", VllmConfig(max_adapters=3)),
    ],
)
def test_the_engine_is_chosen_by_its_kind_or_by_its_name_alone(
    section: str, wanted: EngineConfig | VllmConfig, tmp_path: Path
) -> None:
    path = tmp_path / "serving" / "a.yaml"
    path.parent.mkdir()
    path.write_text(HEAD + section)
    assert load(path, ServingConfig).engine == wanted


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ("engine: vlm", ':4: engine: got "vlm"; write native or vllm'),
        ("engine: {kind: vlm}", ':4: engine: got {"kind": "vlm"}; write native or vllm'),
        ("engine: {kind: vllm, kv_tokens: 9}", ":4: engine.kv_tokens: unknown key; did you mean 'kv_bytes'?"),
        ("engine: {kind: vllm, quantization: int8}", "quantization is the native engine's; vLLM has its own"),
        ("engine: {quantization: int4}", ":4: engine.quantization: got \"int4\"; input should be 'int8' or 'nf4'"),
        ("engine: {kind: vllm, max_rank: 513}", ":4: engine.max_rank: got 513"),
        ("engine: {kind: vllm, max_running: 600}", "max_running 600 is more than max_batch_tokens 512"),
    ],
)
def test_a_wrong_engine_section_is_told_with_its_line(section: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "serving" / "a.yaml"
    path.parent.mkdir()
    path.write_text(HEAD + section)
    with pytest.raises(ConfigError) as caught:
        load(path, ServingConfig)
    assert fault in str(caught.value)


def test_min_tokens_and_ignore_eos_hold_here_as_with_the_native_engine() -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, stop=("e",), min_tokens=2, logit_bias=((7, -3.0),))
    request = GenerationRequest("a", [5], None, params)
    body = completion_body(request, {EOS})
    assert (body["stop_token_ids"], body["min_tokens"], body["logit_bias"]) == ([], 2, {"7": -3.0})
    (e,) = make_tokenizer()("e", add_special_tokens=False)["input_ids"]
    events = Answer(request, FACTS).take(
        read_chunk({"choices": [{"token_ids": [e, EOS, e, e], "finish_reason": None}]}, None)
    )
    assert [event.token_id for event in events] == [e, EOS, e]
    assert events[-1].finish_reason == "stop"


NUMBER = Grammar("regex", "[0-9]{3}")
OPEN = Grammar("regex", "[0-9]{2}[0-9]*")


def ids(text: str) -> list[int]:
    return list(make_tokenizer()(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("grammar", "tokens", "taken", "end"),
    [
        (NUMBER, [*ids("123"), *ids("4")], "123", "stop"),  # nothing may follow: what vLLM chose is dropped
        (NUMBER, ids("12x"), "12", "error"),
        (NUMBER, [*ids("12"), EOS], "12", "error"),  # what vLLM does where it has come to a dead end
        (OPEN, [*ids("1234"), EOS], "1234", "stop"),
        (OPEN, [*ids("1"), EOS], "1", "error"),
        (OPEN, ids("1234"), "1234", None),
    ],
)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_answer_ends_with_its_grammar_and_is_an_error_when_it_leaves_it(
    grammar: Grammar, tokens: list[int], taken: str, end: str | None, ignore_eos: bool
) -> None:
    params = SamplingParams(grammar=grammar, min_tokens=9, ignore_eos=ignore_eos)
    matcher = Grammars(FACTS.tokenizer, FACTS.vocabulary, FACTS.eos_ids).matcher(grammar)
    taker = Answer(GenerationRequest("a", [5], None, params), FACTS, matcher)
    events = taker.take(Chunk(tuple(map(Token, tokens))))
    assert "".join(event.text for event in events) == taken
    assert events[-1].finish_reason == end
    assert end != "error" or "left its grammar" in str(events[-1].error)


@pytest.mark.parametrize(
    ("grammar", "wanted"),
    [
        (Grammar("regex", "a|b"), {"regex": "a|b"}),
        (Grammar("choice", '["a.b", "c"]'), {"regex": r"a\.b|c"}),
        (Grammar("lark", '?start: "::="'), {"grammar": '%llguidance {}\n?start: "::="'}),
    ],
)
def test_a_grammar_goes_to_vllm_as_the_native_engine_takes_it(grammar: Grammar, wanted: Json) -> None:
    assert structured_outputs(grammar) == wanted
    request = GenerationRequest("a", [5], None, SamplingParams(grammar=grammar, ignore_eos=True))
    body = completion_body(request, {EOS}, structured_outputs=wanted)
    assert (body["structured_outputs"], body["stop_token_ids"]) == (wanted, [EOS]), "its end is the end"


def test_a_schema_goes_to_vllm_with_little_whitespace_and_nothing_lenient() -> None:
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True, "item_separator": ";"}}
    told = json.loads(structured_outputs(Grammar("json_schema", json.dumps(schema)))["json"])
    assert (told["type"], told["uniqueItems"]) == ("array", True)
    assert told["x-guidance"]["lenient"] is False
    assert told["x-guidance"]["item_separator"] == ", ?"


def test_log_probabilities_of_an_answer_with_a_grammar_are_refused() -> None:
    params = SamplingParams(grammar=Grammar("regex", "a", "response_format"), logprobs=0)
    with pytest.raises(InvalidRequest, match="logprobs together with response_format need the native engine") as caught:
        FACTS.check(GenerationRequest("a", [5], None, params))
    assert caught.value.param == "logprobs"
