"""Time that is held, turned into entries of the ledger: by one driver, for one run.

    meter = Meter("support-…", user="ann", project=None, driver=uuid4().hex)
    meter.hold(lines)      # from now on; [] when nothing is held any more
    meter.cut()            # once a minute: what was held until now becomes entries
    meter.save(store)      # those that are not in the store yet

An entry is made before it is sent, and is kept until the store has it: an outage delays entries, and loses none while
the driver lives. A driver that is killed loses what came after the last cut.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cluster import keys
from cluster.errors import ObjectExists
from cluster.ledger import Entry, Line, Spent, from_ms, spent_in, usd_per_hour
from cluster.store import Store

_DAY_MS = 24 * 3_600_000


class Meter:
    """Used by two threads: who starts and ends workers, and who saves.

    The clock is the computer's as it was at the start, and steady from there on: a clock that is set while a run goes
    on adds no hour to it.
    """

    def __init__(
        self,
        run: str,
        user: str,
        project: str | None,
        driver: str,
        earlier: Spent = Spent(),  # noqa: B008 - it is frozen
        clock: Callable[[], float] = time.monotonic,
        started_ms: int | None = None,
    ) -> None:
        """Sends nothing.

        Args:
            driver: a name that no other driver of the run has.
            earlier: what the run has spent under other drivers.
            started_ms: the time now, in milliseconds since 1970.
        """
        self._named = {"run": run, "user": user, "project": project, "driver": driver}
        self._clock = clock
        self._began_s = clock()
        self._started_ms = round(1000 * time.time()) if started_ms is None else started_ms
        self._lock = threading.Lock()
        self._lines: tuple[Line, ...] = ()
        self._since_ms = 0  # when what is held began; of nothing, when the last thing ended
        self._spent = earlier
        self._unsaved: list[tuple[str, Entry]] = []
        self._number = 0

    def now_ms(self) -> int:
        return self._started_ms + round(1000 * (self._clock() - self._began_s))

    def hold(self, lines: Sequence[Line], since_ms: int | None = None) -> None:
        """From now on, or from a moment since the last change or cut, this is what is held."""
        with self._lock:
            now = self.now_ms()
            at = max(self._since_ms, now if since_ms is None else min(since_ms, now))
            self._close(at)
            self._lines, self._since_ms = tuple(lines), at

    def cut(self) -> None:
        """Make entries of what was held until now."""
        with self._lock:
            self._close(self.now_ms())

    def spent(self) -> Spent:
        """All that the run has spent until now, under earlier drivers too."""
        with self._lock:
            return self._spent + spent_in(self.now_ms() - self._since_ms if self._lines else 0, self._lines)

    def usd_per_hour(self) -> float | None:
        """What is being spent now; None when nothing of it has a price."""
        return usd_per_hour(self._lines)

    def save(self, store: Store) -> None:
        """Write what is not in the store yet, in order. Raises StoreError; then the rest is kept for another call."""
        while self._unsaved:
            key, entry = self._unsaved[0]
            with suppress(ObjectExists):  # an earlier try of ours, whose answer was lost: nobody else makes this key
                store.create(key, entry.to_bytes())
            self._unsaved.pop(0)

    def _close(self, at_ms: int) -> None:
        """End the time that is open: an entry for each of its days."""
        if not self._lines:
            return
        self._spent += spent_in(at_ms - self._since_ms, self._lines)
        while self._since_ms < at_ms:
            until = min(at_ms, (self._since_ms // _DAY_MS + 1) * _DAY_MS)
            entry = Entry(since=from_ms(self._since_ms), until=from_ms(until), lines=self._lines, **self._named)
            self._number += 1
            key = keys.run_usage(entry.day, entry.run, entry.driver, self._number)
            self._unsaved.append((key, entry))
            self._since_ms = until
