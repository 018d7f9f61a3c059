"""The queue in front of the engine, fair between adapters: nobody waits for ever behind another one's flood.

Each flow (an adapter, or the bare base) has a counter of the tokens that were computed for it, over its weight; the
flow with the smallest goes first, and within a flow the first to come. This is the weighted Virtual Token Counter of
Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, algorithm 2 and section 4.3): of two flows that
both always have requests waiting, neither gets ahead by more than twice what fits into the engine at once, and no place
is left free while anybody waits. A flow that comes back begins at the level of those that wait, so that it cannot save
up what it did not use.
"""

from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items that wait, by flow."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[tuple[int, Item]]] = {}  # no empty ones
        self._served: dict[str, float] = {}  # tokens over weight, of flows that wait or are above the level
        self._level = 0.0  # of the flow that was served last
        self._arrivals = count()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        """All that wait, flow by flow."""
        return (item for items in self._waiting.values() for _, item in items)

    def length(self, flow: str) -> int:
        """How many of a flow wait."""
        return len(self._waiting.get(flow, ()))

    def add(self, flow: str, item: Item) -> None:
        """To the end of its flow."""
        if flow not in self._waiting:
            lowest = min((self._served[each] for each in self._waiting), default=self._level)
            self._served[flow] = max(self._served.get(flow, 0.0), lowest)
            self._waiting[flow] = deque()
        self._waiting[flow].append((next(self._arrivals), item))

    def head(self) -> Item:
        """Who goes next. Raises ValueError when nobody waits."""
        return self._waiting[self._next()][0][1]

    def pop(self) -> Item:
        """Take the head out. What it costs is for `charge`."""
        flow = self._next()
        self._level = self._served[flow]
        _, item = self._waiting[flow].popleft()
        self._tidy(flow)
        return item

    def remove(self, flow: str, item: Item) -> None:
        """Take one out that gave up waiting."""
        self._waiting[flow] = deque(each for each in self._waiting[flow] if each[1] is not item)
        self._tidy(flow)

    def charge(self, flow: str, tokens: int, weight: float = 1.0) -> None:
        """So many were computed for a flow, or are about to be."""
        self._served[flow] = max(self._served.get(flow, 0.0), self._level) + tokens / weight

    def _next(self) -> str:
        return min(self._waiting, key=lambda flow: (self._served[flow], self._waiting[flow][0][0]))

    def _tidy(self, flow: str) -> None:
        """A counter that is not above the level says no more than the level does."""
        if not self._waiting[flow]:
            del self._waiting[flow]
        for each in [each for each, served in self._served.items() if served <= self._level]:
            if each not in self._waiting:
                del self._served[each]
