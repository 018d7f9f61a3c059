"""Checkpoints behind training's back: copied while the next step computes, uploaded in the background, then committed.

    training    begin ── forward, backward ── settle ── optimizer's step ── …
    copying        └── the fragments, which change in the optimizer's step only
    uploading             └── hash and upload ── tell the board; the last rank that does writes the manifest

Two shards of host memory are all that it takes. While both are on their way `is_full` says so, and a checkpoint that
falls due waits for a later step: training goes on, and neither memory nor a disk fills up.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch

from cluster import keys, records
from cluster.errors import LuthierError, RunFailed
from cluster.records import CheckpointManifest, FileRecord
from cluster.store import Store
from jobs import checkpoint, runs
from jobs.checkpoint import Retention, Shard
from jobs.progress import Meeting
from jobs.zero import Fragment

SHARDS = 2


@dataclass(frozen=True)
class Position:
    """What every rank knows of a checkpoint: the step that comes next, and what the manifest says besides the files."""

    step: int
    updates: int
    samples_seen: int
    metric: float | None


class Sharded(Protocol):
    """An engine, as far as checkpoints are concerned."""

    world_size: int

    def fragments(self) -> list[Fragment]: ...


class Saver:
    """One rank's part in the checkpoints of one attempt.

    Args:
        rank: of the engine's process group.
        retention: which checkpoints stay when a new one has been committed.
    """

    def __init__(
        self, engine: Sharded, store: Store, run_id: str, attempt: int, rank: int, board: Meeting, retention: Retention
    ) -> None:
        self._engine = engine
        self._store = store
        self._run_id = run_id
        self._attempt = attempt
        self._rank = rank
        self._board = board
        self._retention = retention
        self._free: SimpleQueue[Shard | None] = SimpleQueue()
        for _ in range(SHARDS):
            self._free.put(None)  # made when first needed
        self._copier = ThreadPoolExecutor(1, "checkpoint-copy")
        self._hasher = ThreadPoolExecutor(1, "checkpoint-hash")
        self._uploader = ThreadPoolExecutor(1, "checkpoint-upload")
        self._copying: Future[Shard | None] | None = None
        self._failure: LuthierError | None = None
        self._fragments: list[Fragment] | None = None  # stay where they are through an attempt

    @property
    def is_full(self) -> bool:
        """Whether `begin` would have to wait for an upload."""
        return self._free.empty()

    @property
    def failure(self) -> LuthierError | None:
        """Why no checkpoint can be stored any more."""
        return self._failure

    def begin(self, position: Position, before: Sequence[Future[None]] = ()) -> None:
        """Save the state as it is now. Returns at once unless `is_full`.

        Args:
            before: writes that must be in the store before this checkpoint counts: what they hold is never done again.
        """
        shard = self._free.get()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        copying = self._copier.submit(self._copy, shard)
        self._copying = copying
        self._uploader.submit(self._store_it, copying, position, list(before))

    def settle(self) -> None:
        """Wait until the copy is made; to be called before the optimizer changes the state."""
        if self._copying:
            self._copying.result()
            self._copying = None

    def close(self) -> None:
        """Wait until everything is stored. Raises what made that impossible."""
        self.settle()
        for pool in (self._copier, self._uploader, self._hasher):
            pool.shutdown()
        if self._failure:
            raise self._failure

    def _copy(self, shard: Shard | None) -> Shard | None:
        if self._fragments is None:
            self._fragments = self._engine.fragments()
        if not self._fragments:
            return None
        shard = shard or Shard(self._fragments)
        shard.copy(self._fragments)
        return shard

    def _store_it(self, copying: "Future[Shard | None]", position: Position, before: list[Future[None]]) -> None:
        shard = None
        try:
            shard = copying.result()
            if not self._failure:
                self._upload(shard, position, before)
        except LuthierError as error:
            self._fail(error)
        except Exception as error:  # a thread's error would be seen by nobody
            self._fail(RunFailed(f"run {self._run_id}: checkpoint {position.step}: {type(error).__name__}: {error}"))
        finally:
            self._free.put(shard)

    def _fail(self, error: LuthierError) -> None:
        self._failure = error
        self._board.finish(error)

    def _upload(self, shard: Shard | None, position: Position, before: list[Future[None]]) -> None:
        file = None
        if shard:
            name = f"state-{self._attempt:04d}-{self._rank:05d}.safetensors"
            key = keys.checkpoint_prefix(self._run_id, position.step) + name
            described = self._hasher.submit(records.describe_memory, shard.memory, name)
            self._store.upload(shard.memory, key)
            file = described.result()
        for write in before:
            write.result()
        world_size = self._engine.world_size
        files = self._board.stored(self._attempt, position.step, world_size, self._rank, file)
        if files is not None:
            self._commit(position, files)

    def _commit(self, position: Position, files: list[FileRecord]) -> None:
        if runs.attempts(self._store, self._run_id)[-1].number != self._attempt:
            raise RunFailed(
                f"run {self._run_id}: attempt {self._attempt} stops here, because a later one has taken its place"
            )
        key = keys.checkpoint_manifest(self._run_id, position.step)
        manifest = CheckpointManifest(
            run_id=self._run_id,
            step=position.step,
            attempt=self._attempt,
            updates=position.updates,
            samples_seen=position.samples_seen,
            world_size=self._engine.world_size,
            metric=position.metric,
            files=tuple(files),
            created_at=records.now(),
        )
        self._store.put(key, manifest.to_bytes())
        self._board.committed(key)
        checkpoint.collect(self._store, self._run_id, self._retention)
