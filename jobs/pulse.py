"""The driver's own life beside its workers: it says that it lives, and tells them what to do when something changes."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self
from uuid import uuid4

import ray

from cluster import session
from cluster.errors import StoreError
from cluster.logs import say
from cluster.place import ClusterConfig
from cluster.store import Store
from jobs import runs
from jobs.account import Account
from jobs.progress import Stall

LOOK_S = 2.0
"""How soon a stop request, or a node that is about to go, is seen; each look lists a few keys."""

_TICK_S = 0.25  # `ray job stop` gives three seconds in all
_ALL_TOLD_S = 5.0  # from the first rank that says it stands still to the event: the others' reports come meanwhile


class Pulse:
    """A thread beside a run's attempts, from `with` to its end.

    A heartbeat every 10 s; a first stop request, or SIGTERM (which is what `ray job stop` sends), makes the workers
    save and stop; a second request interrupts the driver at once. A node of theirs that is being drained, and room for
    more of them, makes the workers save and move; a limit of hours or money that is reached makes them save and stop. A
    store that is down for a while is sat out.
    """

    def __init__(
        self, store: Store, run_id: str, board: Any, cluster: ClusterConfig, resize_s: float, account: Account
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._board = board
        self._cluster = cluster
        self._resize_s = resize_s
        self._account = account
        self._limit: str | None = None
        self._is_limit_told = False
        self._me = uuid4().hex
        self._ended = threading.Event()
        self._terminated = threading.Event()
        self._thread = threading.Thread(target=self._run, name="luthier-pulse", daemon=True)
        self._earlier: Any = None
        self._wanted = 0  # how many more workers would be welcome; meaningful while an attempt runs
        self._is_watching = False
        self._stalled_at: float | None = None
        self.is_stopping = False
        self.is_replaced = False
        self.moving: str | None = None
        self.hang: str | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._on_terminate)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)

    def watch(self, wanted: int) -> None:
        """An attempt begins; `wanted` more workers would be welcome."""
        self.moving = self.hang = self._stalled_at = None
        self._wanted = wanted
        ray.get(self._board.begin.remote())
        self._account.begin()
        if self.is_stopping:
            self._board.ask.remote("stop")
        self._is_watching = True

    def rest(self) -> None:
        """The attempt has ended."""
        self._is_watching = False
        self._account.end()

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signal's signature
        self._terminated.set()

    def _run(self) -> None:
        beaten_at = looked_at = float("-inf")
        grown_at = time.monotonic()
        while not self._ended.wait(_TICK_S):
            if self._terminated.is_set():
                self._terminated.clear()
                self._stop("SIGTERM")
                self._account.cut()
                looked_at = float("-inf")  # and save at once, for SIGKILL follows within three seconds
            now = time.monotonic()
            if now - looked_at < LOOK_S:
                continue
            looked_at = now
            self._look_at_limits()
            if self._is_watching:
                self._look_at_nodes(now - grown_at > self._resize_s)
                grown_at = now if now - grown_at > self._resize_s else grown_at
            try:
                if now - beaten_at > runs.HEARTBEAT_S:
                    self._beat(is_first=beaten_at == float("-inf"))
                    beaten_at = now
                self._account.save(self._store)
                self._tell_limit()
                requests = runs.stop_requests(self._store, self._run_id)
            except StoreError as error:
                say(f"warning: the store does not answer, so nobody sees that this run lives: {error}")
                continue
            if requests:
                self._stop("a stop request")
            if requests > 1 or self.is_replaced:
                say("another driver has taken the run" if self.is_replaced else "a second stop request: stopping now")
                signal.raise_signal(signal.SIGINT)  # Ray Train ends its workers on it
                return

    def _beat(self, is_first: bool) -> None:
        if not is_first and runs.driver_of(self._store, self._run_id) not in (self._me, None):
            self.is_replaced = True
            return
        runs.beat(self._store, self._run_id, self._me)

    def _stop(self, why: str) -> None:
        if not self.is_stopping:
            say(f"{why}: the run saves its state after the current step, and stops")
            self.is_stopping = True
            self._board.ask.remote("stop")

    def _look_at_limits(self) -> None:
        reached = self._account.look()
        if reached and not self._limit:
            self._limit = reached
            self._stop(reached)

    def _tell_limit(self) -> None:
        """Write the limit that was reached into the run's log, once. Raises StoreError."""
        if self._limit and not self._is_limit_told:
            key = self._limit.partition(" ")[0]
            again = f"`luthier jobs resume {self._run_id} {key}=… --store {self._store.url}` goes on"
            runs.tell(self._store, self._run_id, f"{self._limit}; it saves and stops, and {again}")
            self._is_limit_told = True

    def _look_at_nodes(self, may_grow: bool) -> None:
        nodes, stalls = ray.get(self._board.look.remote())
        self._tell_hang(nodes, stalls)
        if not nodes or self.moving:
            return
        draining = session.draining()
        going = [node for node in set(nodes.values()) if node in draining]
        if going:
            left_s = draining[going[0]]
            deadline = f", and will be gone in {left_s:.0f} s" if left_s is not None else ""
            self._move(f"node {going[0][:8]} is being drained{deadline}")
        elif may_grow and self._wanted and (room := min(self._wanted, session.room(self._cluster))):
            self._move(f"there is room for {room} more worker(s)")

    def _move(self, why: str) -> None:
        say(f"{why}: the workers save their state after the current step, and start again")
        self.moving = why
        self._board.ask.remote("move")

    def _tell_hang(self, nodes: dict[int, str], stalls: list[Stall]) -> None:
        """Name who stands still where, once all who can have said so."""
        if not stalls or self.hang:
            return
        self._stalled_at = self._stalled_at or time.monotonic()
        if time.monotonic() - self._stalled_at < _ALL_TOLD_S:
            return
        silent = sorted(set(nodes) - {stall.rank for stall in stalls})
        said = [f"rank {s.rank} stands at '{s.doing}' since {s.seconds:.0f} s ({s.stack})" for s in stalls]
        said += [f"rank {rank} on node {nodes[rank][:8]} gives no sign" for rank in silent]
        self.hang = "training hangs: " + "; ".join(said)
        say(self.hang)
