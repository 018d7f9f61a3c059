"""What a node may do in the store, done on a probe key. Runs on a node."""

import time
from collections.abc import Callable, Mapping

from cluster.doctor.report import StoreReport
from cluster.errors import LuthierError, ObjectExists, StoreError
from cluster.store import Store, open_store

_DATA = b"luthier cluster doctor"


class StoreProbe:
    """Three steps, between which the other nodes take theirs. After one has failed the others do nothing."""

    def __init__(self, url: str, secrets: Mapping[str, str], key: str) -> None:
        self._url, self._secrets, self._key = url, secrets, key
        self._done: dict[str, float] = {}
        self._error: Exception | None = None
        self._unseen: tuple[str, ...] = ()
        self._store: Store

    def write(self) -> StoreReport:
        """Open it, which proves create-if-absent, create an object, and read it."""
        self._do("open", self._open)
        self._do("create", lambda: self._store.create(self._key, _DATA))
        self._do("create if absent", self._create_again)
        self._do("read", self._read)
        self._do("write", lambda: self._store.put(self._key, _DATA))
        return self._report()

    def look(self, keys: Mapping[str, str]) -> StoreReport:
        """Which of the nodes' objects are not there."""
        self._do("list", lambda: self._list(keys))
        return self._report()

    def delete(self) -> StoreReport:
        self._do("delete", self._delete)
        return self._report()

    def _open(self) -> None:
        if self._secrets:
            from cluster.secret import load

            load(self._secrets)
        self._store = open_store(self._url).impatient()

    def _create_again(self) -> None:
        try:
            self._store.create(self._key, _DATA)
        except ObjectExists:
            return
        raise StoreError(f"{self._url} let {self._key} be created twice")

    def _read(self) -> None:
        if self._store.get(self._key) != _DATA:
            raise StoreError(f"{self._url} gives other bytes for {self._key} than were written")

    def _list(self, keys: Mapping[str, str]) -> None:
        there = {item.key for item in self._store.list(self._key.rpartition("/")[0] + "/")}
        self._unseen = tuple(node for node, key in keys.items() if key not in there)

    def _delete(self) -> None:
        self._store.delete(self._key)
        if self._store.exists(self._key):
            raise StoreError(f"{self._url} still has {self._key} after it was deleted")

    def _do(self, what: str, how: Callable[[], None]) -> None:
        if self._error is not None:
            return
        begun = time.perf_counter()
        try:
            how()
        except (LuthierError, ImportError) as error:
            self._error = error
        else:
            self._done[what] = time.perf_counter() - begun

    def _report(self) -> StoreReport:
        error = self._error
        return StoreReport(self._done, str(error) if error else "", type(error).__name__ if error else "", self._unseen)
