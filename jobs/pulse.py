"""The driver's own life: it says that it lives, and hands on what people ask of the run."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from cluster.errors import StoreError
from cluster.logs import say
from cluster.store import Store
from jobs import runs

LOOK_S = 2.0
"""How soon a stop request is seen; each look lists a few keys."""

_TICK_S = 0.25  # `ray job stop` gives three seconds in all


class Pulse:
    """A thread beside a run's training, from `with` to its end.

    A heartbeat every 10 s; a first stop request, or SIGTERM (which is what `ray job stop` sends), makes the workers
    save and stop; a second request interrupts the driver at once. A store that is down for a while is sat out.
    """

    def __init__(self, store: Store, run_id: str, board: Any) -> None:
        self._store = store
        self._run_id = run_id
        self._board = board
        self._ended = threading.Event()
        self._terminated = threading.Event()
        self._thread = threading.Thread(target=self._run, name="luthier-pulse", daemon=True)
        self._earlier: Any = None

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

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signal's signature
        self._terminated.set()

    def _run(self) -> None:
        is_asked = False
        beaten_at = looked_at = float("-inf")
        while not self._ended.wait(_TICK_S):
            if self._terminated.is_set() and not is_asked:
                is_asked = self._stop("SIGTERM")
            now = time.monotonic()
            if now - looked_at < LOOK_S:
                continue
            looked_at = now
            try:
                if now - beaten_at > runs.HEARTBEAT_S:
                    runs.beat(self._store, self._run_id)
                    beaten_at = now
                requests = runs.stop_requests(self._store, self._run_id)
            except StoreError as error:
                say(f"warning: the store does not answer, so nobody sees that this run lives: {error}")
                continue
            if requests and not is_asked:
                is_asked = self._stop("a stop request")
            if requests > 1:
                say("a second stop request: stopping at once")
                signal.raise_signal(signal.SIGINT)  # Ray Train ends its workers on it
                return

    def _stop(self, why: str) -> bool:
        say(f"{why}: the run saves its state after the current step, and stops")
        self._board.stop.remote()
        return True
