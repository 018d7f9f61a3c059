"""Which adapters are asked for, and how much: so that a new replica loads them before anybody asks it (ahead.py)."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.records import AdapterRecord, BaseModelRef
from serving.popularity import MAX_REMEMBERED, Popularity

HALF_LIFE_S = 300.0
"""After which a request counts half: the demand of the last minutes, not of the morning."""


@dataclass(frozen=True)
class Wanted:
    """An adapter and how many requests there were for it lately. Survives a Ray hop."""

    record: AdapterRecord
    requests: float


@dataclass(frozen=True)
class Stock:
    """What one replica was asked for lately, and the digests of what it holds or is loading. Survives a Ray hop."""

    wanted: list[Wanted]
    holds: frozenset[str]


class Demand:
    """What one replica was asked for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._popularity = Popularity(HALF_LIFE_S, clock)
        self._records: dict[str, AdapterRecord] = {}

    def count(self, record: AdapterRecord) -> None:
        """One more request."""
        self._popularity.count(record.digest)
        self._records[record.digest] = record
        if len(self._records) > 2 * MAX_REMEMBERED:
            self.wanted()

    def wanted(self) -> list[Wanted]:
        """The most wanted first; what was last asked for hours ago is forgotten."""
        found = [Wanted(self._records[digest], requests) for digest, requests in self._popularity.most()]
        self._records = {each.record.digest: each.record for each in found}
        return found


def most_wanted(answers: Iterable[Stock], base: BaseModelRef) -> list[Wanted]:
    """What several replicas were asked for together, of this base, the most wanted first."""
    requests: defaultdict[str, float] = defaultdict(float)
    records: dict[str, AdapterRecord] = {}
    for each in (each for answer in answers for each in answer.wanted if each.record.base == base):
        requests[each.record.digest] += each.requests
        records[each.record.digest] = each.record
    found = [Wanted(records[digest], requests[digest]) for digest in requests]
    return sorted(found, key=lambda each: -each.requests)
