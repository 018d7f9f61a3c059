"""Step records: from the training loop to the store, and to whoever watches the driver.

Rank 0 writes; nothing here makes the loop wait. `ray.train.report` would cost seconds a call, so steps travel by
an actor of their own: the board.
"""

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import ray

from cluster import keys
from cluster.errors import LuthierError
from cluster.records import EventKind, FileRecord, RunState
from cluster.store import Store
from jobs import runs

FLUSH_S = 10.0
"""A part of metrics.jsonl covers at most about this long: what a lost worker can take with it."""

PUSH_S = 0.5


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, over all workers. Losses are per supervised token; `cpu_s` is rank 0's processor time.

    `memory_bytes` is what the fullest worker holds after it: of its GPU, or resident where it computes on CPUs.

    A step whose loss or gradient is not finite changes nothing: it has neither figure here, and is `skipped`.
    """

    step: int
    loss: float | None
    grad_norm: float | None
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
    memory_bytes: int
    skipped: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


Request = Literal["stop", "move"]
"""What the driver asks of the workers: to save and end; or to save and start again, elsewhere or in another number."""


@dataclass(frozen=True)
class Stall:
    """A rank whose training loop stands still: since when, doing what, and its stack, innermost call last."""

    rank: int
    seconds: float
    doing: str
    stack: str


class Board:
    """An actor between driver and workers: steps, results and troubles one way, requests the other."""

    def __init__(self) -> None:
        self._steps: list[StepRecord] = []
        self._checkpoint: str | None = None
        self.begin()

    def begin(self) -> None:
        """Forget what an earlier attempt left: another is about to start."""
        self._result: dict[str, Any] | LuthierError | None = None
        self._requests: set[Request] = set()
        self._nodes: dict[int, str] = {}
        self._stalls: dict[int, Stall] = {}
        self._files: dict[tuple[int, int], dict[int, FileRecord | None]] = {}

    def join(self, rank: int, node: str) -> None:
        """A worker says on which node it is."""
        self._nodes[rank] = node

    def push(self, steps: list[StepRecord]) -> set[Request]:
        """Take steps. Returns what the workers are asked to do."""
        self._steps += steps
        return self._requests

    def ask(self, request: Request) -> None:
        """Ask something of the workers; they hear of it within a step or two."""
        self._requests.add(request)

    def stored(
        self, attempt: int, step: int, world_size: int, rank: int, file: FileRecord | None
    ) -> list[FileRecord] | None:
        """A rank has stored its shard (or has none). Returns all files to the last rank that says so."""
        files = self._files.setdefault((attempt, step), {})
        files[rank] = file
        if len(files) < world_size:
            return None
        del self._files[attempt, step]
        return [file for _, file in sorted(files.items()) if file]

    def committed(self, checkpoint: str) -> None:
        """A checkpoint's manifest has been written under this key."""
        self._checkpoint = checkpoint

    def checkpoint(self) -> str | None:
        """The key of the newest manifest."""
        return self._checkpoint

    def stalled(self, stall: Stall) -> None:
        """A worker says that it stands still."""
        self._stalls[stall.rank] = stall

    def look(self) -> tuple[dict[int, str], list[Stall]]:
        """Each rank's node, and the ranks that stand still."""
        return self._nodes, [stall for _, stall in sorted(self._stalls.items())]

    def finish(self, result: dict[str, Any] | LuthierError) -> None:
        """Leave the attempt's result, or the error that every further attempt would meet too. The first one counts."""
        if self._result is None:
            self._result = result

    def take(self) -> list[StepRecord]:
        """The steps since the last take."""
        taken, self._steps = self._steps, []
        return taken

    def result(self) -> dict[str, Any] | LuthierError | None:
        return self._result


class Meeting(Protocol):
    """What a rank's saver needs of the board."""

    def stored(
        self, attempt: int, step: int, world_size: int, rank: int, file: FileRecord | None
    ) -> list[FileRecord] | None: ...

    def committed(self, checkpoint: str) -> None: ...

    def finish(self, result: dict[str, Any] | LuthierError) -> None: ...


class RemoteBoard:
    """The board's actor as a Meeting: each call waits for its answer."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def stored(
        self, attempt: int, step: int, world_size: int, rank: int, file: FileRecord | None
    ) -> list[FileRecord] | None:
        files: list[FileRecord] | None = ray.get(self._actor.stored.remote(attempt, step, world_size, rank, file))
        return files

    def committed(self, checkpoint: str) -> None:
        ray.get(self._actor.committed.remote(checkpoint))

    def finish(self, result: dict[str, Any] | LuthierError) -> None:
        ray.get(self._actor.finish.remote(result))


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
        self._requests: set[Request] = set()

    def record(self, step: StepRecord) -> None:
        """Note a step; returns at once."""
        self._unsaved.append(step)
        self._unpushed.append(step)
        now = time.monotonic()
        if now - self._pushed_at > PUSH_S:
            self._push(now)
        if now - self._flushed_at > FLUSH_S:
            self._flush(now)

    def tell(
        self,
        text: str,
        step: int,
        state: RunState | None = None,
        kind: EventKind | None = None,
        evaluation_loss: float | None = None,
    ) -> None:
        """Append an event to the run's log; returns at once."""

        def write() -> None:
            runs.tell(self._store, self._run_id, text, state, kind=kind, step=step, evaluation_loss=evaluation_loss)

        self._writes.append(self._writer.submit(write))

    def requests(self) -> set[Request]:
        """What the driver asks, as far as is known without waiting."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._requests |= ray.get(self._answer)
            self._answer = None
        return self._requests

    def flush(self) -> list[Future[None]]:
        """Send all steps so far to the store. Returns the writes that are under way."""
        self._flush(time.monotonic())
        self._writes = [write for write in self._writes if not write.done() or write.exception()]
        return list(self._writes)

    def close(self) -> None:
        """Have everything in the store; raises what a write in the background raised."""
        self._push(time.monotonic())
        for write in self.flush():
            write.result()
        self._writer.shutdown()

    def _push(self, now: float) -> None:
        self._answer = self._board.push.remote(self._unpushed)
        self._unpushed, self._pushed_at = [], now

    def _flush(self, now: float) -> None:
        if self._unsaved:
            lines = "".join(step.to_json() + "\n" for step in self._unsaved).encode()
            key = keys.metrics_part(self._run_id, self._attempt, self._unsaved[0].step)
            self._writes.append(self._writer.submit(self._store.put, key, lines))
        self._unsaved, self._flushed_at = [], now
