"""The engine shared out: a flood for one adapter holds up nobody else, and who is sent away hears for how long."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Overloaded
from serving.engine.kv import BlockAllocator
from serving.engine.pace import Pace
from serving.engine.protocol import GenerationRequest, SamplingParams
from serving.engine.scheduler import Limits, Scheduler, Sequence

BLOCKS, BLOCK = 20, 4
LONGEST = 24


def asked(adapter: str, prompt: int, max_tokens: int, weight: float = 1.0) -> Sequence:
    return Sequence(GenerationRequest("r", [0] * prompt, adapter, SamplingParams(max_tokens=max_tokens), weight))


def step(scheduler: Scheduler, served: Counter[str]) -> None:
    for chunk in scheduler.plan():
        mine = chunk.sequence
        served[mine.flow] += chunk.num_tokens
        scheduler.advance(chunk)
        if chunk.samples:
            mine.tokens.append(0)
            if mine.num_generated == mine.request.params.max_tokens:
                scheduler.finish(mine)


requests = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, LONGEST), st.integers(1, LONGEST)), min_size=20, max_size=120
)


weights = st.fixed_dictionaries(dict.fromkeys("abc", st.sampled_from([1.0, 2.0, 5.0])))


@given(requests, st.just(dict.fromkeys("abc", 1.0)) | weights)
def test_who_always_has_requests_waiting_gets_as_much_as_the_others(
    asked_for: list[tuple[str, int, int]], weights: dict[str, float]
) -> None:
    """Theorem 4.4 of the paper: two flows that wait all the time are never more than 2 max(prompt, memory) apart, each
    divided by its weight."""
    scheduler = Scheduler(Limits(16, 6, 1000, 100), BlockAllocator(BLOCKS, BLOCK))
    for adapter, prompt, max_tokens in sorted(asked_for):  # the worst order of arrival: one's flood before the next's
        scheduler.add(asked(adapter, prompt, max_tokens, weights[adapter]))
    served: Counter[str] = Counter()
    while True:
        waiting = {each.flow for each in scheduler.waiting}
        if len(waiting) < len({adapter for adapter, _, _ in asked_for}):
            return
        step(scheduler, served)
        shares = [served[each] / weights[each] for each in waiting]
        assert max(shares) - min(shares) <= 2 * BLOCKS * BLOCK


@given(requests)
def test_everybody_is_served_in_the_end_and_in_the_order_of_his_own(asked_for: list[tuple[str, int, int]]) -> None:
    scheduler = Scheduler(Limits(16, 6, 1000, 100), BlockAllocator(BLOCKS, BLOCK))
    sequences = [asked(*each) for each in asked_for]
    admitted: list[Sequence] = []  # not who computed first: a short prompt may fit into a step that a long one does not
    arriving = list(sequences)
    served: Counter[str] = Counter()
    while arriving or scheduler.sequences():
        for each in arriving[:2]:
            scheduler.add(each)
        arriving = arriving[2:]
        step(scheduler, served)
        admitted += [each for each in sequences if (each.blocks or each.computed) and each not in admitted]
    for flow in "abc":
        assert [each for each in admitted if each.flow == flow] == [each for each in sequences if each.flow == flow]
    assert served.total() == sum(each.max_cached for each in sequences)


def test_a_weight_of_three_is_three_times_as_much() -> None:
    scheduler = Scheduler(Limits(16, 2, 1000, 1000), BlockAllocator(BLOCKS, BLOCK))
    for _ in range(200):
        scheduler.add(asked("heavy", 8, 4, weight=3))
        scheduler.add(asked("light", 8, 4))
    served: Counter[str] = Counter()
    for _ in range(300):
        step(scheduler, served)
    assert served["heavy"] == pytest.approx(3 * served["light"], rel=0.1)


def test_who_comes_late_goes_before_a_flood() -> None:
    scheduler = Scheduler(Limits(16, 1, 1000, 100), BlockAllocator(BLOCKS, BLOCK))
    for _ in range(50):
        scheduler.add(asked("flood", 8, 2))
    served: Counter[str] = Counter()
    for _ in range(4):
        step(scheduler, served)
    scheduler.add(asked("late", 8, 2))
    for _ in range(4):
        step(scheduler, served)
    assert served["late"] == 9


def test_who_was_away_has_saved_up_nothing() -> None:
    scheduler = Scheduler(Limits(16, 1, 1000, 100), BlockAllocator(BLOCKS, BLOCK))
    served: Counter[str] = Counter()
    for _ in range(20):
        scheduler.add(asked("busy", 8, 2))
        step(scheduler, served)
        step(scheduler, served)
    for adapter in ("busy", "back") * 10:
        scheduler.add(asked(adapter, 8, 2))
    before = served["busy"]
    for _ in range(20):
        step(scheduler, served)
    assert abs(served["busy"] - before - served["back"]) <= 9


def fill(scheduler: Scheduler, adapter: str) -> int:
    """How many of an adapter's requests are taken, until one is refused."""
    for taken in range(scheduler.limits.max_waiting + 1):
        try:
            scheduler.add(asked(adapter, 3, 3))
        except Overloaded:
            return taken
    raise AssertionError("the queue has no end")


def test_one_flood_leaves_places_in_the_queue_and_three_do_too() -> None:
    scheduler = Scheduler(Limits(16, 1, 100, 100), BlockAllocator(BLOCKS, BLOCK))
    taken = [fill(scheduler, f"flood {index}") for index in range(4)]
    assert taken[0] == 67
    assert all(taken)
    with pytest.raises(Overloaded, match=r"requests wait already, 67 of them for this adapter, of at most 100"):
        scheduler.add(asked("flood 0", 3, 3))


@given(
    per_second=st.floats(0.1, 10_000),
    amount=st.floats(0, 1e6),
    busy_s=st.integers(1, 60),
)
def test_how_long_more_takes_follows_from_how_long_it_took(per_second: float, amount: float, busy_s: int) -> None:
    now = 0.0
    pace = Pace(clock=lambda: now)
    assert pace.wait_s(amount) == 1
    for _ in range(busy_s * 10):
        pace.did(per_second / 10)
        now += 0.1
    pace.did(per_second / 10)
    wanted = amount / per_second
    assert max(1, math.floor(0.9 * min(wanted, 60))) <= pace.wait_s(amount) <= max(1, min(60, math.ceil(1.1 * wanted)))
    now += 1000
    assert pace.wait_s(amount) == 1
