"""`model` in a request → what answers: the base, or one version of an adapter. Aliases are live.

    base-name            the base, and nothing else
    name, name@alias     looked up again when the last look is older than half of `refresh_s`
    name@7               a version never changes: looked up once
    base-name:name…      the same, for clients that want to say which base

Store calls block, so they run in threads; however many requests ask at once, one look-up runs. What does not exist is
remembered too, so that a stream of wrong names costs the store nothing, and a name just published is live within
`refresh_s`. What its licences do not permit is refused (permits.py). A version that an alias has moved to is prepared
first (loaded by a replica) while the one before still answers, in the other half of `refresh_s`. While the store does
not answer, the last known answer holds, and the log says so. An adapter of another base is refused, and the base never
answers in an adapter's place.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from cluster import registry
from cluster.errors import (
    AdapterNotFound,
    ConfigError,
    LicenceRefused,
    LuthierError,
    ObjectDamaged,
    StoreError,
    UnknownModel,
)
from cluster.records import AdapterRecord, BaseModelRef
from cluster.store import Store

_MAX_REMEMBERED = 4096
"""Names remembered at once; the one asked for longest ago goes. Bounds what a stream of wrong names can fill."""

_LISTED = 20
"""Adapters that a 404 names."""

_PARALLEL_READS = 16

_log = logging.getLogger(__name__)
Value = TypeVar("Value")


@dataclass(frozen=True)
class ServedModel:
    """One line of /v1/models: an id that a request may use, and since when (seconds since 1970)."""

    id: str
    created: int
    adapter: AdapterRecord | None


async def _nothing(_: object) -> None:
    pass


def _everything(_: object) -> None:
    pass


class _Remembered(Generic[Value]):
    """One looked-up value: at most one look-up runs, and its result, an error included, holds for a while."""

    def __init__(
        self,
        look_up: Callable[[], Value],
        refresh_s: float,
        clock: Callable[[], float],
        prepare: Callable[[Value], Awaitable[None]] = _nothing,
    ) -> None:
        """`prepare` is awaited with a value that takes another one's place, for half of `refresh_s` at most."""
        self._look_up = look_up
        self._patience_s = refresh_s / 2
        self._clock = clock
        self._prepare = prepare
        self._running: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._looked_at = -float("inf")
        self._value: Value | None = None
        self._error: LuthierError | None = None

    async def get(self) -> Value:
        """The value, at most `refresh_s` old. Raises what the look-up raised."""
        if self._preparing is None and self._clock() - self._looked_at >= self._patience_s:
            if self._running is None:
                self._running = asyncio.create_task(self._refresh())
            await asyncio.shield(self._running)
        if self._error is not None:
            raise self._error
        assert self._value is not None, "a look-up gives a value or an error"
        return self._value

    async def _refresh(self) -> None:
        before, began = self._looked_at, self._clock()
        try:
            value = await asyncio.to_thread(self._look_up)
            left_s = before + 2 * self._patience_s - self._clock()
            if self._value is not None and value != self._value and left_s > 0:
                self._preparing = asyncio.create_task(self._change(value, left_s))
            else:
                self._value, self._error = value, None
        except StoreError as error:
            if self._value is None:
                self._error = error
            else:
                _log.warning("the store does not answer; going on with what was known: %s", error)
        except LuthierError as error:
            self._value, self._error = None, error
        finally:
            self._looked_at = began
            self._running = None

    async def _change(self, value: Value, left_s: float) -> None:
        try:
            with suppress(TimeoutError):  # then it is to be live, prepared or not
                async with asyncio.timeout(left_s):
                    await self._prepare(value)
        finally:
            self._value, self._error = value, None
            self._preparing = None


