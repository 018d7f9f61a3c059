"""Which adapters are asked for, and how much: the least wanted leaves the engine first, and a new replica loads the
most wanted before anybody asks it.

    each replica counts ─▶ a new one asks them all ─▶ the most wanted, one after another, while it has places

Nothing depends on it: a replica that nobody answers loads its adapters when requests come, as the first one must.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import LuthierError
from cluster.records import AdapterRecord, BaseModelRef
from serving.adapters import AdapterCache

HALF_LIFE_S = 300.0
"""After which a request counts half: the demand of the last minutes, not of the morning."""

_FORGOTTEN = 0.01

MAX_REMEMBERED = 4096
"""Adapters that are counted; beyond, the less wanted half is forgotten."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """An adapter and how many requests there were for it lately. Survives a Ray hop."""

    record: AdapterRecord
    requests: float


class Demand:
    """What one replica was asked for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counted: dict[str, tuple[AdapterRecord, float, float]] = {}  # by digest: requests, as of when

    def count(self, record: AdapterRecord, requests: float = 1.0) -> None:
        """One more request, or what others were asked for."""
        now = self._clock()
        self._counted[record.digest] = record, requests + self._requests(record.digest, now), now
        if len(self._counted) > MAX_REMEMBERED:
            kept = self.wanted()[: MAX_REMEMBERED // 2]
            self._counted = {each.record.digest: (each.record, each.requests, now) for each in kept}

    def requests(self, digest: str) -> float:
        """How many there were for an adapter lately, loaded or not."""
        return self._requests(digest, self._clock())

    def wanted(self) -> list[Wanted]:
        """The most wanted first; what was last asked for hours ago is forgotten."""
        now = self._clock()
        found = [Wanted(record, self._requests(digest, now)) for digest, (record, _, _) in self._counted.items()]
        found = [each for each in found if each.requests >= _FORGOTTEN]
        self._counted = {each.record.digest: (each.record, each.requests, now) for each in found}
        return sorted(found, key=lambda each: -each.requests)

    def _requests(self, digest: str, now: float) -> float:
        if digest not in self._counted:
            return 0.0
        _, requests, at = self._counted[digest]
        return requests * float(2 ** ((at - now) / HALF_LIFE_S))


def most_wanted(answers: Iterable[Sequence[Wanted]], base: BaseModelRef) -> list[Wanted]:
    """What several replicas were asked for together, of this base, the most wanted first."""
    requests: defaultdict[str, float] = defaultdict(float)
    records: dict[str, AdapterRecord] = {}
    for each in (each for answer in answers for each in answer if each.record.base == base):
        requests[each.record.digest] += each.requests
        records[each.record.digest] = each.record
    found = [Wanted(records[digest], requests[digest]) for digest in requests]
    return sorted(found, key=lambda each: -each.requests)


async def warm(cache: AdapterCache, places: int, wanted: Sequence[AdapterRecord]) -> None:
    """Load what is wanted while there is a free place: what requests bring in meanwhile is not evicted for it."""
    for record in wanted:
        if len(cache.loaded) >= places:
            return
        try:
            await cache.prefetch(record)
        except LuthierError as error:
            _log.warning("%s@%d is not loaded ahead of requests: %s", record.name, record.version, error)
