"""The routing policy, alone and on made traffic beside a model of Serve's own router."""

import heapq
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.routing import COLD_TOKENS, SLACK, Candidate, rank

candidates = st.lists(
    st.builds(
        Candidate,
        id=st.uuids().map(str),
        load=st.integers(0, 1000).map(float),
        holds=st.frozensets(st.sampled_from("abc")),
    ),
    max_size=6,
    unique_by=lambda each: each.id,
)


@given(candidates, st.sampled_from(["a", "b", ""]))
def test_the_first_costs_about_the_least_of_waiting_and_loading(some: list[Candidate], adapter: str) -> None:
    order = rank(some, adapter)
    assert sorted(order) == sorted(each.id for each in some)
    waits = {each.id: each.load + (COLD_TOKENS if adapter and adapter not in each.holds else 0) for each in some}
    if some:
        assert waits[order[0]] <= min(waits.values()) + SLACK * COLD_TOKENS


def test_a_replica_that_goes_moves_only_its_own_adapters() -> None:
    replicas = [Candidate(f"r{index}", 0.0, frozenset()) for index in range(5)]
    for adapter in map(str, range(200)):
        before, after = rank(replicas, adapter), rank(replicas[:-1], adapter)
        assert [each for each in before if each != "r4"] == after


@dataclass
class Replica:
    """Does `RATE` tokens a second, one after another, and holds as many adapters as fit, the least used out first."""

    slots: int
    free_at: float = 0.0
    done: float = 0.0
    held: OrderedDict[str, None] = field(default_factory=OrderedDict)
    colds: int = 0

    def take(self, now: float, adapter: str, cost: float) -> float:
        if adapter not in self.held:
            self.colds += 1
            self.held[adapter] = None
            if len(self.held) > self.slots:
                self.held.popitem(last=False)
        self.held.move_to_end(adapter)
        self.done += cost
        self.free_at = max(self.free_at, now) + cost / RATE
        return self.free_at


RATE = 1000.0
Router = Callable[[list[Replica], list[Counter[int]], list[float], str, float, random.Random], int]


def ours(
    replicas: list[Replica], _: list[Counter[int]], loads: list[float], adapter: str, cost: float, __: random.Random
) -> int:
    some = [Candidate(str(index), loads[index], frozenset(each.held)) for index, each in enumerate(replicas)]
    return int(rank(some, adapter)[0])


def serves(
    replicas: list[Replica], queues: list[Counter[int]], __: list[float], adapter: str, ___: float, draw: random.Random
) -> int:
    """Ray 2.60: two at random of those that hold the model and do not reject, else of those with the fewest models,
    else of all; of the two, the one with fewer requests."""
    open_ = [index for index in range(len(replicas)) if queues[index].total() < MAX_ONGOING]
    holders = [index for index in open_ if adapter in replicas[index].held]
    fewest = min(len(each.held) for each in replicas)
    few = [index for index in open_ if len(replicas[index].held) == fewest]
    chosen = holders or few or open_ or list(range(len(replicas)))
    return min(draw.sample(chosen, min(2, len(chosen))), key=lambda index: queues[index].total())


MAX_ONGOING = 64


@dataclass(frozen=True)
class Outcome:
    max_over_mean: float
    colds: int
    mean_wait_s: float


def simulate(router: Router, hot_share: float, slots: int, seed: int, requests: int = 20_000) -> Outcome:
    """Four replicas at 80 % of what they can do; one hot adapter, the rest by Zipf's law over 99."""
    draw = random.Random(seed)
    replicas = [Replica(slots) for _ in range(4)]
    queues: list[Counter[int]] = [Counter() for _ in replicas]
    loads = [0.0] * 4
    running: list[tuple[float, int, int, float]] = []
    weights = [1 / rank_ for rank_ in range(1, 100)]
    now = waited = 0.0
    for index in range(requests):
        cost = draw.uniform(50, 350)
        now += draw.expovariate(0.8 * 4 * RATE / 200)
        while running and running[0][0] <= now:
            _, ended, where, tokens = heapq.heappop(running)
            del queues[where][ended]
            loads[where] -= tokens
        adapter = "hot" if draw.random() < hot_share else f"cold{draw.choices(range(99), weights)[0]}"
        where = router(replicas, queues, loads, adapter, cost, draw)
        ends = replicas[where].take(now, adapter, cost)
        waited += ends - now
        queues[where][index] = 1
        loads[where] += cost
        heapq.heappush(running, (ends, index, where, cost))
    done = [each.done for each in replicas]
    return Outcome(max(done) / (sum(done) / 4), sum(each.colds for each in replicas), waited / requests)


@pytest.mark.parametrize("slots", [8, 16, 32])
@pytest.mark.parametrize("hot_share", [0.3, 0.6, 0.9])
def test_a_hot_adapter_spreads_and_cold_ones_stay(hot_share: float, slots: int) -> None:
    """Serve's router loads about as seldom, since it lets the queue of a replica that holds an adapter grow to its end;
    that is what requests wait for there."""
    mine = simulate(ours, hot_share, slots, seed=1)
    theirs = simulate(serves, hot_share, slots, seed=1)
    assert mine.max_over_mean <= 1.25
    assert mine.colds <= 1.5 * theirs.colds
    assert mine.mean_wait_s <= 0.5 * theirs.mean_wait_s
