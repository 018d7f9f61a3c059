"""Grammars with vLLM, for real: what the native engine promises of them (test_engine_grammar.py), promised here too."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from cluster.errors import InvalidRequest, ModelError, Overloaded
from serving.engine.protocol import GenerationRequest, Grammar, SamplingParams, TokenEvent
from serving.engine.vllm import VllmEngine
from serving.engine.vllm_command import VllmOptions, find_python
from tests.serving.conftest import RECIPES, TinyModel, make_tokenizer
from tests.serving.test_engine_grammar import MAX_TOKENS, SCHEMAS, json_of

if TYPE_CHECKING:
    Judge = Callable[[str], object]

try:
    PYTHON = find_python(None)
except ModelError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

RUNNING = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("vllm"), "qwen3", head_dim=32, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def engine(model: TinyModel) -> Iterator[VllmEngine]:
    """One engine for all tests of this file, with two adapters."""
    limits: dict[str, Any] = {"kv_bytes": 2**26, "max_running": RUNNING, "max_batch_tokens": 64, "max_adapters": 2}
    engine = VllmEngine(model.folder, VllmOptions(python=PYTHON, max_rank=8, **limits))
    engine.start()
    for recipe in RECIPES[:2]:
        asyncio.run(engine.load_adapter(str(model.digest(recipe)), model.adapter(recipe)))
    yield engine
    engine.stop()


async def ask(engine: VllmEngine, id_: str, prompt: list[int], adapter: str | None = None, **given: Any) -> Answered:
    """As the replica does it: compiled beside the loop, then submitted."""
    params = SamplingParams(**{"max_tokens": MAX_TOKENS, **given})
    if params.grammar is not None:
        await asyncio.to_thread(engine.compile, params.grammar)
    return Answered([event async for event in engine.submit(GenerationRequest(id_, prompt, adapter, params))])


class Answered:
    """A whole answer."""

    def __init__(self, events: list[TokenEvent]) -> None:
        self.tokens = [event.token_id for event in events if event.token_id is not None]
        self.text = "".join(event.text for event in events)
        self.end, self.error = events[-1].finish_reason, str(events[-1].error)


def test_whatever_stops_is_what_was_asked_in_mixed_batches_with_adapters(engine: VllmEngine, model: TinyModel) -> None:
    """At temperature 1, by a model that knows no JSON. Neighbours without a grammar answer as peft does."""
    choices = (None, *RECIPES[:2])
    free = {"max_tokens": 12, "temperature": 0}

    async def main() -> None:
        jobs = [(schema, seed) for seed in range(4) for schema in SCHEMAS]
        held = [
            ask(
                engine,
                f"g{index}",
                model.prompt(index, 5),
                model.digest(choices[index % 3]),
                seed=seed,
                grammar=json_of(schema),
            )
            for index, (schema, seed) in enumerate(jobs)
        ]
        neighbours = [
            ask(engine, f"n{index}", model.prompt(index, 20), model.digest(choices[index % 3]), **free)
            for index in range(12)
        ]
        answers = await asyncio.gather(*held, *neighbours)
        stopped: set[int] = set()
        for (schema, _), answer in zip(jobs, answers, strict=False):
            assert answer.end in ("stop", "length"), answer.error
            if answer.end == "stop":
                jsonschema.validate(json.loads(answer.text), schema, format_checker=jsonschema.FormatChecker())
                stopped.add(SCHEMAS.index(schema))
            else:
                assert len(answer.tokens) == MAX_TOKENS
        assert stopped == set(range(len(SCHEMAS))), "each schema must be seen to its end"
        for index, answer in enumerate(answers[len(jobs) :]):
            model.expected(choices[index % 3], model.prompt(index, 20), 12).check(answer.tokens)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("grammar", "belongs"),
    [
        (Grammar("regex", "[0-9]{2,3}(kg|g)"), re.compile("[0-9]{2,3}(kg|g)").fullmatch),
        (
            Grammar("choice", '["yes", "no", "caf\\u00e9 \\"x\\"", "nobody", "a.b|c"]'),
            {"yes", "no", 'café "x"', "nobody", "a.b|c"}.__contains__,
        ),
        (Grammar("lark", '?start: "(" start ")" | "x"'), re.compile(r"\(*x\)*").fullmatch),
        (Grammar("lark", '%llguidance {}\nstart: "::=" /[ab]+/ "\\n"'), re.compile(r"::=[ab]+\n").fullmatch),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_patterns_choices_and_grammars_are_kept_to(
    grammar: Grammar, belongs: Judge, engine: VllmEngine, model: TinyModel
) -> None:
    async def main() -> list[Answered]:
        prompts = [model.prompt(seed, 5) for seed in range(20)]
        asked = [ask(engine, str(seed), each, seed=seed, grammar=grammar) for seed, each in enumerate(prompts)]
        return await asyncio.gather(*asked)

    answers = asyncio.run(main())
    assert {answer.end for answer in answers} == {"stop"}
    assert all(belongs(answer.text) for answer in answers), [answer.text for answer in answers]
    assert len({answer.text for answer in answers}) > 1


def test_a_grammar_goes_together_with_everything_else(engine: VllmEngine, model: TinyModel) -> None:
    digits, open_ended = Grammar("regex", "[0-9]{30}"), Grammar("regex", "[0-9]{2}[0-9]*")
    prompt = model.prompt(1, 9)

    async def main() -> None:
        async def held(id_: str, **given: Any) -> Answered:
            return await ask(engine, id_, prompt, **{"max_tokens": 60, "seed": 4, "grammar": digits, **given})

        whole = (await held("whole")).text
        assert re.fullmatch("[0-9]{30}", whole)
        assert (await held("again")).text == whole
        assert (await held("other", seed=5)).text != whole
        short = await held("short", max_tokens=7)
        assert whole.startswith(short.text)
        assert short.end == "length"
        stop = whole[10:13]
        assert (await held("stopped", stop=(stop,))).text == whole[: whole.index(stop)]
        # The end of the grammar is the end, whatever else was asked.
        long = await held("long", min_tokens=50, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=1)
        assert re.fullmatch("[0-9]{30}", long.text)
        assert long.end == "stop"
        ended = await held("open", grammar=open_ended, ignore_eos=True, logit_bias=((1, 9.0),))
        assert re.fullmatch("[0-9]{2,}", ended.text)
        assert (ended.end, ended.tokens[-1]) == ("stop", 1), "the end of the sequence, which the grammar lets stand"
        least = await held("least", grammar=open_ended, min_tokens=20, logit_bias=((1, 9.0),))
        assert re.fullmatch("[0-9]{20,}", least.text)
        # A token that the grammar allows can be forbidden, and one that it forbids cannot be had.
        nine, a = (make_tokenizer().convert_tokens_to_ids(each) for each in "9a")
        biased = await held("biased", logit_bias=((nine, -100.0), (a, 100.0)), temperature=0)
        assert re.fullmatch("[0-8]{30}", biased.text)
        with pytest.raises(InvalidRequest, match=r"logprobs .* native engine") as caught:
            await held("logprobs", logprobs=2)
        assert caught.value.param == "logprobs"
        with pytest.raises(InvalidRequest, match="logit_bias has token 384"):
            await held("stray", logit_bias=((384, 1.0),))

    asyncio.run(main())


NESTED: dict[str, Any] = {"type": "null"}
for _ in range(40):
    NESTED = {"anyOf": [NESTED, {"type": "integer"}]}


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (json_of({"type": "objct"}), "objct"),
        (json_of({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (json_of({"$ref": "http://127.0.0.1:1/schema.json"}), "schema.json"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("lark", "start: start"), "no answer belongs to it"),
        # What the native engine takes:
        (Grammar("regex", "a\0b"), "by vLLM: .*NUL"),
        (json_of(NESTED), "by vLLM: .*nested too deeply"),
    ],
    ids=lambda value: value.kind if isinstance(value, Grammar) else "",
)
def test_what_either_side_cannot_follow_is_refused_by_name_and_harms_nobody(
    grammar: Grammar, message: str, engine: VllmEngine, model: TinyModel
) -> None:
    named = Grammar(grammar.kind, grammar.text, "response_format")

    async def main() -> None:
        prompt = model.prompt(0, 20)
        other = asyncio.create_task(ask(engine, "other", prompt, max_tokens=12, temperature=0))
        for _ in range(2):  # a refusal is not forgotten
            with pytest.raises(InvalidRequest, match=f"response_format cannot be followed.*{message}") as caught:
                await ask(engine, "refused", [5], grammar=named)
            assert caught.value.param == "response_format"
        model.expected(None, prompt, 12).check((await other).tokens)

    asyncio.run(main())


def test_a_grammar_that_comes_to_a_dead_end_is_an_error_and_harms_nobody(engine: VllmEngine, model: TinyModel) -> None:
    async def main() -> None:
        prompt = model.prompt(0, 20)
        dead = Grammar("lark", 'start: "a" x\nx: x')
        asked = [ask(engine, f"d{least}", [5], grammar=dead, min_tokens=least) for least in (0, 20)]
        *ended, free = await asyncio.gather(*asked, ask(engine, "free", prompt, max_tokens=12, temperature=0))
        assert [answer.end for answer in ended] == ["error", "error"]
        assert all("grammar" in answer.error for answer in ended), [answer.error for answer in ended]
        model.expected(None, prompt, 12).check(free.tokens)

    asyncio.run(main())


def test_a_new_grammar_is_looked_at_whatever_runs_and_waits(engine: VllmEngine, model: TinyModel) -> None:
    """The replica's one thread for prompts does it, so it must not wait for a place in vLLM."""

    async def main() -> None:
        params = SamplingParams(max_tokens=3000, ignore_eos=True)
        crowd = [GenerationRequest(str(index), [5, index], None, params) for index in range(RUNNING * 2)]
        streams = [engine.submit(request) for request in crowd]
        for stream in streams[:RUNNING]:
            await anext(stream)
        await asyncio.to_thread(engine.compile, Grammar("regex", "[a-f]{7}"))
        with pytest.raises(InvalidRequest, match="NUL"):
            await asyncio.to_thread(engine.compile, Grammar("regex", "[a-f]\0"))
        assert (engine.stats().running, engine.stats().waiting) == (RUNNING, RUNNING), "nobody has ended"
        for stream in streams:
            await stream.aclose()

    asyncio.run(main())


def test_while_vllm_does_not_serve_a_new_grammar_is_told_to_come_again(engine: VllmEngine) -> None:
    """Last: the engine is stopped."""
    engine.stop()
    with pytest.raises(Overloaded, match="stopped"):
        engine.compile(Grammar("regex", "[a-f]{8}"))
