"""Which adapters are in a replica's engine. Stands where @serve.multiplexed would, and keeps what that breaks:

    a load runs once, however many ask for it, and beside the running streams
    an adapter in use is never evicted; the idle one that was used longest ago goes first
    nothing good is evicted for a load that then fails: the newcomer is in before the other leaves
    when all are in use the next to go takes no new requests, so that a busy adapter cannot starve the others
    a failed load tells everyone who waits why; the next request tries anew

An entry's life:   loading ─▶ idle ⇄ held ─▶ leaving (takes no new holders) ─▶ gone
                      └─ failed ─▶ gone

Pure asyncio, in one event loop. The engine has one slot more than `max_adapters`: the newcomer's.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

from cluster.records import AdapterRecord
from serving.downloads import Downloads
from serving.engine.protocol import Engine

SPARE_SLOTS = 1
"""What the engine must hold beyond `max_adapters`."""


class _AbandonedError(Exception):
    """Everyone who waited for a load has gone; it ends before it takes a place."""


@dataclass(eq=False)
class _Entry:
    record: AdapterRecord
    loading: "asyncio.Task[None]" = field(init=False)
    is_loaded: bool = False
    is_leaving: bool = False
    holders: int = 0  # requests that use it or wait for it
    last_used: int = 0


class AdapterCache:
    """The adapters of one engine."""

    def __init__(
        self, engine: Engine, downloads: Downloads, max_adapters: int, on_change: Callable[[], None] = lambda: None
    ) -> None:
        """`on_change` is called whenever the set of loaded adapters has changed."""
        self._engine = engine
        self._downloads = downloads
        self._max_adapters = max_adapters
        self._on_change = on_change
        self._entries: dict[str, _Entry] = {}
        self._places = 0  # taken by what is loaded, or is being loaded into a free place
        self._turn = asyncio.Lock()  # to look for a place: first come, first served
        self._news = asyncio.Event()  # set, and replaced, whenever an entry changes
        self._clock = 0

    @property
    def loaded(self) -> list[AdapterRecord]:
        """What is in the engine now, in the order of asking."""
        return [entry.record for entry in self._entries.values() if entry.is_loaded]

    async def prefetch(self, record: AdapterRecord) -> None:
        """Load an adapter before anybody asks for it. Raises as `hold` does."""
        async with self.hold(record):
            pass

    @asynccontextmanager
    async def hold(self, record: AdapterRecord) -> AsyncIterator[str]:
        """Keep an adapter in the engine, loading it if need be; gives its digest.

        Waits while all places are in use. Raises what the load raised: StoreError, AdapterRefused, Overloaded.
        """
        entry = await self._join(record)
        try:
            await asyncio.shield(entry.loading)  # one caller who leaves must not end the load for the others
            yield record.digest
        finally:
            entry.holders -= 1
            self._clock += 1
            entry.last_used = self._clock
            self._tell()

    async def _join(self, record: AdapterRecord) -> _Entry:
        while True:
            entry = self._entries.get(record.digest)
            if entry is None:
                entry = self._entries[record.digest] = _Entry(record)
                entry.loading = asyncio.create_task(self._load(entry))
                entry.loading.add_done_callback(_retrieve)
            if not entry.is_leaving:
                entry.holders += 1
                return entry
            await self._news.wait()

    async def _load(self, entry: _Entry) -> None:
        digest = entry.record.digest
        try:
            with closing(await asyncio.to_thread(self._downloads.open, entry.record)) as download:
                async with self._turn:
                    victim = await self._find_place(entry)
                    if victim is not None:
                        await self._swap(entry, victim, download.folder)
                if victim is None:
                    await self._fill(digest, download.folder)
            entry.is_loaded = True
        except BaseException:
            del self._entries[digest]
            raise
        finally:
            self._tell()
            self._on_change()

    async def _find_place(self, entry: _Entry) -> _Entry | None:
        """Take a free place (None), or choose the entry to replace: idle, and marked as leaving."""
        victim: _Entry | None = None
        try:
            while self._places >= self._max_adapters:
                if entry.holders == 0:
                    raise _AbandonedError
                loaded = [each for each in self._entries.values() if each.is_loaded]
                idle = [each for each in loaded if each.holders == 0]
                if idle:
                    return self._replace_victim(victim, min(idle, key=lambda each: each.last_used))
                if victim is None and loaded:
                    victim = self._replace_victim(None, loaded[0])  # the oldest: it ends its streams and goes
                await self._news.wait()
        except BaseException:
            self._replace_victim(victim, None)
            raise
        self._replace_victim(victim, None)
        self._places += 1
        return None

    def _replace_victim(self, old: _Entry | None, new: _Entry | None) -> _Entry | None:
        if old is not None:
            old.is_leaving = False
            self._tell()
        if new is not None:
            new.is_leaving = True
        return new

    async def _swap(self, entry: _Entry, victim: _Entry, folder: Path) -> None:
        """Load into the engine's spare slot, then evict. A load that fails leaves the victim where it is."""
        try:
            await self._engine.load_adapter(entry.record.digest, folder)
        except BaseException:
            self._replace_victim(victim, None)
            raise
        del self._entries[victim.record.digest]
        self._tell()
        await self._engine.unload_adapter(victim.record.digest)

    async def _fill(self, digest: str, folder: Path) -> None:
        try:
            await self._engine.load_adapter(digest, folder)
        except BaseException:
            self._places -= 1
            raise

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _retrieve(loading: "asyncio.Task[None]") -> None:
    """Look at a failure, so that asyncio does not report one that nobody waited for."""
    if not loading.cancelled():
        loading.exception()
