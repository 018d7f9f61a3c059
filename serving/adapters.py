"""Which adapters are in a replica's engine. Stands where @serve.multiplexed would, and keeps what that breaks:

    a load runs once, however many ask for it, and beside the running streams
    an adapter in use is never evicted; the idle one that is asked for least goes first
    nothing good is evicted for a load that then fails: the newcomer is in, or at least checked, before others leave
    what the adapters take together never exceeds a budget in bytes; several may leave for one newcomer
    when all are in use the next to go takes no new requests, so that a busy adapter cannot starve the others
    a failed load tells everyone who waits why, and is not tried again for a while if it is the adapter's own fault
    what is pinned is loaded before anybody asks, and stays

An entry's life:   loading ─▶ idle ⇄ held ─▶ leaving (takes no new holders) ─▶ gone
                      └─ failed ─▶ gone

Pure asyncio, in one event loop. The engine has one slot more than `max_adapters`: the newcomer's. With a budget in
bytes one adapter at a time is read, so that beside the budget there is at most one, on its way in.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from traceback import clear_frames

from cluster.errors import AdapterRefused, LuthierError, ObjectDamaged, ObjectNotFound
from cluster.records import AdapterRecord
from serving.downloads import Downloads
from serving.engine.protocol import Engine
from serving.popularity import Popularity

SPARE_SLOTS = 1
"""What the engine must hold beyond `max_adapters`."""


HALF_LIFE = 8.0
"""Requests for each place, after which one counts half. Simulated, four times 16 places: a seventh fewer loads than
"least recently used" has while the same adapters stay popular, and about as many when all popularity is dealt out anew
every 3,000 requests. With a half-life of 300 s, a sixth fewer and a sixth more."""

ITS_OWN_FAULT = (AdapterRefused, ObjectDamaged, ObjectNotFound)
"""What trying again soon would only meet again, at the price of a download."""


class _AbandonedError(Exception):
    """Nobody waits for a load who would have another adapter leave for it; it ends before it takes a place."""


@dataclass(eq=False)
class _Entry:
    record: AdapterRecord
    loading: "asyncio.Task[None]" = field(init=False)
    has_place: bool = False  # it is loaded, or may be
    is_loaded: bool = False
    is_leaving: bool = False
    holders: int = 0  # those who use it or wait for it
    askers: int = 0  # of these, requests; without any it is loaded into free room or not at all
    last_used: int = 0
    num_bytes: int = 0  # of the budget, once it has room


class AdapterCache:
    """The adapters of one engine."""

    def __init__(
        self,
        engine: Engine,
        downloads: Downloads,
        max_adapters: int,
        on_change: Callable[[], None] = lambda: None,
        *,
        max_bytes: int | None = None,
        half_life: float = HALF_LIFE,
        retry_failed_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """An engine with at least one slot more than `max_adapters`.

        Args:
            on_change: called whenever the set of loaded adapters has changed.
            max_bytes: what all adapters may take in the engine together; None: no limit but their number.
            half_life: after how many requests for each place one of them counts half in what is wanted.
        """
        self._engine = engine
        self._downloads = downloads
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._half_life = half_life * max_adapters
        self._popularity = Popularity(self._half_life, lambda: self._asked)
        self._asked = 0  # requests for any adapter
        self._on_change = on_change
        self._retry_failed_s = retry_failed_s
        self._time = clock
        self._failed: dict[str, tuple[float, LuthierError]] = {}  # by digest: until when, and why
        self._pinned: frozenset[str] = frozenset()
        self._entries: dict[str, _Entry] = {}
        self._turn = asyncio.Lock()  # to look for a place: first come, first served
        self._news = asyncio.Event()  # set, and replaced, whenever an entry changes
        self._clock = 0

    @property
    def loaded(self) -> list[AdapterRecord]:
        """What is in the engine now, in the order of asking."""
        return [entry.record for entry in self._entries.values() if entry.is_loaded]

    @property
    def has_place(self) -> bool:
        """Whether another adapter could come without one's leaving, if there is memory for it."""
        return len(self._entries) < self._max_adapters

    @property
    def digests(self) -> frozenset[str]:
        """Of what is in the engine or on its way."""
        return frozenset(self._entries)

    async def prefetch(self, record: AdapterRecord) -> None:
        """Load an adapter that requests are about to ask for, as the first of them would. Raises as `hold` does."""
        async with self.hold(record):
            pass

    async def load_into_room(self, record: AdapterRecord) -> bool:
        """Load an adapter that nobody asked for. False: there is no room for it that is not taken.

        Raises as `hold` does.
        """
        entry = await self._join(record)
        try:
            await asyncio.shield(entry.loading)
        except _AbandonedError:
            return False
        finally:
            self._leave(entry)
        return True

    def pin(self, records: Collection[AdapterRecord]) -> None:
        """From now on evict none of these, until other ones are pinned. Fewer than `max_adapters`: others need a place.

        One that is not loaded is not loaded by this; see `prefetch`.
        """
        assert len(records) < self._max_adapters, "pinned adapters would leave no place for others"
        self._pinned = frozenset(record.digest for record in records)
        self._tell()

    def expect(self, record: AdapterRecord, share: float) -> None:
        """Take an adapter for one that has had this share of all requests for long."""
        self._popularity.count(record.digest, share * self._half_life / math.log(2))

    @property
    def used_bytes(self) -> int:
        """What is taken of the budget."""
        return sum(entry.num_bytes for entry in self._entries.values())

    @asynccontextmanager
    async def hold(self, record: AdapterRecord) -> AsyncIterator[str]:
        """Keep an adapter in the engine, loading it if need be; gives its digest.

        Waits while all places are in use. Raises what the load raised: StoreError, AdapterRefused, Overloaded.
        """
        self._asked += 1
        self._popularity.count(record.digest)
        entry = await self._join_loaded(record)
        try:
            yield record.digest
        finally:
            entry.askers -= 1
            self._leave(entry)

    async def _join_loaded(self, record: AdapterRecord) -> _Entry:
        while True:
            entry = await self._join(record)
            entry.askers += 1
            try:
                await asyncio.shield(entry.loading)  # one caller who leaves must not end the load for the others
            except BaseException as error:
                entry.askers -= 1
                self._leave(entry)
                if not isinstance(error, _AbandonedError):  # by those before; this request came too late to keep it
                    raise
            else:
                return entry

    def _leave(self, entry: _Entry) -> None:
        entry.holders -= 1
        self._clock += 1
        entry.last_used = self._clock
        self._tell()

    async def _join(self, record: AdapterRecord) -> _Entry:
        while True:
            entry = self._entries.get(record.digest)
            if entry is None:
                self._refuse_what_failed(record.digest)
                entry = self._entries[record.digest] = _Entry(record)
                entry.loading = asyncio.create_task(self._load(entry))
                entry.loading.add_done_callback(_retrieve)
            if not entry.is_leaving:
                entry.holders += 1
                return entry
            await self._news.wait()

    def _refuse_what_failed(self, digest: str) -> None:
        now = self._time()
        self._failed = {each: failed for each, failed in self._failed.items() if failed[0] > now}
        if digest in self._failed:
            raise self._failed[digest][1].with_traceback(None)  # or each that is told makes it longer

    async def _load(self, entry: _Entry) -> None:
        digest = entry.record.digest
        try:
            with closing(await asyncio.to_thread(self._downloads.open, entry.record)) as download:
                async with self._turn:
                    victim = await self._next_victim(entry, lambda: self._places < self._max_adapters)
                    entry.has_place = True
                    if victim is not None or self._max_bytes is not None:
                        await self._replace(entry, victim, download.folder)
                if not entry.is_loaded:  # into a free place several may load at the same time
                    await self._engine.load_adapter(digest, download.folder)
                    entry.is_loaded = True
        except BaseException as error:
            del self._entries[digest]
            clear_frames(error.__traceback__)  # or what was read lives in them for as long as the error
            if isinstance(error, ITS_OWN_FAULT):
                self._failed[digest] = self._time() + self._retry_failed_s, error
            raise
        finally:
            self._tell()
            self._on_change()

    @property
    def _places(self) -> int:
        """How many are taken, or promised to what is being loaded."""
        return sum(entry.has_place for entry in self._entries.values())

    async def _replace(self, entry: _Entry, victim: _Entry | None, folder: Path) -> None:
        """Load beside the victim, in the engine's spare slot, then evict it. A load that fails leaves it there."""
        try:
            await self._engine.load_adapter(
                entry.record.digest, folder, lambda num_bytes: self._make_room(entry, num_bytes, victim)
            )
        except BaseException:
            self._stay(victim)
            raise
        entry.is_loaded = True
        if victim is not None and self._places > self._max_adapters:
            await self._evict(victim)
        else:
            self._stay(victim)

    async def _make_room(self, entry: _Entry, num_bytes: int, victim: _Entry | None) -> None:
        """Called by the engine once it knows the size, and that nothing else is wrong: evict until the rest fits."""
        budget = self._max_bytes
        while budget is not None and self.used_bytes + num_bytes > budget:
            kept = sum(each.num_bytes for each in self._entries.values() if self._is_pinned(each))
            if kept + num_bytes > budget:
                raise AdapterRefused(
                    f"{entry.record.name}@{entry.record.version} takes {num_bytes:,} bytes in the engine, and "
                    f"engine.adapter_bytes of {budget:,} leaves {budget - kept:,} beside what is pinned; raise it, pin "
                    "fewer adapters, or train with a lower rank"
                )
            if victim is not None and victim.has_place and not self._is_pinned(victim):
                chosen: _Entry | None = victim
            else:
                chosen = await self._next_victim(entry, lambda: self.used_bytes + num_bytes <= budget)
            if chosen is not None:
                await self._evict(chosen)
        entry.num_bytes = num_bytes

    async def _next_victim(self, entry: _Entry, is_enough: Callable[[], bool]) -> _Entry | None:
        """The least wanted of what is idle, marked as leaving; None when there is room without anybody's leaving.

        While all are in use the least wanted takes no new holders: it ends its streams and goes.
        """
        next_to_go: _Entry | None = None
        try:
            while not is_enough():
                if entry.askers == 0:
                    raise _AbandonedError
                loaded = [each for each in self._entries.values() if each.is_loaded and not self._is_pinned(each)]
                loaded = [each for each in loaded if each is next_to_go or not each.is_leaving]
                idle = [each for each in loaded if each.holders == 0]
                if idle:
                    chosen = min(idle, key=self._worth)
                    chosen.is_leaving = True
                    if chosen is next_to_go:
                        next_to_go = None
                    return chosen
                if next_to_go is None and loaded:
                    next_to_go = min(loaded, key=self._worth)
                    next_to_go.is_leaving = True
                await self._news.wait()
            return None
        finally:
            self._stay(next_to_go)

    def _worth(self, entry: _Entry) -> tuple[float, int]:
        return self._popularity.of(entry.record.digest), entry.last_used

    def _is_pinned(self, entry: _Entry) -> bool:
        return entry.record.digest in self._pinned

    def _stay(self, entry: _Entry | None) -> None:
        """It does not leave after all."""
        if entry is not None:
            entry.is_leaving = False
            self._tell()

    async def _evict(self, entry: _Entry) -> None:
        del self._entries[entry.record.digest]
        entry.is_loaded = entry.has_place = False
        self._tell()
        await self._engine.unload_adapter(entry.record.digest)

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _retrieve(loading: "asyncio.Task[None]") -> None:
    """Look at a failure, so that asyncio does not report one that nobody waited for."""
    if not loading.cancelled():
        loading.exception()
