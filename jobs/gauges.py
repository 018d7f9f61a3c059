"""A run's figures for Prometheus, from its driver: the loop of the workers has nothing to do with them."""

import time
from collections.abc import Iterable

from ray.util import metrics as ray_metrics

from cluster import metrics
from cluster.gauges import counter, gauge
from jobs.progress import StepRecord


class TrainingGauges:
    """The metrics of one run, from its driver's start to `end`."""

    def __init__(self, run_id: str, memory_limit_bytes: float, peak_tokens_per_s: float | None) -> None:
        """Args:
        memory_limit_bytes: what a worker may have.
        peak_tokens_per_s: of one worker, at the peak of its GPU; None where that is not known.
        """
        self._labels = {"run": run_id}
        self._peak_tokens_per_s = peak_tokens_per_s
        self._checkpoint: str | None = None
        self._skipped = 0
        self._active = gauge(metrics.RUN_ACTIVE)
        self._loss = gauge(metrics.TRAINING_LOSS)
        self._norm = gauge(metrics.GRADIENT_NORM)
        self._rate = gauge(metrics.LEARNING_RATE)
        self._tokens_per_s = gauge(metrics.TOKENS_PER_S)
        self._padding = gauge(metrics.PADDING)
        self._workers = gauge(metrics.TRAINING_WORKERS)
        self._memory = gauge(metrics.WORKER_MEMORY)
        self._memory_limit = gauge(metrics.WORKER_MEMORY_LIMIT)
        self._mfu = gauge(metrics.MFU)
        self._skipped_steps = gauge(metrics.SKIPPED_STEPS)
        self._failures = gauge(metrics.TRAINING_FAILURES)
        self._last_step_at = gauge(metrics.LAST_STEP_AT)
        self._last_checkpoint_at = gauge(metrics.LAST_CHECKPOINT_AT)
        self._usd = gauge(metrics.RUN_COST)
        self._usd_per_hour = gauge(metrics.RUN_SPENDING)
        self._limit = gauge(metrics.RUN_LIMIT)
        self._steps = counter(metrics.TRAINING_STEPS)
        self._tokens = counter(metrics.TRAINED_TOKENS)
        self._supervised = counter(metrics.SUPERVISED_TOKENS)
        self._step_s = counter(metrics.STEP_SECONDS)
        self._data_wait_s = counter(metrics.DATA_WAIT_SECONDS)
        self._stall_s = counter(metrics.CHECKPOINT_STALL_SECONDS)
        for each, value in (
            (self._active, 1.0),
            (self._memory_limit, memory_limit_bytes),
            (self._failures, 0.0),
            (self._skipped_steps, 0.0),
            (self._last_step_at, time.time()),
            (self._last_checkpoint_at, time.time()),
        ):
            each.set(value, self._labels)

    def export(self, steps: list[StepRecord]) -> None:
        """Count steps, and show the last one."""
        if not steps:
            return
        last = steps[-1]
        self._skipped += sum(step.skipped for step in steps)
        for each, value in (
            (self._loss, last.loss),
            (self._norm, last.grad_norm),
            (self._rate, last.lr),
            (self._tokens_per_s, last.tokens_per_s),
            (self._padding, last.padding_fraction),
            (self._workers, last.world_size),
            (self._memory, last.memory_bytes),
            (self._mfu, self._share_of_peak(last)),
            (self._skipped_steps, self._skipped),
            (self._last_step_at, time.time()),
        ):
            if value is not None:
                each.set(float(value), self._labels)
        self._add(self._steps, [1 for _ in steps])
        self._add(self._tokens, [step.tokens for step in steps])
        self._add(self._supervised, [step.supervised_tokens for step in steps])
        self._add(self._step_s, [step.step_s for step in steps])
        self._add(self._data_wait_s, [step.data_wait_s for step in steps])
        self._add(self._stall_s, [step.checkpoint_stall_s for step in steps])

    def _share_of_peak(self, step: StepRecord) -> float | None:
        return step.tokens_per_s / (step.world_size * self._peak_tokens_per_s) if self._peak_tokens_per_s else None

    def saw_checkpoint(self, key: str | None) -> None:
        """The newest committed checkpoint, as far as the driver knows; None before there is one."""
        if key != self._checkpoint:
            self._checkpoint = key
            self._last_checkpoint_at.set(time.time(), self._labels)

    def failed(self, failures: int) -> None:
        """So many failures so far."""
        self._failures.set(float(failures), self._labels)

    def spent(self, usd: float | None, usd_per_hour: float | None, limit: float | None) -> None:
        """What the run has cost, what it costs now, and how much of its nearest limit that is; None is not shown."""
        for each, value in ((self._usd, usd), (self._usd_per_hour, usd_per_hour), (self._limit, limit)):
            if value is not None:
                each.set(value, self._labels)

    def end(self) -> None:
        """Nothing more will come: who looks from now on does not wait for it."""
        self._active.set(0.0, self._labels)

    def _add(self, metric: ray_metrics.Counter, amounts: Iterable[float]) -> None:
        if (amount := sum(amounts)) > 0:  # Ray's counters refuse 0
            metric.inc(amount, self._labels)
