"""Spot or on-demand, as a pure function of what has failed."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.market import FIRST_S, LONGEST_S, Group, limited, seen, spot_groups

CONFIG = {
    "max_workers": 8,
    "available_node_types": {
        "head": {"max_workers": 0},
        "spot": {"max_workers": 4, "labels": {"ray.io/market-type": "spot"}},
        "on-demand": {"max_workers": 4, "labels": {"ray.io/market-type": "on-demand"}},
    },
}


def test_a_failure_closes_a_group_for_a_while() -> None:
    group = seen(Group(), now=100, failed_at=99)
    assert group.closed_until == 100 + FIRST_S
    assert seen(group, now=130, failed_at=99) == group  # the same failure again is no news
    assert seen(Group(), now=100, failed_at=0) == Group()


def test_it_is_closed_for_longer_while_nothing_changes_and_as_at_first_after_a_success() -> None:
    group, now, closed = Group(), 0.0, []
    for _ in range(8):
        now = group.closed_until + 5  # open again, and the first launch fails
        group = seen(group, now, failed_at=now)
        closed.append(group.closed_until - now)
    assert closed == [60, 120, 240, 480, 900, 900, 900, 900]
    later = group.closed_until + 10 * LONGEST_S  # launches went well for a long time
    assert seen(group, later, failed_at=later).closed_until == later + FIRST_S


def test_failures_of_launches_that_were_under_way_do_not_count_twice() -> None:
    group = seen(Group(), now=100, failed_at=99)
    again = seen(group, now=103, failed_at=102)
    assert (again.closed_until, again.closed_s) == (group.closed_until, group.closed_s)


def test_a_closed_group_keeps_the_nodes_it_has() -> None:
    assert spot_groups(CONFIG) == ["spot"]
    kinds = limited(CONFIG, {"spot": 2})["available_node_types"]
    assert (kinds["spot"]["max_workers"], kinds["on-demand"]["max_workers"]) == (2, 4)
    assert limited(CONFIG, {"spot": 9})["available_node_types"]["spot"]["max_workers"] == 4
    assert limited(CONFIG, {}) == CONFIG


@given(st.lists(st.tuples(st.floats(0.1, 600), st.booleans()), max_size=60))
def test_whatever_fails_no_group_is_closed_for_ever(looks: list[tuple[float, bool]]) -> None:
    group, now = Group(), 0.0
    for step, fails in looks:
        now += step
        group = seen(group, now, failed_at=now if fails else group.failed_at)
        assert group.closed_until <= now + LONGEST_S
        assert not fails or now < group.closed_until
