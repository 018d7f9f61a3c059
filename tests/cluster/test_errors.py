"""Errors survive what happens to them: a pickle, a Ray hop, a process exit."""

import pickle

import pytest

from cluster import errors
from cluster.errors import ConfigError, Fault, LuthierError, Overloaded, exit_code


def classes(root: type[LuthierError] = LuthierError) -> list[type[LuthierError]]:
    return [root, *(found for child in root.__subclasses__() for found in classes(child))]


def example(kind: type[LuthierError]) -> LuthierError:
    if kind is ConfigError:
        return ConfigError([Fault("a.yaml:1", "key", "wrong")])
    return kind("the value, the place, the next step")


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_error_survives_a_pickle(kind: type[LuthierError]) -> None:
    error = example(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert exit_code(copy) in (1, 2)


def test_overloaded_keeps_its_wait() -> None:
    assert pickle.loads(pickle.dumps(Overloaded("full", 7))).retry_after_s == 7


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn = errors.__doc__ or ""
    assert {kind.__name__ for kind in classes()} == {word for word in drawn.split() if hasattr(errors, word)} - {
        "Fault"
    }
