"""How far a set is: rows, rows a second, and how long it still takes by the bytes that are left."""

import time
from collections.abc import Callable

EVERY_S = 5.0


class Progress:
    """Says a line now and then. Times are seconds of a clock that only goes forward."""

    def __init__(
        self, total_bytes: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total_bytes
        self._say = say
        self._clock = clock
        self._began = self._last = clock()
        self._rows = 0
        self._skipped = 0

    def skip(self, size: int) -> None:
        """So many bytes need no work: an earlier attempt did them."""
        self._skipped += size

    def done(self, rows: int, bytes_done: int) -> None:
        """So many more rows are done, and so many bytes up to here."""
        self._rows += rows
        now = self._clock()
        if now - self._last < EVERY_S:
            return
        self._last = now
        spent = now - self._began
        fresh = max(0, bytes_done - self._skipped)
        left = f", about {_span(spent * (self._total - bytes_done) / fresh)} left" if fresh else ""
        share = 100 * bytes_done / max(1, self._total)
        self._say(f"data: {self._rows:,} rows, {self._rows / spent:,.0f} rows/s, {share:.0f} %{left}")

    def end(self) -> str:
        """What it came to."""
        spent = max(1e-9, self._clock() - self._began)
        return f"{self._rows:,} rows in {spent:,.1f} s, {self._rows / spent:,.0f} rows/s"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
