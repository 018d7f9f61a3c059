"""How fast work is done, to say how long more of it will take."""

import math
import time
from collections import deque
from collections.abc import Callable

_WINDOW_S = 20.0
_MAX_WAIT_S = 60
"""Whoever is told more would rather ask again: much can change in a minute."""


class Pace:
    """Amounts done over the last seconds. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def did(self, amount: float) -> None:
        """So much was done just now."""
        self._done.append((self._clock(), amount))
        self._sum += amount
        self._forget()

    def wait_s(self, amount: float) -> int:
        """Whole seconds that `amount` more takes at this pace, from 1 to a minute; 1 when nothing is known."""
        self._forget()
        if not self._sum:
            return 1
        elapsed = max(self._clock() - self._done[0][0], 1e-3)
        return max(1, min(math.ceil(amount * elapsed / self._sum), _MAX_WAIT_S))

    def _forget(self) -> None:
        oldest = self._clock() - _WINDOW_S
        while self._done and self._done[0][0] < oldest:
            self._sum -= self._done.popleft()[1]
        if not self._done:
            self._sum = 0.0
