"""The two ends of LRFU, between which the adapter cache works."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serving.popularity import Popularity

asked_lists = st.lists(
    st.sampled_from("abcdef"), min_size=1, max_size=40
)  # beyond, ones and halves of many uses round to the same float


def count_all(asked: list[str], half_life: float) -> Popularity:
    now = 0
    popularity = Popularity(half_life, lambda: now)
    for now, key in enumerate(asked):  # noqa: B007 - the clock reads it
        popularity.count(key)
    return popularity


@given(asked_lists)
def test_a_half_life_of_one_request_orders_by_the_last_use(asked: list[str]) -> None:
    popularity = count_all(asked, 1.0)
    last_use = {key: at for at, key in enumerate(asked)}
    assert sorted(last_use, key=popularity.of) == sorted(last_use, key=lambda key: last_use[key])


@given(asked_lists)
def test_an_endless_half_life_counts(asked: list[str]) -> None:
    popularity = count_all(asked, math.inf)
    assert dict(popularity.most()) == Counter(asked)
    assert popularity.of("never asked for") == 0
