"""Whether a worker's training loop still moves; if not, where it stands."""

import os
import sys
import threading
import time
import traceback
from typing import Any

import ray

from jobs.progress import Stall

STILL_S = 80.0
"""A loop that has not moved for so long, and for five times its slowest move, hangs: told within two minutes."""

FIRST_STEP_S = 600.0
"""What the first step may take: kernels are compiled in it."""

GRACE_S = 10.0
"""From the report to the process's end, so that the driver has heard of all ranks."""

_FRAMES = 4
_EXIT = 70


class Watchdog:
    """A thread beside the training loop, whose thread makes it.

    The loop says with `mark` what it is about to do. A hung collective waits in C++ and can be neither interrupted nor
    asked, so a loop that stands still is told to the board and its process ended: its workers start again elsewhere.
    """

    def __init__(self, board: Any, rank: int) -> None:
        self._board = board
        self._rank = rank
        self._loop = threading.get_ident()
        self._doing: str | None = None
        self._marked_at = time.monotonic()
        self._slowest_s = 0.0
        self._is_first = True
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def mark(self, doing: str) -> None:
        """The loop moves on, to this."""
        now = time.monotonic()
        if self._doing is not None and not self._is_first:
            self._slowest_s = max(self._slowest_s, now - self._marked_at)
        self._doing, self._marked_at = doing, now

    def step_done(self) -> None:
        """A whole step has been made, so what comes is no longer a first time."""
        self._is_first = False

    def pause(self) -> None:
        """What comes may take as long as it takes."""
        self._doing = None

    def close(self) -> None:
        """End the watch."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            limit_s = FIRST_STEP_S if self._is_first else max(STILL_S, 5 * self._slowest_s)
            doing, marked_at = self._doing, self._marked_at
            still_s = time.monotonic() - marked_at
            if doing is None or still_s < limit_s:
                continue
            stall = Stall(self._rank, still_s, doing, self._stack())
            ray.get(self._board.stalled.remote(stall))
            self._ended.wait(GRACE_S)
            if marked_at == self._marked_at:
                os._exit(_EXIT)

    def _stack(self) -> str:
        frames = traceback.extract_stack(sys._current_frames()[self._loop])[-_FRAMES:]
        return " > ".join(f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames)
