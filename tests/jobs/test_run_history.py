"""Any history of a run, against a model of it in memory: attempts that are cut off anywhere, and damaged checkpoints.

The store, the attempts, the metrics parts and the checkpoints are the real ones; only the training is made up, of
steps whose loss says which attempt did them.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import keys, models, records
from cluster.folder import FolderStore
from cluster.records import CheckpointManifest
from cluster.store import Store
from jobs import checkpoint, runs
from jobs.checkpoint import Retention, kept
from jobs.progress import Board
from jobs.saver import Position, Saver
from tests.jobs.savers import Share, value_of


@dataclass(frozen=True)
class Attempt:
    """Some steps, a checkpoint every so often, and where it is cut off.

    `unflushed` steps at the end are not in the store; `tears` says whether a shard was stored whose manifest was not.
    """

    steps: int
    every: int
    world_size: int
    unflushed: int
    tears: bool


@dataclass(frozen=True)
class Damage:
    """A shard of the newest checkpoint, or of the one before, loses its last byte."""

    newest: bool


@dataclass
class Model:
    """A run, and what it should be: each step's attempt that counts; each checkpoint's value, None when damaged.

    `metrics` is what retention goes by, whatever became of the checkpoint.
    """

    run_id: str
    retention: Retention
    done: list[int] = field(default_factory=list)
    checkpoints: dict[int, float | None] = field(default_factory=dict)
    metrics: dict[int, float | None] = field(default_factory=dict)

    def commit(self, step: int, value: float, passed_over: set[int]) -> None:
        """A checkpoint is there; those that its attempt had to pass over go, and those that nothing keeps."""
        self.checkpoints[step], self.metrics[step] = torch_value(value), value
        left = {each: metric for each, metric in self.metrics.items() if each not in passed_over - {step}}
        stay = kept(left, self.retention)
        self.metrics = {each: metric for each, metric in left.items() if each in stay}
        self.checkpoints = {each: self.checkpoints[each] for each in self.metrics}

    def newest(self) -> int:
        return max((step for step, value in self.checkpoints.items() if value is not None), default=0)


EVENTS = st.lists(
    st.one_of(
        st.builds(
            Attempt,
            steps=st.integers(0, 7),
            every=st.integers(1, 4),
            world_size=st.integers(1, 3),
            unflushed=st.integers(0, 3),
            tears=st.booleans(),
        ),
        st.builds(Damage, newest=st.booleans()),
    ),
    max_size=8,
)
RETENTIONS = st.builds(Retention, last=st.integers(1, 3), best=st.integers(0, 2), every=st.none() | st.integers(2, 4))


def play(store: Store, event: Attempt | Damage, model: Model) -> None:
    if isinstance(event, Damage):
        damage(store, event, model)
        return
    found = checkpoint.newest_whole(store, model.run_id).restored
    first = found.next_step if found else 0
    assert first == model.newest()
    assert not found or value_of(found, 12) == model.checkpoints[first]
    number = runs.begin_attempt(store, model.run_id, first, event.world_size, 1)
    passed_over = {step for step in model.checkpoints if step > first}
    del model.done[first:]
    board = Board()
    savers = [
        Saver(Share(rank, event.world_size, 12, 0.0), store, model.run_id, number, rank, board, model.retention)
        for rank in range(event.world_size)
    ]
    written = first
    for step in range(first, first + event.steps):
        if (step + 1) % event.every:
            continue
        flush(store, model.run_id, number, written, step + 1)  # what a checkpoint covers is stored before it counts
        written = step + 1
        value = number + step / 100
        for saver in savers:
            saver._engine.value = value  # type: ignore[attr-defined]
            saver._fragments = None
            saver.begin(Position(step + 1, step + 1, 0, value))
        for saver in savers:
            saver._uploader.submit(int).result()
        model.commit(step + 1, value, passed_over)
        passed_over.discard(step + 1)
    for saver in savers:
        saver.close()
    last = max(written, first + event.steps - event.unflushed)
    flush(store, model.run_id, number, written, last)
    model.done += [number] * (last - first)
    if event.tears:
        store.put(
            keys.checkpoint_prefix(model.run_id, first + event.steps + 1) + "state-9999-00000.safetensors", b"torn"
        )


def torch_value(value: float) -> float:
    """As fp32 holds it."""
    import torch

    return float(torch.tensor(value))


def flush(store: Store, run_id: str, attempt: int, first: int, end: int) -> None:
    lines = [json.dumps({"step": step, "loss": attempt}) for step in range(first, end)]
    if lines:
        store.put(keys.metrics_part(run_id, attempt, first), "\n".join(lines).encode())


def damage(store: Store, event: Damage, model: Model) -> None:
    steps = sorted(model.checkpoints)[-1 if event.newest else -2 :][:1]
    for step in steps:
        manifest = records.read(store, keys.checkpoint_manifest(model.run_id, step), CheckpointManifest)
        key = keys.checkpoint_prefix(model.run_id, step) + manifest.files[0].file
        store.put(key, store.get(key)[:-1])
        model.checkpoints[step] = None
    shutil.rmtree(models.cache_folder() / "checkpoints", ignore_errors=True)  # a node keeps what it has verified


@given(EVENTS, RETENTIONS)
@settings(max_examples=60)
def test_whatever_happens_every_step_counts_once(events: list[Attempt | Damage], retention: Retention) -> None:
    with TemporaryDirectory() as folder:
        store = FolderStore(Path(folder) / "store")
        model = Model(uuid4().hex, retention)
        for event in events:
            play(store, event, model)
            steps = list(runs.read_steps(store, model.run_id))
            assert [step["step"] for step in steps] == list(range(len(model.done)))
            assert [step["loss"] for step in steps] == model.done
            assert runs.checkpoint_steps(store, model.run_id) == sorted(model.checkpoints)
        found = checkpoint.newest_whole(store, model.run_id)
        assert (found.restored.next_step if found.restored else 0) == model.newest()
