"""Sampling: what transformers and OpenAI's formula say, frequencies that are the distribution's, rows left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.errors import InvalidRequest
from serving.engine.protocol import SamplingParams
from serving.engine.sampling import Choice, Shaping, choose, draw, filtered, new_generator
from tests.serving.conftest import Expected, make_tokenizer

if TYPE_CHECKING:
    from tests.serving.conftest import CoreDriver, LoraRecipe, TinyModel


def logits_of(seed: int, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def pick(rows: torch.Tensor, params: list[SamplingParams], seeds: list[int | None]) -> list[Choice | None]:
    """Choices for the first token after the prompt [1, 2]."""
    shapings = [Shaping(each, [1, 2], frozenset({0})) if Shaping.is_wanted(each) else None for each in params]
    return choose(rows, params, [new_generator(seed) for seed in seeds], shapings)


@given(
    seed=st.integers(0, 10_000),
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=8),
    generated=st.lists(st.integers(0, 49), max_size=8),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.1, 5),
    min_tokens=st.integers(0, 9),
    bias=st.dictionaries(st.integers(0, 49), st.floats(-100, 100), max_size=4),
)
def test_what_stands_before_the_temperature_is_transformers_and_openais(
    seed: int,
    prompt: list[int],
    generated: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    min_tokens: int,
    bias: dict[int, float],
) -> None:
    params = SamplingParams(
        max_tokens=9,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        min_tokens=min_tokens,
        logit_bias=tuple(bias.items()),
    )
    eos_ids = [3, 7]
    before = [SequenceBiasLogitsProcessor({(token_id,): value for token_id, value in bias.items()})] if bias else []
    before.append(RepetitionPenaltyLogitsProcessor(repetition))
    after = MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, eos_ids)
    ours = Shaping(params, prompt, frozenset(eos_ids))
    for place in range(len(generated) + 1):
        logits = logits_of(seed + place)
        ids = torch.tensor([prompt + generated[:place]])
        theirs = LogitsProcessorList(before)(ids, logits[None].clone())
        # OpenAI's formula: mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
        counts = torch.tensor([generated[:place].count(token_id) for token_id in range(50)])
        theirs = after(ids, theirs - counts * frequency - (counts > 0) * presence)
        given_ = logits.clone()
        assert ours.apply(logits).tolist() == pytest.approx(theirs[0].tolist(), abs=1e-4)
        assert torch.equal(logits, given_)
        if place < len(generated):
            ours.advance(generated[place])


class OpenAIPenalties(LogitsProcessor):
    """OpenAI's formula for `generate`."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        counts = torch.zeros_like(scores)
        for token_id in input_ids[0, self.prompt :].tolist():
            counts[0, token_id] += 1
        return scores - counts * self.frequency - (counts > 0) * self.presence


EOS = 1  # of the tiny models

# What is asked of us, and of `generate`. A bias of 100 makes the end of the sequence the best token at once.
WISHES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {}),
    ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
    ({"repetition_penalty": 0.6}, {"repetition_penalty": 0.6}),
    ({"presence_penalty": 2.0, "frequency_penalty": 1.0}, {"presence": 2.0, "frequency": 1.0}),
    ({"presence_penalty": -2.0, "frequency_penalty": -1.5}, {"presence": -2.0, "frequency": -1.5}),
    ({"logit_bias": ((EOS, 100.0),)}, {"sequence_bias": [[[EOS], 100.0]]}),
    ({"logit_bias": ((EOS, 100.0),), "min_tokens": 6}, {"sequence_bias": [[[EOS], 100.0]], "min_new_tokens": 6}),
    ({"logit_bias": ((EOS, 100.0), (9, 60.0)), "ignore_eos": True}, {"sequence_bias": [[[EOS], 100.0], [[9], 60.0]]}),
    (
        {"logit_bias": ((40, 3.0),), "repetition_penalty": 1.3, "frequency_penalty": 0.7, "min_tokens": 12},
        {"sequence_bias": [[[40], 3.0]], "repetition_penalty": 1.3, "frequency": 0.7, "min_new_tokens": 12},
    ),
)


def generated(
    model: TinyModel, recipe: LoraRecipe | None, prompt: list[int], wishes: dict[str, Any], ends: bool
) -> Expected:
    """What `generate` answers with the same processors, and by how much each token beat the second best."""
    wishes = dict(wishes)
    penalties = OpenAIPenalties(len(prompt), wishes.pop("presence", 0.0), wishes.pop("frequency", 0.0))
    with torch.inference_mode():
        output = model.reference(recipe).generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS if ends else -1,
            return_dict_in_generate=True,
            output_scores=True,
            logits_processor=LogitsProcessorList([penalties]),
            **wishes,
        )
    best = [scores[0].topk(2).values for scores in output.scores]
    return Expected(output.sequences[0, len(prompt) :].tolist(), [float(two[0] - two[1]) for two in best])


