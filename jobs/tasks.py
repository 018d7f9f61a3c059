"""Ray tasks of which a few are under way at a time: what they are given never fills the object store."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from cluster.errors import LuthierError

Tag = TypeVar("Tag")


def bounded(calls: Iterable[tuple[Any, Tag]]) -> Iterator[tuple[Any, Tag]]:
    """The results of tasks as they end, each with its tag; a few more are under way than there are CPUs.

    Args:
        calls: (reference, tag); asked for the next one only when there is room for it.

    Raises:
        LuthierError: what a task has raised, without Ray's traceback around it.
    """
    pending: dict[Any, Tag] = {}
    try:
        for reference, tag in calls:
            pending[reference] = tag
            if len(pending) >= 2 + int(ray.cluster_resources().get("CPU", 1)):
                yield _first(pending)
        while pending:
            yield _first(pending)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LuthierError) else error) from None


def _first(pending: dict[Any, Tag]) -> tuple[Any, Tag]:
    done, _ = ray.wait(list(pending), num_returns=1)
    return ray.get(done[0]), pending.pop(done[0])
