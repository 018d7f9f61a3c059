"""Grammars: every answer that ends by itself is what was asked, whoever sits in the batch, and nobody else notices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from cluster.errors import InvalidRequest
from serving.engine.protocol import Grammar, SamplingParams
from tests.serving.conftest import make_tokenizer

if TYPE_CHECKING:
    from tests.serving.conftest import CoreDriver, LoraRecipe, TinyModel

    Tiny = Callable[[str], TinyModel]
    Drive = Callable[..., CoreDriver]

MAX_TOKENS = 150

SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object"},
    {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["age"]},
    {
        "type": "object",
        "properties": {"city": {"enum": ["Lyon", "東京", 'a "b"']}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "number", "minimum": -3, "maximum": 40.5}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"const": {"a": [1, 2]}}, {"type": "integer", "multipleOf": 7}]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "minLength": 3, "maxLength": 9},
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}, "of": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "exclusiveMinimum": 0}}, "required": ["a"]},
            {"properties": {"b": {"prefixItems": [{"type": "null"}, {"type": "boolean"}], "type": "array"}}},
        ]
    },
    {"type": "object", "patternProperties": {"^x_[a-z]$": {"type": "null"}}, "additionalProperties": False},
    {},
    # llguidance's own keyword, which would change what is written:
    {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 3, "x-guidance": {"item_separator": ";"}},
)


def json_of(schema: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> TinyModel:
    return tiny("qwen3")


def test_whatever_stops_is_what_was_asked_in_mixed_batches_with_adapters(
    model: TinyModel, drive: Drive, recipes: tuple[LoraRecipe, ...]
) -> None:
    """At temperature 1, by a model that knows no JSON. Neighbours without a grammar answer as if alone."""
    driver = drive(model, kv_tokens=8192, max_running=24)
    for recipe in recipes[:2]:
        driver.load(recipe)
    digests = [None, model.digest(recipes[0]), model.digest(recipes[1])]
    free = SamplingParams(max_tokens=40, temperature=1.0, seed=3)
    for index, digest in enumerate(digests):
        driver.add(f"alone{index}", model.prompt(index, 20), digest, free)
    driver.run()
    asked: dict[str, dict[str, Any]] = {}
    for seed in range(6):
        for index, schema in enumerate(SCHEMAS):
            id_ = f"s{index}-{seed}"
            asked[id_] = schema
            params = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=seed, grammar=json_of(schema))
            driver.add(id_, model.prompt(seed, 5 + index), digests[(seed + index) % 3], params)
        for index, digest in enumerate(digests):
            driver.add(f"together{seed}{index}", model.prompt(index, 20), digest, free)
    driver.run()
    assert driver.core.stats().max_adapters_in_step == 2
    stopped: set[int] = set()
    for id_, schema in asked.items():
        assert driver.finish(id_) in {"stop", "length"}, driver.events[id_][-1].error
        if driver.finish(id_) == "stop":
            answer = json.loads(driver.text(id_))
            jsonschema.validate(answer, schema, format_checker=jsonschema.FormatChecker())
            stopped.add(SCHEMAS.index(schema))
        else:
            assert len(driver.tokens(id_)) == MAX_TOKENS
    assert stopped == set(range(len(SCHEMAS))), "each schema must be seen to its end"
    for seed in range(6):
        for index in range(3):
            assert driver.tokens(f"together{seed}{index}") == driver.tokens(f"alone{index}")
    assert driver.core.stats().kv_blocks_used == 0


@pytest.mark.parametrize(
    ("grammar", "belongs"),
    [
        (Grammar("regex", "[0-9]{2,3}(kg|g)"), re.compile("[0-9]{2,3}(kg|g)").fullmatch),
        (
            Grammar("choice", '["yes", "no", "caf\\u00e9 \\"x\\"", "nobody"]'),
            {"yes", "no", 'café "x"', "nobody"}.__contains__,
        ),
        (Grammar("lark", 'start: "(" start ")" | "x"'), re.compile(r"\(*x\)*").fullmatch),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_patterns_choices_and_grammars_are_kept_to(
    grammar: Grammar, belongs: Callable[[str], object], model: TinyModel, drive: Drive
) -> None:
    driver = drive(model)
    texts = set()
    for seed in range(20):
        params = SamplingParams(max_tokens=60, seed=seed, grammar=grammar)
        driver.add(f"{seed}", model.prompt(seed, 5), None, params)
    driver.run()
    for seed in range(20):
        assert driver.finish(f"{seed}") == "stop"
        assert belongs(driver.text(f"{seed}")), driver.text(f"{seed}")
        texts.add(driver.text(f"{seed}"))
    assert len(texts) > 1


def test_a_grammar_goes_together_with_everything_else(model: TinyModel, drive: Drive) -> None:
    driver = drive(model, kv_tokens=4096)
    digits = Grammar("regex", "[0-9]{30}")
    prompt = model.prompt(1, 9)

    def ask(id_: str, **given: Any) -> str:
        driver.add(id_, prompt, None, SamplingParams(**{"max_tokens": 60, "seed": 4, "grammar": digits, **given}))
        driver.run()
        return driver.text(id_)

    whole = ask("whole")
    assert re.fullmatch("[0-9]{30}", whole)
    assert ask("again") == whole
    assert ask("other", seed=5) != whole
    assert whole.startswith(ask("short", max_tokens=7))
    assert driver.finish("short") == "length"
    stop = whole[10:13]
    assert ask("stopped", stop=(stop,)) == whole[: whole.index(stop)]
    # The end of the grammar is the end, whatever else was asked.
    assert ask("long", min_tokens=50, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=1).isdigit()
    assert (driver.finish("long"), len(driver.text("long"))) == ("stop", 30)
    open_ended = Grammar("regex", "[0-9]{2}[0-9]*")
    assert re.fullmatch("[0-9]{2,}", ask("open", grammar=open_ended, ignore_eos=True, logit_bias=((1, 9.0),)))
    assert driver.finish("open") == "stop"
    assert driver.tokens("open")[-1] == 1, "the end of the sequence, which the grammar lets stand here"
    # A token that the grammar allows can be forbidden, and one that it forbids cannot be had.
    nine, a = (make_tokenizer().convert_tokens_to_ids(each) for each in "9a")
    biased = ask("biased", logit_bias=((nine, -100.0), (a, 100.0)), temperature=0)
    assert re.fullmatch("[0-8]{30}", biased)
    # Log probabilities are of the raw distribution, where other tokens are likelier.
    ask("logprobs", logprobs=2)
    assert driver.text("logprobs") == whole
    assert not any(event.top_logprobs[0].token.isdigit() for event in driver.events["logprobs"])


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (json_of({"type": "objct"}), "objct"),
        (json_of({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (json_of({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (json_of({"type": "integer", "minimum": 5, "maximum": 3}), "5"),
        (json_of({"$ref": "http://127.0.0.1:1/schema.json"}), "schema.json"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("lark", "start: start"), "no answer belongs to it"),
        (json_of({"type": "object", "properties": {f"p{number}": {} for number in range(3000)}}), "too big"),
        (Grammar("regex", "a" * 300_000), "300000 characters; at most 262144"),
    ],
    ids=lambda value: value.kind if isinstance(value, Grammar) else "",
)
def test_what_cannot_be_followed_is_refused_by_name_and_changes_nothing(
    grammar: Grammar, message: str, model: TinyModel, drive: Drive
) -> None:
    driver = drive(model)
    named = Grammar(grammar.kind, grammar.text, "response_format")
    for attempt in (
        lambda: driver.core.grammars.compile(named),
        lambda: driver.add("a", [5], None, SamplingParams(grammar=named)),
    ):
        with pytest.raises(InvalidRequest, match=f"response_format cannot be followed: .*{message}") as caught:
            attempt()
        assert caught.value.param == "response_format"
    assert not driver.core.has_work


def test_a_grammar_that_comes_to_a_dead_end_ends_its_request_and_no_other(model: TinyModel, drive: Drive) -> None:
    driver = drive(model)
    dead = Grammar("lark", 'start: "a" x\nx: x')
    driver.add("dead", [5], None, SamplingParams(grammar=dead))
    driver.add("free", [5], None, SamplingParams(temperature=0))
    driver.run()
    assert driver.finish("dead") == "error"
    assert "grammar" in str(driver.events["dead"][-1].error)
    model.expected(None, [5], 16).check(driver.tokens("free"))


def test_a_text_is_compiled_once(model: TinyModel, drive: Drive) -> None:
    grammars = drive(model).core.grammars
    one = grammars.compile(json_of(SCHEMAS[1]))
    assert grammars.compile(Grammar("json_schema", json.dumps(SCHEMAS[1]), "structured_outputs")) is one
    assert grammars.compile(json_of(SCHEMAS[2])) is not one
    for number in range(200):
        grammars.compile(Grammar("regex", f"a{{{number + 1}}}"))
    assert grammars.compile(json_of(SCHEMAS[1])) is not one, "what is not used makes room"