def test_mixed_wishes_and_adapters_answer_as_generate_does(
    tiny: Callable[[str], TinyModel], drive: Callable[..., CoreDriver], recipes: tuple[LoraRecipe, ...]
) -> None:
    model = tiny("llama")
    driver = drive(model)
    driver.load(recipes[1])
    cases = [(asked, theirs, recipe) for asked, theirs in WISHES for recipe in (None, recipes[1])]
    for index, (asked, _, recipe) in enumerate(cases):
        params = SamplingParams(max_tokens=12, temperature=0, **asked)
        driver.add(f"{index}", model.prompt(index // 2, 9), model.digest(recipe), params)
    driver.run()
    lengths = set()
    for index, (asked, theirs, recipe) in enumerate(cases):
        ends = not asked.get("ignore_eos")
        expected = generated(model, recipe, model.prompt(index // 2, 9), theirs, ends)
        expected.check(driver.tokens(f"{index}"))
        assert driver.finish(f"{index}") == ("stop" if ends and expected.tokens[-1] == EOS else "length")
        lengths.add(len(expected.tokens))
    assert {1, 7, 12} <= lengths, "at once, after min_tokens, and never"


def test_min_tokens_puts_off_stop_strings_too(
    tiny: Callable[[str], TinyModel], drive: Callable[..., CoreDriver]
) -> None:
    driver = drive(tiny("llama"))
    token_id = make_tokenizer().convert_tokens_to_ids("z")
    for min_tokens in (0, 5):
        params = SamplingParams(
            max_tokens=12, temperature=0, logit_bias=((token_id, 100.0),), min_tokens=min_tokens, stop=("zz",)
        )
        driver.add(f"{min_tokens}", [5], None, params)
    driver.run()
    assert [driver.text("0"), driver.text("5")] == ["", "zzzz"]  # the sixth z completes one
    assert [driver.finish("0"), driver.finish("5")] == ["stop", "stop"]


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


ASKING = [
    {"presence_penalty": 1.0},
    {"frequency_penalty": 1.0},
    {"repetition_penalty": 1.1},
    {"min_tokens": 2},
    {"logit_bias": ((5, 1.0),)},
]


@pytest.mark.parametrize("asked", ASKING, ids=lambda asked: next(iter(asked)))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_ask_for_nothing_cost_nothing_and_are_chosen_as_ever(
    asked: dict[str, Any], temperature: float
) -> None:
    plain, asking = SamplingParams(temperature=temperature), SamplingParams(temperature=temperature, **asked)

    def measure(params: list[SamplingParams]) -> tuple[int, list[Choice | None]]:
        rows = torch.stack([logits_of(index) for index in range(len(params))])
        with Operations() as operations:
            choices = pick(rows, params, list(range(len(params))))
        return operations.count, choices

    nothing, _ = measure([plain])
    each = measure([plain] * 2)[0] - nothing
    assert (each == 0) == (temperature == 0), "a greedy row takes part in the one maximum and no more"
    of_eight, expected = measure([plain] * 8)
    assert of_eight == nothing + 7 * each
    mixed, choices = measure([asking, *[plain] * 7])
    assert mixed - of_eight == measure([asking])[0] - nothing > 0
    assert choices[1:] == expected[1:]


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
)
def test_the_filters_keep_what_transformers_keeps(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = logits_of(seed)
    theirs = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    kept, token_ids = filtered(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    ours = torch.zeros_like(logits).index_copy(0, token_ids, kept.softmax(-1))
    assert ours == pytest.approx(theirs.softmax(-1)[0], abs=1e-5)


def test_frequencies_are_the_probabilities() -> None:
    logits, params = torch.tensor([0.0, 1.0, 2.0, -1.0]), SamplingParams(temperature=0.7, top_k=3)
    generator = new_generator(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(logits, params, generator)] += 1
    kept = (logits[:3] / 0.7).softmax(-1)
    assert counts[3] == 0
    assert counts[:3] / 4000 == pytest.approx(kept, abs=0.03)


@given(seed=st.integers(-(2**70), 2**70), rows=st.integers(1, 5), place=st.integers(0, 4))
def test_a_row_is_chosen_alone_whatever_stands_around_it(seed: int, rows: int, place: int) -> None:
    place %= rows
    asked = ASKING[place] if seed % 2 else {}
    params = SamplingParams(temperature=1.3, top_p=0.9, seed=seed, **asked)
    others = [SamplingParams(temperature=each % 2, **ASKING[each]) for each in range(rows)]
    batch = torch.stack([logits_of(each) for each in range(rows)])
    batch[place] = logits_of(99)
    mixed = [params if each == place else others[each] for each in range(rows)]
    together = pick(batch, mixed, [seed if each == place else None for each in range(rows)])
    assert together[place] == pick(logits_of(99)[None], [params], [seed])[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_choice_and_the_others_have(value: float) -> None:
    logits = torch.stack([logits_of(1), logits_of(2), logits_of(3)])
    logits[1, 7] = value
    params = [SamplingParams(temperature=each, repetition_penalty=1.5) for each in (0, 1, 1)]
    first, broken, last = pick(logits, params, [0, 1, 2])
    assert broken is None
    assert first is not None
    assert first.token_id == int(Shaping(params[0], [1, 2], frozenset()).apply(logits[0]).argmax())
    assert last is not None


@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 1e-3])
def test_a_temperature_near_zero_is_greedy_and_not_nan(temperature: float) -> None:
    logits = logits_of(4) * 1000
    assert draw(logits, SamplingParams(temperature=temperature), new_generator(None)) == int(logits.argmax())


def test_a_vanishing_top_p_keeps_the_best() -> None:
    kept, token_ids = filtered(logits_of(5), SamplingParams(top_p=1e-9))
    assert token_ids.tolist() == [int(logits_of(5).argmax())]
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop": ("a", "")}, "without empty strings"),
        ({"logprobs": 21}, "logprobs is 21; it must be 0 to 20"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; it must be -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be 0.001 to 1000"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"min_tokens": 17}, "min_tokens is 17; it must be 0 to max_tokens, which is 16"),
        ({"logit_bias": ((5, 100.5),)}, "it must be biases of -100 to 100"),
    ],
)
def test_bad_parameters_never_reach_the_engine(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message.replace(".", r"\.")) as caught:
        SamplingParams(**values)
    assert caught.value.param == next(iter(values))
