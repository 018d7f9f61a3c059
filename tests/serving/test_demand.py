"""What replicas were asked for."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.records import AdapterRecord, BaseModelRef
from serving.demand import HALF_LIFE_S, Demand, Stock, Wanted, most_wanted
from serving.popularity import MAX_REMEMBERED
from tests.serving.test_adapters import BASE

OTHER_BASE = BaseModelRef(name="base", revision="r2", licence="apache-2.0")


def record(name: str, base: BaseModelRef = BASE) -> AdapterRecord:
    digest = name.encode().hex().rjust(64, "0")
    return AdapterRecord(name=name, version=1, digest=digest, files=(), base=base, run_id="r", step=1, created_at="")


@given(st.lists(st.sampled_from("abcdef"), min_size=1))
def test_counts_at_one_moment_are_counts(asked: list[str]) -> None:
    demand = Demand(clock=lambda: 1000.0)
    for name in asked:
        demand.count(record(name))
    assert {each.record.name: each.requests for each in demand.wanted()} == Counter(asked)
    assert [each.requests for each in demand.wanted()] == sorted(Counter(asked).values(), reverse=True)


def test_the_last_minutes_count_and_the_morning_is_forgotten() -> None:
    now = 0.0
    demand = Demand(clock=lambda: now)
    for _ in range(8):
        demand.count(record("morning"))
    now = 2 * HALF_LIFE_S
    for _ in range(3):
        demand.count(record("now"))
    assert [(each.record.name, each.requests) for each in demand.wanted()] == [("now", 3.0), ("morning", 2.0)]
    now = 12 * HALF_LIFE_S
    assert demand.wanted() == []


def test_answers_of_all_replicas_are_added_and_another_bases_adapters_are_left_out() -> None:
    first = [Wanted(record("a"), 5.0), Wanted(record("b"), 3.0)]
    second = [Wanted(record("old", OTHER_BASE), 99.0), Wanted(record("b"), 3.0), Wanted(record("c"), 1.0)]
    assert [
        (each.record.name, each.requests)
        for each in most_wanted([Stock(each, frozenset()) for each in (first, second, [])], BASE)
    ] == [
        ("b", 6.0),
        ("a", 5.0),
        ("c", 1.0),
    ]


def test_of_too_many_the_most_wanted_are_remembered() -> None:
    demand = Demand(clock=lambda: 0.0)
    for number in range(3 * MAX_REMEMBERED):
        demand.count(record("wanted"))
        demand.count(record(f"tail{number}"))
    assert len(demand.wanted()) <= MAX_REMEMBERED
    assert demand.wanted()[0] == Wanted(record("wanted"), 3 * MAX_REMEMBERED)
