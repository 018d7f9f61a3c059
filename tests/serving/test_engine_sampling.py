"""Sampling: transformers' own filters, frequencies that are the distribution's, and draws nobody else can move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cluster.errors import RequestError
from serving.engine.protocol import SamplingParams
from serving.engine.sampling import choose, draw, filtered, new_generator


def logits_of(seed: int, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


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
    params = SamplingParams(temperature=1.3, top_p=0.9, seed=seed)
    others = [SamplingParams(temperature=each % 2) for each in range(rows)]
    batch = torch.stack([logits_of(each) for each in range(rows)])
    batch[place] = logits_of(99)
    mixed = [params if each == place else others[each] for each in range(rows)]
    together = choose(batch, mixed, [new_generator(seed if each == place else None) for each in range(rows)])
    assert together[place] == choose(logits_of(99)[None], [params], [new_generator(seed)])[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_choice_and_the_others_have(value: float) -> None:
    logits = torch.stack([logits_of(1), logits_of(2), logits_of(3)])
    logits[1, 7] = value
    params = [SamplingParams(temperature=each) for each in (0, 1, 1)]
    first, broken, last = choose(logits, params, [new_generator(each) for each in range(3)])
    assert broken is None
    assert first is not None
    assert first.token_id == int(logits[0].argmax())
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
    ],
)
def test_bad_parameters_never_reach_the_engine(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message.replace(".", r"\.")):
        SamplingParams(**values)
