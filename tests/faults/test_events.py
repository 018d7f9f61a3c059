"""What happens to a run's nodes and workers, on real Ray nodes: it ends with the same weights, and its log says why.

One run of many events, against a calm one of the same recipe on one worker.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.nodes import LocalCluster
from cluster.records import RunEvent
from cluster.store import Store, open_store
from jobs import runs
from tests.conftest import TinyModels
from tests.e2e.submit import RAY, adapter_weights, said, start, until, write_recipe

WORKER = "RayTrainWorker"
STEPS, EVERY = 200, 10
# Three workers that take turns on two cores change places often; what they add up differs by rounding alone.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def field(cache: Path) -> Iterator[LocalCluster]:
    """A cluster of its own, whose nodes may be drained and killed, and which notices a dead node in seconds."""
    variables = {
        "LUTHIER_CACHE": str(cache),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    with LocalCluster(head_cpus=1, variables=variables) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(tiny_models: TinyModels, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events")
    return write_recipe(
        folder, tiny_models["qwen3"], [rows], name="storm", store=f"file://{folder}/store", learning_rate=1e-4
    )


@pytest.fixture(scope="module")
def store(recipe: Path) -> Store:
    return open_store(f"file://{recipe.parent}/store")


def drain(cluster: LocalCluster, node: str, seconds: int) -> None:
    """As a cloud's notice would have it."""
    command = [str(RAY), "drain-node", "--address", cluster.address, "--node-id", node]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = ["--deadline-remaining-seconds", str(seconds)]
    done = subprocess.run([*command, *reason, *deadline], env=cluster.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Story:
    """A run that goes on while things happen to it."""

    def __init__(self, store: Store, driver: "subprocess.Popen[str]", run_id: str) -> None:
        self.store, self.driver, self.run_id = store, driver, run_id

    def events(self) -> list[RunEvent]:
        return runs.read_events(self.store, self.run_id)

    def wait_for(self, text: str, count: int = 1) -> None:
        until(lambda: sum(text in event.text for event in self.events()) >= count, self.driver)

    def wait_for_progress(self) -> None:
        """Until the attempt that runs has committed a checkpoint."""
        first = runs.attempts(self.store, self.run_id)[-1].first_step
        until(lambda: max(runs.checkpoint_steps(self.store, self.run_id), default=0) > first, self.driver)


def test_a_run_outlasts_growth_drain_and_death(field: LocalCluster, recipe: Path, store: Store, tmp_path: Path) -> None:
    head = field.alive()
    field.add_node(cpus=2)
    (second,) = field.alive() - head
    options = (f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "cluster.cpus_per_worker=1")
    calm_options = (*options, "name=calm", "publish.name=calm")
    said(field, "jobs.train", str(recipe), *calm_options)
    (calm,) = runs.run_ids(store)

    driver = start(
        field,
        *("jobs.train", str(recipe), *options, "train.workers=[1, 3]", "train.resize_s=2", "train.max_failures=2"),
    )
    until(lambda: len(runs.run_ids(store)) == 2, driver)
    story = Story(store, driver, max(runs.run_ids(store)))
    story.wait_for("on 3 worker(s)")
    story.wait_for_progress()
    drain(field, second, seconds=60)
    story.wait_for("on 1 worker(s)")
    story.wait_for_progress()
    third = field.add_node(cpus=3)
    story.wait_for("on 3 worker(s)", count=2)
    story.wait_for_progress()
    os.kill(field.worker_pids(WORKER)[0], signal.SIGKILL)
    story.wait_for("failure 1 of 2")
    story.wait_for("on 3 worker(s)", count=3)
    story.wait_for_progress()
    third.kill()
    story.wait_for("failure 2 of 2")
    output = driver.communicate()[0]
    assert driver.returncode == 0, output

    steps = list(runs.read_steps(store, story.run_id))
    expected = list(runs.read_steps(store, calm))
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert [step["samples_seen"] for step in steps] == [step["samples_seen"] for step in expected]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], abs=TOLERANCE)
    theirs = adapter_weights(store, "calm", tmp_path / "calm")
    for name, weight in adapter_weights(store, "storm", tmp_path / "storm").items():
        torch.testing.assert_close(weight, theirs[name], atol=TOLERANCE, rtol=0)

    events = story.events()
    begun = [event for event in events if event.state == "running"]
    said_before = {event.text: events[events.index(event) - 1].text for event in begun}
    for event in begun:
        if "moved:" in said_before[event.text]:
            assert event.steps_lost == 0, event
        assert event.steps_lost <= EVERY + 1, event
    assert any("is being drained, and will be gone in" in event.text for event in events)
    assert any("there is room for 2 more worker(s)" in event.text for event in events)
    assert all(event.state == "saving" for event in events if "about to move" in event.text)
