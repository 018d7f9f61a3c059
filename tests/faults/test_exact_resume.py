"""A run that is killed and goes on in another number of workers ends as one that was left alone: to 1e-5.

For LoRA and full fine-tuning, at every ZeRO stage, through 2, 1, 4 and 3 workers; each but the last is killed −9 at a
random moment after a commit. The trained tensors of the model here have more than 1e5 elements, which is where ZeRO-3
begins to shard and other systems begin to lose weights.
"""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.nodes import LocalCluster
from cluster.records import RunRecord
from cluster.store import Store
from jobs import checkpoint, runs
from jobs.dataset import Dataset
from jobs.packing import SampleSchedule
from scripts.demo.model import make_model
from tests.faults.field import Field
from tests.faults.ranks import Ranks
from tests.servers import S3Server

STEPS, EVERY = 16, 2
WORKERS = (2, 1, 4, 3)
TOLERANCE = 1e-5
METHODS = {"lora": "{kind: lora, rank: 400, alpha: 400}", "full": "{kind: full}"}


@pytest.fixture(scope="module")
def field(ray_cluster: LocalCluster, s3: S3Server, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Field:
    folder = tmp_path_factory.mktemp("exact")
    make_model(folder / "wide", architecture="qwen3", hidden_size=256, layers=2)
    return Field(ray_cluster, s3, folder, {name: (folder / "wide", method) for name, method in METHODS.items()}, rows)


def final_state(store: Store, run_id: str) -> dict[str, torch.Tensor]:
    """Weights after the last step."""
    found = checkpoint.newest_whole(store, run_id).restored
    assert found
    assert found.next_step == STEPS
    return {name: found.read("weight", name, 0, count) for name, count in found.elements().items()}


@pytest.fixture(scope="module")
def calm(field: Field) -> dict[str, Any]:
    """Per method: the losses and the weights of an uninterrupted run on one worker without sharding."""
    found = {}
    for method in METHODS:
        record = field.new_run(method, f"calm-{method}", steps=STEPS, every=EVERY)
        field.start(record, 1, 0).wait()
        losses = [step["loss"] for step in runs.read_steps(field.store, record.run_id)]
        found[method] = losses, final_state(field.store, record.run_id)
    return found


def kill_after_a_commit(field: Field, record: RunRecord, ranks: Ranks, chance: random.Random) -> None:
    """kill −9 at a random moment after a checkpoint has been committed that the attempt did not begin with."""
    before = set(runs.checkpoint_steps(field.store, record.run_id))
    while not set(runs.checkpoint_steps(field.store, record.run_id)) - before:
        assert ranks.is_alive(), ranks.wait()
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.3))
    ranks.kill()


@pytest.mark.parametrize(
    ("method", "zero"),
    [
        pytest.param(method, zero, marks=() if (method, zero) == ("full", 3) else pytest.mark.long)
        for method in METHODS
        for zero in (1, 2, 3)
    ],
)
def test_killed_and_resized_it_ends_the_same(field: Field, calm: dict[str, Any], method: str, zero: int) -> None:
    chance = random.Random(f"{method} {zero}")
    record = field.new_run(method, f"broken-{method}-{zero}", steps=STEPS, every=EVERY)
    for world_size in WORKERS[:-1]:
        kill_after_a_commit(field, record, field.start(record, world_size, zero), chance)
    field.start(record, WORKERS[-1], zero).wait()

    losses, weights = calm[method]
    steps = list(runs.read_steps(field.store, record.run_id))
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert {step["world_size"] for step in steps} >= {2, 4}
    assert [step["loss"] for step in steps] == pytest.approx(losses, abs=TOLERANCE, rel=0)
    state = final_state(field.store, record.run_id)
    assert max(weight.numel() for weight in weights.values()) > 1e5
    assert state.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(state[name], weight, atol=TOLERANCE, rtol=0)
    assert consumed(field.store, record) == consumed(field.store, record, world_sizes=[1] * STEPS)
    attempts = runs.attempts(field.store, record.run_id)
    assert [attempt.world_size for attempt in attempts] == list(WORKERS)
    assert all(event.steps_lost <= EVERY + 1 for event in runs.read_events(field.store, record.run_id))


def consumed(store: Store, record: RunRecord, world_sizes: list[int] | None = None) -> list[int]:
    """The ids of all samples that a run's steps took, on the workers that they were taken on."""
    dataset = Dataset.fetch(store, record.dataset)
    train, data = record.recipe["train"], record.recipe["data"]
    schedule = SampleSchedule(
        dataset.lengths, train["seed"], data["sequence_length"], data["packing"], train["global_batch"]
    )
    sizes = world_sizes or [step["world_size"] for step in runs.read_steps(store, record.run_id)]
    shares = (schedule.share(step, rank, size) for step, size in enumerate(sizes) for rank in range(size))
    return sorted(int(sample) for share in shares for pack in share for sample in pack)
