"""What the driver shows of a running job: a live line on a terminal, plain lines in a job's log."""

import sys
import threading
import time
from typing import Any

import ray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.logs import console, say
from jobs.gauges import TrainingGauges
from jobs.progress import StepRecord

POLL_S = 0.5
LINE_S = 5.0
"""A log line covers about this long; the store has every step."""


class Screen:
    """Reads the board until told to stop. `total_steps` is None when the recipe counts in epochs."""

    def __init__(self, board: Any, name: str, total_steps: int | None, gauges: TrainingGauges) -> None:
        self._board = board
        self._gauges = gauges
        self._name = name
        self._total_steps = total_steps
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Show what is left, then end `watch`."""
        self._stopping.set()

    def watch(self) -> None:
        """Show steps as they come; runs in a thread of its own."""
        if sys.stdout.isatty():
            self._watch_live()
        else:
            self._watch_plain()

    def _watch_live(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console()) as progress:
            bar = progress.add_task(f"{self._name}: starting workers", total=self._total_steps)
            for steps in self._batches():
                if steps:
                    progress.update(
                        bar, completed=steps[-1].step + 1, description=f"{self._name}: {figures(steps[-1])}"
                    )

    def _watch_plain(self) -> None:
        shown_at = 0.0
        last: StepRecord | None = None
        for steps in self._batches():
            last = steps[-1] if steps else last
            if last and (self._stopping.is_set() or time.monotonic() - shown_at > LINE_S):
                of = f"/{self._total_steps}" if self._total_steps else ""
                say(f"step {last.step + 1}{of}  {figures(last)}")
                shown_at, last = time.monotonic(), None

    def _batches(self) -> Any:
        """Steps since the last look, until stopped and nothing is left."""
        while True:
            stopping = self._stopping.wait(POLL_S)
            steps, checkpoint = ray.get([self._board.take.remote(), self._board.checkpoint.remote()])
            self._gauges.export(steps)
            self._gauges.saw_checkpoint(checkpoint)
            yield steps
            if stopping:
                return


def figures(step: StepRecord) -> str:
    """A step in a few figures."""
    result = "not finite: skipped" if step.skipped else f"loss {step.loss:.4f}  grad {step.grad_norm:.2f}"
    return f"{result}  lr {step.lr:.2e}  {step.tokens_per_s:,.0f} tokens/s  {step.samples_seen:,} samples"
