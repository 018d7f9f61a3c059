"""What a run holds and has spent, seen from its driver: Ray's placements on one side, the ledger on the other.

The pulse looks every two seconds. Workers count from the moment that Ray had placed them all, which it keeps, to the
end of their attempt; the driver counts where it asked for CPUs (`driver_cpus`, which the job's metadata says).
"""

import threading
import time
from collections.abc import Mapping
from uuid import uuid4

import ray

from cluster import ledger, prices, session
from cluster.ledger import Line, Spent
from cluster.meter import Meter
from cluster.records import RunRecord
from cluster.store import Store
from cluster.who import submitted, submitter
from jobs import limits, runs
from jobs.config import Recipe
from jobs.gauges import TrainingGauges


class Account:
    """One driver's part of a run's ledger.

    Args:
        began: when the driver began, in seconds since 1970.
    """

    def __init__(self, store: Store, record: RunRecord, recipe: Recipe, gauges: TrainingGauges, began: float) -> None:
        self._recipe = recipe
        self._gauges = gauges
        earlier = ledger.total(runs.ledger_entries(store, record))
        self._meter = Meter(record.run_id, submitter(), recipe.project, uuid4().hex[:12], earlier)
        self._driver = self._driver_lines()
        self._meter.hold(self._driver, round(1000 * began))
        self._lock = threading.Lock()  # the pulse looks, while the main thread begins and ends attempts
        self._workers: list[Line] = []
        self._earlier_groups: set[str] = set()
        self._is_watching = False
        self._cut_at = time.monotonic()

    def begin(self) -> None:
        """An attempt begins; its workers are not placed yet."""
        with self._lock:
            self._earlier_groups = {placement.id for placement in session.placements()}
            self._is_watching = True

    def end(self) -> None:
        """The attempt has ended, and its workers with it."""
        with self._lock:
            self._find_workers()  # it may have been over before anybody looked
            self._is_watching = False
            self._workers = []
            self._meter.hold(self._driver)
        self._show()

    def look(self) -> str | None:
        """See what is held now, and show it. Returns the limit that is reached, in words."""
        with self._lock:
            self._find_workers()
        if time.monotonic() - self._cut_at > self._recipe.limits.ledger_s:
            self.cut()
        self._show()
        return limits.reached(self._recipe.limits, self.spent())

    def cut(self) -> None:
        """Make entries of what was held until now."""
        self._meter.cut()
        self._cut_at = time.monotonic()

    def save(self, store: Store) -> None:
        """Write the entries that are not in the store yet. Raises StoreError; then another call goes on with it."""
        self._meter.save(store)

    def close(self, store: Store) -> None:
        """Nothing is held any more. Raises StoreError."""
        self._meter.hold([])
        self._show()
        self._meter.save(store)

    def spent(self) -> Spent:
        """All that the run has spent."""
        return self._meter.spent()

    def _find_workers(self) -> None:
        if not self._is_watching or self._workers:
            return
        new = [placement for placement in session.placements() if placement.id not in self._earlier_groups]
        if not new:
            return
        labels = session.labels()
        held = [(resources, labels.get(node, {})) for each in new for node, resources in each.bundles]
        self._workers = prices.lines("worker", held, self._recipe.cluster)
        self._meter.hold([*self._driver, *self._workers], max(placement.since_ms for placement in new))

    def _driver_lines(self) -> list[Line]:
        cpus = float(submitted().get("driver_cpus", 0.0))
        here: Mapping[str, str] = session.labels().get(ray.get_runtime_context().get_node_id(), {})
        return prices.lines("driver", [({"CPU": cpus}, here)], self._recipe.cluster)

    def _show(self) -> None:
        spent = self.spent()
        is_known = (spent.gpu_ms or spent.cpu_ms) and spent.usd is not None  # before anything is held nobody can tell
        usd, rate = (spent.usd, self._meter.usd_per_hour()) if is_known else (None, None)
        self._gauges.spent(usd, rate, limits.share(self._recipe.limits, spent))
