"""The routing policy, alone and on made traffic beside a model of Serve's own router."""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.adapters import HALF_LIFE
from serving.popularity import Popularity
from serving.routing import LOADS_HALF_LIFE, TIE_TOKENS, Candidate, cost_of_loading, rank

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


@given(candidates, st.sampled_from(["a", "b", ""]), st.integers(0, 50))
def test_the_first_costs_about_the_least_of_waiting_and_loading(
    some: list[Candidate], adapter: str, under_way: int
) -> None:
    order = rank(some, adapter, under_way)
    assert sorted(order) == sorted(each.id for each in some)
    cost = cost_of_loading(some, under_way)
    waits = {each.id: each.load + (cost if adapter and adapter not in each.holds else 0) for each in some}
    if some:
        assert waits[order[0]] <= min(waits.values()) + TIE_TOKENS


@given(candidates, st.integers(0, 20))
def test_who_shares_a_load_moves_sooner_and_a_longer_queue_everywhere_moves_nobody(
    some: list[Candidate], under_way: int
) -> None:
    longer = [Candidate(each.id, each.load + 1000, each.holds) for each in some]
    assert cost_of_loading(some, under_way + 1) < cost_of_loading(some, under_way)
    assert not some or cost_of_loading(longer, under_way) > cost_of_loading(some, under_way)


def test_a_replica_that_goes_moves_only_its_own_adapters() -> None:
    replicas = [Candidate(f"r{index}", 0.0, frozenset()) for index in range(5)]
    for adapter in map(str, range(200)):
        before, after = rank(replicas, adapter), rank(replicas[:-1], adapter)
        assert [each for each in before if each != "r4"] == after


@dataclass
class Replica:
    """Does `RATE` tokens a second, one after another, and holds as many adapters as fit.

    Out goes the least wanted (adapters.py), or what was longest not asked for, as with @serve.multiplexed.
    """

    slots: int
    is_ours: bool
    asked: int = 0
    all_asked: int = 0  # of all replicas
    free_at: float = 0.0
    done: float = 0.0
    held: set[str] = field(default_factory=set)
    colds: int = 0

    def __post_init__(self) -> None:
        self.popularity = Popularity(HALF_LIFE * self.slots if self.is_ours else 1.0, lambda: self.asked)
        self.loads = Popularity(LOADS_HALF_LIFE, lambda: self.all_asked)

    def loads_lately(self, asked: int) -> float:
        self.all_asked = asked
        return self.loads.of("")

    def take(self, now: float, adapter: str, cost: float) -> float:
        self.asked += 1
        self.popularity.count(adapter)
        if adapter not in self.held:
            self.colds += 1
            self.loads.count("")
            if len(self.held) >= self.slots:
                self.held.remove(min(self.held, key=self.popularity.of))
            self.held.add(adapter)
        self.done += cost
        self.free_at = max(self.free_at, now) + cost / RATE
        return self.free_at


RATE = 1000.0
Router = Callable[[list[Replica], list[Counter[str]], list[float], str, random.Random], int]


def ours(
    replicas: list[Replica], queues: list[Counter[str]], loads: list[float], adapter: str, _: random.Random
) -> int:
    asked = sum(each.asked for each in replicas)
    some = [
        Candidate(str(index), loads[index], frozenset(each.held), each.loads_lately(asked))
        for index, each in enumerate(replicas)
    ]
    return int(rank(some, adapter, sum(each[adapter] for each in queues))[0])


def serves(
    replicas: list[Replica], queues: list[Counter[str]], _: list[float], adapter: str, draw: random.Random
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


ADAPTERS = ["hot", *(f"cold{number}" for number in range(99))]


def weights(hot_share: float) -> list[float]:
    """How often each is asked for: one hot adapter, the rest by Zipf's law."""
    cold = [1 / rank_ for rank_ in range(1, len(ADAPTERS))]
    return [hot_share, *((1 - hot_share) * each / sum(cold) for each in cold)]


def simulate(router: Router, hot_share: float, slots: int, seed: int, requests: int = 10_000) -> Outcome:
    """Four replicas at 80 % of what they can do."""
    draw = random.Random(seed)
    replicas = [Replica(slots, router is ours) for _ in range(4)]
    queues: list[Counter[str]] = [Counter() for _ in replicas]
    loads = [0.0] * 4
    running: list[tuple[float, int, int, str, float]] = []
    now = waited = 0.0
    shares = list(accumulate(weights(hot_share)))
    for index in range(requests):
        cost = draw.uniform(50, 350)
        now += draw.expovariate(0.8 * 4 * RATE / 200)
        while running and running[0][0] <= now:
            _, _, where, ended, tokens = heapq.heappop(running)
            queues[where][ended] -= 1
            loads[where] -= tokens
        adapter = draw.choices(ADAPTERS, cum_weights=shares)[0]
        where = router(replicas, queues, loads, adapter, draw)
        ends = replicas[where].take(now, adapter, cost)
        waited += ends - now
        queues[where][adapter] += 1
        loads[where] += cost
        heapq.heappush(running, (ends, index, where, adapter, cost))
    done = [each.done for each in replicas]
    return Outcome(max(done) / (sum(done) / 4), sum(each.colds for each in replicas), waited / requests)


def best_placement(hot_share: float, places: int, requests: int) -> float:
    """What is loaded, on average, when the most wanted that fit are known and stay, one place each: they once, and the
    others at each request. Without foresight nothing does better for long, when requests do not depend on each other
    (Aho, Denning & Ullman 1971)."""
    return places + requests * sum(sorted(weights(hot_share))[:-places])


@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("hot_share", [0.0, 0.3, 0.6, 0.9])
def test_a_hot_adapter_spreads_and_cold_ones_stay(hot_share: float, slots: int) -> None:
    """Serve's router lets the queue of a replica that holds an adapter grow to its end; that is what requests wait for
    there. Half of its loads is less than what the best placement has."""
    mine = simulate(ours, hot_share, slots, seed=1)
    theirs = simulate(serves, hot_share, slots, seed=1)
    assert mine.max_over_mean <= 1.25
    assert mine.colds <= 0.97 * theirs.colds
    assert mine.colds <= 1.35 * best_placement(hot_share, 4 * slots, 10_000)
    assert mine.mean_wait_s <= 0.45 * theirs.mean_wait_s


@pytest.mark.parametrize("hot_share", [0.0, 0.3, 0.6, 0.9])
def test_where_all_adapters_fit_they_are_loaded_about_once(hot_share: float) -> None:
    mine = simulate(ours, hot_share, 32, seed=1)
    assert mine.colds <= 1.1 * len(ADAPTERS)
