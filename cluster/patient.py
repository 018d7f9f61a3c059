"""A store that sits out what passes, for a process that must go on in the middle of a long run.

A store that does not answer, expired credentials, a full server or a bucket that is gone end a run only when they
last longer than `limit_s`. It stands around a store that has been opened, so that a wrong address is still told at
once:

    store = PatientStore(open_store(url), limit_s=1800.0, tell=lambda outage: print(outage))

S3Store's own retries come first: in a black hole a single try can take minutes.
"""

import copy
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import TypeVar

from cluster.errors import (
    ConfigError,
    Fault,
    ObjectDamaged,
    ObjectExists,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreUnfit,
)
from cluster.objects import ObjectInfo, check_key
from cluster.records import now
from cluster.store import Store

Result = TypeVar("Result")

_ANSWERS = (ObjectDamaged, ObjectExists, ObjectNotFound, StoreUnfit)
"""What a store says that works. Asking again would not change it."""

# The address was right when the store was opened. A ConfigError after that is a bucket that is gone, or an AWS file
# that is just being replaced.
_PASSING = (StoreError, ConfigError)


@dataclass(frozen=True)
class Outage:
    """A time in which calls failed: from the first failure in any thread to the first of these calls that came through.

    `began_at` is written as records write it (UTC), and `error` is the first failure's message.
    """

    began_at: str
    seconds: float
    error: str


@dataclass
class _Trouble:
    """An outage as it is known so far; times by the monotonic clock."""

    began_at: str
    began: float
    error: str
    ended: float = math.inf
    is_left: bool = False  # a call gave up on it, so perhaps none waits for its end any more


class PatientStore:
    """The objects of another store, for many threads. It does not pickle: what it tells, it tells in this process.

    A call is tried again after StoreUnreachable, StoreDenied, ConfigError and plain StoreError, until `limit_s` seconds
    have passed since its first failure. Then the last error is raised, and says so.
    """

    def __init__(
        self,
        store: Store,
        limit_s: float,
        tell: Callable[[Outage], None] | None = None,
        cancelled: threading.Event | None = None,
        pauses: tuple[float, float] = (1.0, 15.0),
    ) -> None:
        """Sends nothing.

        Args:
            tell: called once for each outage, when it is over, in a thread whose call came through again. It may use
                this store. What it raises, that call raises.
            cancelled: once it is set no call is tried again, and one that waits raises its last error at once.
            pauses: the wait before the first new try, which doubles with each, and the longest; in seconds.
        """
        self.url = store.url
        self._store = store
        self._limit_s = limit_s
        self._tell = tell
        self._cancelled = threading.Event() if cancelled is None else cancelled
        self._pauses = pauses
        self._opening = threading.Lock()
        self._opened = -math.inf  # when the last opening began
        self._lock = threading.Lock()
        self._latest: _Trouble | None = None

    def impatient(self) -> Store:
        return self._store.impatient()

    def create(self, key: str, data: bytes) -> None:
        """As Store.create. Of equal bytes it must not matter who wrote them, which holds for Luthier's records.

        A try that failed may have won, and its repetition is then told that the object is there. So ObjectExists after
        a failure counts as won if the object holds just these bytes; without a failure it never does.
        """
        check_key(key)
        is_unsure = False

        def create(store: Store) -> None:
            nonlocal is_unsure
            try:
                store.create(key, data)
            except ObjectExists:
                if not is_unsure or store.get(key) != data:
                    raise
            except StoreError:  # even StoreDenied: credentials can expire between the write and the look at its result
                is_unsure = True
                raise

        self._patiently(create)

    def put(self, key: str, data: bytes) -> None:
        check_key(key)
        self._patiently(lambda store: store.put(key, data))

    def get(self, key: str) -> bytes:
        check_key(key)
        return self._patiently(lambda store: store.get(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As Store.list, but whole before the first is given: a listing that breaks off begins anew."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        return iter(self._patiently(lambda store: tuple(store.list(prefix))))

    def delete(self, key: str) -> None:
        check_key(key)
        self._patiently(lambda store: store.delete(key))

    def exists(self, key: str) -> bool:
        check_key(key)
        return self._patiently(lambda store: store.exists(key))

    def upload(self, source: Path | mmap, key: str) -> None:
        check_key(key)
        self._patiently(lambda store: store.upload(source, key))

    def download(self, key: str, path: Path) -> str:
        check_key(key)
        return self._patiently(lambda store: store.download(key, path))

    def _patiently(self, call: Callable[[Store], Result]) -> Result:
        # A key that cannot be one is a plain StoreError too, so every method has checked its key before.
        pause_s, longest_s = self._pauses
        failed = math.inf  # when this call first did
        trouble: _Trouble | None = None
        is_stale = False
        try:
            while True:
                tried = time.monotonic()
                try:
                    if is_stale:
                        self._open_again(tried)
                    result = call(self._store)
                except _ANSWERS:
                    self._came_through(trouble)
                    raise
                except _PASSING as error:
                    failed = min(failed, time.monotonic())
                    trouble = self._failed(tried, error)
                    left_s = failed + self._limit_s - time.monotonic()
                    if left_s <= 0.0 or self._cancelled.wait(min(pause_s, left_s)):
                        raise _lasting(error, time.monotonic() - failed) from error
                    pause_s = min(2.0 * pause_s, longest_s)
                    is_stale = isinstance(error, (StoreDenied, ConfigError))
                else:
                    self._came_through(trouble)
                    return result
        finally:
            if trouble is not None:
                trouble.is_left = True

    def _open_again(self, tried: float) -> None:
        """Read the AWS variables and files anew, unless another thread did so since `tried`."""
        with self._opening:
            if self._opened < tried:
                began = time.monotonic()
                self._store = copy.copy(self._store)  # a store is copied, as it is pickled, by its address
                self._opened = began

    def _failed(self, tried: float, error: Exception) -> _Trouble:
        """The outage that a try belongs to which began at `tried`: the latest, unless that was over by then."""
        with self._lock:
            if self._latest is None or tried > self._latest.ended:
                self._latest = _Trouble(now(), time.monotonic(), str(error))
            return self._latest

    def _came_through(self, trouble: _Trouble | None) -> None:
        """End the outage that this call was in, or one that others gave up on, and tell it if nobody has."""
        with self._lock:
            if trouble is None and self._latest is not None and self._latest.is_left:
                trouble = self._latest
            if trouble is None or trouble.ended < math.inf:
                return
            trouble.ended = time.monotonic()
        if self._tell is not None:
            self._tell(Outage(trouble.began_at, trouble.ended - trouble.began, trouble.error))


def _lasting(error: StoreError | ConfigError, seconds: float) -> StoreError | ConfigError:
    """The same error, which says for how long it was sat out."""
    waited = f"; it was tried for {seconds:.0f} s"
    if isinstance(error, ConfigError):
        return ConfigError([Fault(fault.place, fault.key, fault.message + waited) for fault in error.faults])
    return type(error)(f"{error}{waited}")
