"""The order of samples: nothing lost, nothing twice, the same on any number of workers and any version of numpy."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError
from jobs.packing import Ids, SampleSchedule, order, packs, share

CAPACITY = 64
schedules = st.builds(
    SampleSchedule,
    st.lists(st.integers(1, CAPACITY), min_size=1, max_size=300),
    seed=st.integers(0, 2**63),
    capacity=st.just(CAPACITY),
    packing=st.booleans(),
    global_batch=st.integers(1, 40),
)


def samples(packed: list[Ids]) -> list[int]:
    return [int(sample) for pack in packed for sample in pack]


def test_the_order_is_what_it_was_when_runs_were_started() -> None:
    """A change here, by us or by numpy, would make resumed runs read other samples."""
    assert order(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert order(8, seed=1, epoch=2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]


@given(st.integers(0, 500), st.integers(0, 2**63), st.integers(0, 1000))
def test_an_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(order(count, seed, epoch).tolist()) == list(range(count))


def test_orders_differ_between_epochs_and_seeds() -> None:
    seen = {tuple(order(100, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(seen) == 100


@given(schedules, st.integers(0, 5))
def test_an_epoch_holds_every_sample_once(schedule: SampleSchedule, epoch: int) -> None:
    first = epoch * schedule.steps_per_epoch
    read = [sample for step in range(schedule.steps_per_epoch) for sample in samples(schedule.batch(first + step))]
    assert sorted(read) == list(range(len(read)))
    assert len(read) == sum(len(pack) for pack in schedule.packs)


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=300), st.booleans())
def test_no_pack_overflows_and_no_sample_is_lost(lengths: list[int], packing: bool) -> None:
    made = packs(lengths, order(len(lengths), 1, 1), CAPACITY, packing)
    assert sorted(samples(made)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in pack) <= CAPACITY for pack in made)
    if not packing:
        assert all(len(pack) == 1 for pack in made)


@settings(max_examples=50)
@given(schedules, st.integers(0, 400), st.integers(1, 9))
def test_any_number_of_workers_reads_the_same_step(schedule: SampleSchedule, step: int, world_size: int) -> None:
    batch = schedule.batch(step)
    shares = [schedule.share(step, rank, world_size) for rank in range(world_size)]
    assert Counter(sample for mine in shares for sample in samples(mine)) == Counter(samples(batch))
    assert {len(mine) for mine in shares} == {-(-len(batch) // world_size)}


@given(schedules, st.integers(0, 1000))
def test_any_step_is_found_without_the_ones_before(schedule: SampleSchedule, step: int) -> None:
    """A resumed run, whose schedule has seen no step, reads what the first would have read next."""
    fresh = pickle.loads(pickle.dumps(schedule))
    schedule.batch(0)
    schedule.batch(step + schedule.steps_per_epoch)
    assert [pack.tolist() for pack in schedule.batch(step)] == [pack.tolist() for pack in fresh.batch(step)]


def test_epochs_follow_one_another_in_other_orders() -> None:
    schedule = SampleSchedule([8] * 1000, seed=3, capacity=32, packing=True, global_batch=16)
    assert schedule.steps_per_epoch == 16
    assert len(schedule.batch(15)) == 250 - 15 * 16  # the rest of the epoch, neither dropped nor filled up
    assert [schedule.epoch(step) for step in (0, 15, 16)] == [0, 0, 1]
    first, second = (samples(schedule.batch(step)) for step in (0, 16))
    assert first != second


def test_packs_mix_samples_from_all_over_the_file() -> None:
    schedule = SampleSchedule([8] * 1000, seed=3, capacity=32)
    apart = [int(np.ptp(pack)) for pack in schedule.packs]
    assert np.mean(apart) > 300  # neighbours in the file would be 3 apart; evenly drawn fours are 600


@pytest.mark.parametrize(
    ("draw", "capacity", "at_least"),
    [("lognormal", 2048, 0.995), ("uniform", 512, 0.985), ("short", 512, 0.995), ("two thirds", 512, 0.66)],
)
def test_packs_are_full(draw: str, capacity: int, at_least: float) -> None:
    """On lengths as data sets have them. Two thirds of a pack each cannot share one: there the best is no better."""
    random = np.random.default_rng(0)
    lengths = {
        "lognormal": np.clip(random.lognormal(5, 1, 50_000), 8, 2048).astype(int),
        "uniform": random.integers(1, 513, 50_000),
        "short": random.integers(4, 40, 50_000),
        "two thirds": random.integers(330, 350, 5_000),
    }[draw]
    assert SampleSchedule(lengths, seed=0, capacity=capacity).fill > at_least


def test_at_most_256_packs_are_open() -> None:
    """What bounds the search, and how far apart in the order the samples of a pack can be."""
    made = packs([40] * 300 + [24] * 300, np.arange(600), CAPACITY, packing=True)
    assert sorted(Counter(map(len, made)).items()) == [(1, 44), (2, 256 + 22)]


def test_shares_are_balanced() -> None:
    random = np.random.default_rng(0)
    schedule = SampleSchedule(random.integers(1, 2049, 4096), seed=0, capacity=2048, packing=False, global_batch=64)
    for step in range(schedule.steps_per_epoch):
        tokens = [sum(schedule.tokens(pack) for pack in schedule.share(step, rank, 4)) for rank in range(4)]
        assert max(tokens) < 1.05 * min(tokens)


def test_more_workers_than_packs_leaves_some_with_nothing() -> None:
    batch = [np.array([7]), np.array([8])]
    shares = [share(batch, [5, 9], rank, 3) for rank in range(3)]
    assert [samples(mine) for mine in shares] == [[8], [7], []]
    assert all(len(mine) == 1 for mine in shares)


def test_a_sample_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(DataError, match="sample 1 has 65 tokens, more than a pack's 64"):
        SampleSchedule([3, 65], seed=0, capacity=64)


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="no samples to train on"):
        SampleSchedule([], seed=0, capacity=64)


def test_seven_workers_share_a_batch_of_sixty_four() -> None:
    """All samples once, as many rounds for every rank, and none of them far ahead."""
    schedule = SampleSchedule(np.full(1000, 10), seed=3, capacity=40, global_batch=64)
    shares = [schedule.share(2, rank, 7) for rank in range(7)]
    assert {len(mine) for mine in shares} == {10}
    taken = sorted(int(sample) for mine in shares for pack in mine for sample in pack)
    assert taken == sorted(int(sample) for pack in schedule.batch(2) for sample in pack)
    assert {sum(len(pack) > 0 for pack in mine) for mine in shares} == {9, 10}
