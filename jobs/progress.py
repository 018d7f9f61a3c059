"""Step records: from the training loop to the store, and to whoever watches the driver.

Rank 0 writes; nothing here makes the loop wait. `ray.train.report` would cost seconds a call, so steps travel by
an actor of their own: the board.
"""

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import ray

from cluster import keys
from cluster.errors import LuthierError
from cluster.store import Store

FLUSH_S = 10.0
"""A part of metrics.jsonl covers at most about this long: what a lost worker can take with it."""

PUSH_S = 0.5


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, over all workers. Losses are per supervised token; `cpu_s` is rank 0's processor time."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    supervised_tokens: int
    samples_seen: int
    tokens_per_s: float
    step_s: float
    cpu_s: float
    data_wait_s: float
    checkpoint_stall_s: float
    padding_fraction: float
    world_size: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Board:
    """An actor between driver and rank 0: steps and the result one way, a request to stop the other."""

    def __init__(self) -> None:
        self._steps: list[StepRecord] = []
        self._result: dict[str, Any] | LuthierError | None = None
        self._is_stopping = False

    def push(self, steps: list[StepRecord]) -> bool:
        """Take steps. Returns whether the run shall save and stop."""
        self._steps += steps
        return self._is_stopping

    def stop(self) -> None:
        """Ask the workers to save and stop."""
        self._is_stopping = True

    def finish(self, result: dict[str, Any] | LuthierError) -> None:
        """Leave the run's result, or the error that every further attempt would meet too."""
        self._result = result

    def take(self) -> list[StepRecord]:
        """The steps since the last take."""
        taken, self._steps = self._steps, []
        return taken

    def result(self) -> dict[str, Any] | LuthierError | None:
        return self._result


class Recorder:
    """Rank 0's pen: buffers records, and writes them to the store and the board in the background."""

    def __init__(self, store: Store, run_id: str, attempt: int, board: Any) -> None:
        self._store = store
        self._run_id = run_id
        self._attempt = attempt
        self._board = board
        self._unsaved: list[StepRecord] = []
        self._unpushed: list[StepRecord] = []
        self._pushed_at = self._flushed_at = time.monotonic()
        self._writer = ThreadPoolExecutor(1, "metrics")
        self._writes: list[Future[None]] = []
        self._answer: Any = None  # of the board to the last push
        self._is_stopping = False

    def record(self, step: StepRecord) -> None:
        """Note a step; returns at once."""
        self._unsaved.append(step)
        self._unpushed.append(step)
        now = time.monotonic()
        if now - self._pushed_at > PUSH_S:
            self._push(now)
        if now - self._flushed_at > FLUSH_S:
            self._flush(now)

    def is_stopping(self) -> bool:
        """Whether somebody asked the run to stop, as far as is known without waiting."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._is_stopping |= ray.get(self._answer)
            self._answer = None
        return self._is_stopping

    def close(self) -> None:
        """Write the rest, as `settle` does, and end."""
        self._push(time.monotonic())
        self.settle()
        self._writer.shutdown()

    def settle(self) -> None:
        """Have all steps so far in the store; raises what a write in the background raised.

        Called before a checkpoint is committed: what is not written then would never be done again.
        """
        self._flush(time.monotonic())
        for write in self._writes:
            write.result()
        self._writes = []

    def _push(self, now: float) -> None:
        self._answer = self._board.push.remote(self._unpushed)
        self._unpushed, self._pushed_at = [], now

    def _flush(self, now: float) -> None:
        if self._unsaved:
            lines = "".join(step.to_json() + "\n" for step in self._unsaved).encode()
            key = keys.metrics_part(self._run_id, self._attempt, self._unsaved[0].step)
            self._writes.append(self._writer.submit(self._store.put, key, lines))
        self._unsaved, self._flushed_at = [], now