class Resolver:
    """What one served base answers for."""

    def __init__(
        self,
        store: Store,
        base: BaseModelRef,
        refresh_s: float,
        prepare: Callable[[AdapterRecord], Awaitable[None]] | None = None,
        permit: Callable[[AdapterRecord | None], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`prepare` is called with a version that an alias has moved to, before it takes the other's place; `permit`
        raises LicenceRefused for what may not answer, the base (None) included. Without it nothing here answers: what
        is resolved is only held ready."""
        self._prepare = prepare or _nothing
        self._permit = permit or _everything
        self._store = store
        self._base = base
        self._refresh_s = refresh_s
        self._clock = clock
        self._names: OrderedDict[str, _Remembered[AdapterRecord]] = OrderedDict()
        self._records: dict[tuple[str, int], AdapterRecord] = {}
        self._catalogue = _Remembered(self._list, refresh_s, clock)
        self._started = int(time.time())

    async def resolve(self, model: str) -> AdapterRecord | None:
        """The adapter version that answers for `model`; None is the base.

        Raises UnknownModel, which says what there is, and StoreError when the store was never reached for this name.
        """
        if model == self._base.name:
            self._permit(None)
            return None
        prefix, colon, rest = model.partition(":")
        if colon and prefix != self._base.name:
            raise UnknownModel(f"the base here is {self._base.name}, not {prefix!r}; {await self._there_is()}")
        try:
            record = await self._remembered(rest if colon else model).get()
        except (AdapterNotFound, ConfigError):
            raise UnknownModel(f"there is no model {model!r} here; {await self._there_is()}") from None
        if not self._is_ours(record):
            raise UnknownModel(
                f"{record.name}@{record.version} belongs to base {record.base.name} at revision "
                f"{record.base.revision}, and {self._base.name} at {self._base.revision} is served here; "
                "ask where its base is served, or train it anew on this one"
            )
        self._permit(record)
        return record

    async def model(self, name: str) -> ServedModel:
        """What `name` stands for now. Raises as `resolve` does."""
        record = await self.resolve(name)
        return ServedModel(name, _seconds(record.created_at) if record else self._started, record)

    async def models(self) -> list[ServedModel]:
        """The base, and its adapters: by every alias that is set (`name` is the stable one), or by the last version."""
        return [ServedModel(self._base.name, self._started, None), *await self._catalogue.get()]

    def _remembered(self, reference: str) -> _Remembered[AdapterRecord]:
        found = self._names.get(reference)
        if found is None:
            found = _Remembered(lambda: self._look_up(reference), self._refresh_s, self._clock, self._prepare_ours)
            self._names[reference] = found
        self._names.move_to_end(reference)
        while len(self._names) > _MAX_REMEMBERED:
            self._names.popitem(last=False)
        return found

    async def _prepare_ours(self, record: AdapterRecord) -> None:
        """Nothing is loaded that will be refused."""
        if self._is_ours(record) and self._is_permitted(record):
            await self._prepare(record)

    async def _there_is(self) -> str:
        try:
            adapters = [model.id for model in await self._catalogue.get()]
        except StoreError as error:
            return f"base: {self._base.name}; adapters could not be listed: {error}"
        more = f" and {len(adapters) - _LISTED} more (GET /v1/models)" if len(adapters) > _LISTED else ""
        return f"base: {self._base.name}; adapters: {', '.join(adapters[:_LISTED]) or 'none'}{more}"

    def _look_up(self, reference: str) -> AdapterRecord:
        wanted = registry.parse(reference)
        if wanted.version is None:
            return registry.resolve(self._store, reference)
        return self._record(wanted.name, wanted.version)

    def _record(self, name: str, version: int) -> AdapterRecord:
        """The record of a version, which never changes."""
        if (name, version) not in self._records:
            self._records[name, version] = registry.record(self._store, name, version)
        return self._records[name, version]

    def _list(self) -> list[ServedModel]:
        """Every alias of every adapter of this base; runs in a thread."""
        with ThreadPoolExecutor(_PARALLEL_READS, thread_name_prefix="luthier-catalogue") as readers:
            return [model for models in readers.map(self._aliases, registry.names(self._store)) for model in models]

    def _aliases(self, name: str) -> list[ServedModel]:
        try:
            return self._aliases_of(name)
        except ObjectDamaged as error:  # of one adapter; the others are listed all the same
            _log.warning("adapter %s is left out of the list of models: %s", name, error)
            return []

    def _aliases_of(self, name: str) -> list[ServedModel]:
        state = registry.alias_state(self._store, name)
        targets = registry.alias_targets(state) if state else {}
        found = [
            (name if alias == registry.STABLE else f"{name}@{alias}", version)
            for alias, version in sorted(targets.items())
        ]
        if not found:  # published and never promoted: its last version is what there is to ask for
            found = [(f"{name}@{version}", version) for version in registry.version_numbers(self._store, name)[-1:]]
        served = []
        for id_, version in found:
            try:
                record = self._record(name, version)
            except AdapterNotFound as error:  # of one alias; the others are listed all the same
                _log.warning("%s is left out of the list of models: %s", id_, error)
                continue
            if self._is_ours(record) and self._is_permitted(record):
                served.append(ServedModel(id_, _seconds(record.created_at), record))
        return served

    def _is_permitted(self, record: AdapterRecord) -> bool:
        try:
            self._permit(record)
        except LicenceRefused as error:
            _log.warning("%s@%s is left out of the list of models: %s", record.name, record.version, error)
            return False
        return True

    def _is_ours(self, record: AdapterRecord) -> bool:
        return (record.base.name, record.base.revision) == (self._base.name, self._base.revision)


def _seconds(created_at: str) -> int:
    return int(datetime.fromisoformat(created_at).timestamp())
