"""What happens to a run's nodes, workers and driver, on real Ray nodes: it ends with the same weights, and says why.

Each run of many events is compared with a calm one of the same recipe on one worker.
"""

import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from cluster import keys
from cluster.nodes import LocalCluster
from cluster.records import RunEvent
from cluster.store import Store, open_store
from jobs import runs
from scripts.demo import tasks
from scripts.demo.model import make_model
from tests.conftest import TinyModels
from tests.e2e.submit import RAY, adapter_weights, said, start, until, write_recipe, write_rows

WORKER = "RayTrainWorker"
STEPS, EVERY = 300, 4
# Three workers that take turns on two cores change places often; what they add up differs by rounding alone.
TOLERANCE = 1e-4
LENGTH = (f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "train.global_batch=36")


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


@pytest.fixture(scope="module")
def calm(field: LocalCluster, recipe: Path, store: Store) -> str:
    """The id of a run that nothing happens to."""
    said(field, "jobs.train", str(recipe), *LENGTH, "name=calm", "publish.name=calm")
    (run_id,) = runs.run_ids(store)
    return run_id


class Story:
    """A run that goes on while things happen to it, under one driver or under several in turn."""

    def __init__(self, cluster: LocalCluster, recipe: Path, store: Store, *options: str) -> None:
        before = set(runs.run_ids(store))
        self.cluster, self.store = cluster, store
        self.driver = start(cluster, "jobs.train", str(recipe), *options)
        until(lambda: bool(set(runs.run_ids(store)) - before), self.driver)
        (self.run_id,) = set(runs.run_ids(store)) - before

    def resume(self, *options: str) -> None:
        """Under a new driver."""
        self.driver = start(self.cluster, "jobs.resume", self.run_id, f"store={self.store.url}", *options)

    def end(self) -> None:
        output = self.driver.communicate()[0]
        assert self.driver.returncode == 0, output[-4000:]

    def events(self) -> list[RunEvent]:
        return runs.read_events(self.store, self.run_id)

    def wait_for(self, text: str, count: int = 1) -> None:
        until(lambda: sum(text in event.text for event in self.events()) >= count, self.driver)

    def wait_for_progress(self) -> None:
        """Until the attempt that runs has committed a checkpoint."""
        first = runs.attempts(self.store, self.run_id)[-1].first_step
        until(lambda: max(runs.checkpoint_steps(self.store, self.run_id), default=0) > first, self.driver)

    def wait_for_another_attempt(self, before: int) -> None:
        until(lambda: len(runs.attempts(self.store, self.run_id)) > before, self.driver)


def assert_as_calm(story: Story, calm: str, folder: Path) -> None:
    """The same steps on the same samples, the same losses, the same weights."""
    store = story.store
    steps, expected = list(runs.read_steps(store, story.run_id)), list(runs.read_steps(store, calm))
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert [step["samples_seen"] for step in steps] == [step["samples_seen"] for step in expected]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], abs=TOLERANCE)
    name = runs.find(store, story.run_id).record.recipe["publish"]["name"]
    theirs = adapter_weights(store, "calm", folder / "calm")
    for key, weight in adapter_weights(store, name, folder / name).items():
        torch.testing.assert_close(weight, theirs[key], atol=TOLERANCE, rtol=0)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_run_outlasts_growth_drain_and_death(
    field: LocalCluster, recipe: Path, store: Store, calm: str, tmp_path: Path
) -> None:
    head = field.alive()
    field.add_node(cpus=2)
    (second,) = field.alive() - head
    story = Story(field, recipe, store, *LENGTH, "train.workers=[1, 3]", "train.resize_s=2", "train.max_failures=2")
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
    story.end()

    assert_as_calm(story, calm, tmp_path)
    events = story.events()
    begun = [event for event in events if event.state == "running"]
    said_before = {event.text: events[events.index(event) - 1].text for event in begun}
    for event in begun:
        if "moved:" in said_before[event.text]:
            assert event.steps_lost == 0, event
        assert event.steps_lost <= 2 * EVERY, event
    assert any("is being drained, and will be gone in" in event.text for event in events)
    assert any("there is room for 2 more worker(s)" in event.text for event in events)
    assert all(event.state == "saving" for event in events if "about to move" in event.text)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_random_schedule_of_twenty_events(
    field: LocalCluster, recipe: Path, store: Store, calm: str, tmp_path: Path
) -> None:
    chance = random.Random(20)
    elastic = ("train.workers=[1, 3]", "train.resize_s=2", "train.max_failures=100")
    story = Story(field, recipe, store, *LENGTH, "name=random", "publish.name=random", *elastic)
    extra: list[tuple[subprocess.Popen[bytes], str]] = []

    def kill_a_worker() -> None:
        os.kill(chance.choice(field.worker_pids(WORKER)), signal.SIGKILL)

    def add_a_node() -> None:
        before = field.alive()
        node = field.add_node(cpus=1)
        (name,) = field.alive() - before
        extra.append((node, name))

    def kill_a_node() -> None:
        extra.pop()[0].kill()

    def drain_a_node() -> None:
        drain(field, extra.pop()[1], seconds=60)

    def stop_and_resume() -> None:
        said(field, "jobs", "stop", story.run_id, "--store", store.url)
        story.driver.communicate()
        assert runs.find(store, story.run_id).state == "stopped"
        story.resume(f"train.zero={chance.choice((0, 1, 2, 3))}")

    def kill_the_driver() -> None:
        story.driver.kill()
        story.driver.communicate()
        store.delete(keys.heartbeat(story.run_id))  # as if a minute had passed
        story.resume(f"train.zero={chance.choice((0, 1, 2, 3))}")

    def damage_the_newest_checkpoint() -> None:
        step = runs.checkpoint_steps(store, story.run_id)[-1]
        key = next(item.key for item in store.list(keys.checkpoint_prefix(story.run_id, step)) if "state" in item.key)
        store.put(key, store.get(key)[:-1])
        kill_a_worker()

    for _ in range(20):
        attempts = len(runs.attempts(store, story.run_id))
        events = [kill_a_worker, stop_and_resume, kill_the_driver, damage_the_newest_checkpoint]
        events += [kill_a_node, drain_a_node] if extra else [add_a_node, add_a_node]
        event = chance.choice(events)
        if runs.find(store, story.run_id).state == "running" and field.worker_pids(WORKER):
            story.wait_for_progress()
        event()
        story.wait_for_another_attempt(attempts)
    story.end()
    assert_as_calm(story, calm, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_worker_that_stands_still_is_named_and_replaced(
    field: LocalCluster, recipe: Path, store: Store, calm: str, tmp_path: Path
) -> None:
    """SIGSTOP: the process is there and does nothing, which neither Ray nor gloo notices for half an hour."""
    node = field.add_node(cpus=1)
    story = Story(field, recipe, store, *LENGTH, "name=still", "publish.name=still", "train.workers=2", "train.zero=1")
    story.wait_for("on 2 worker(s)")
    story.wait_for_progress()
    stopped = field.worker_pids(WORKER)[0]
    os.kill(stopped, signal.SIGSTOP)
    story.wait_for("training hangs")
    (told,) = [event.text for event in story.events() if "training hangs" in event.text]
    assert "gives no sign" in told
    assert "stands at 'step " in told
    assert " > " in told, "the stack"
    assert "failure 1 of 3" in told
    story.end()
    assert_as_calm(story, calm, tmp_path)
    assert not Path(f"/proc/{stopped}").exists()
    node.kill()


@contextmanager
def limited_memory(cluster: LocalCluster, more: int) -> Iterator[None]:
    """Every training worker may have `more` bytes of address space beyond what it starts with, as a small node has."""
    ended = threading.Event()

    def watch() -> None:
        limited: set[int] = set()
        while not ended.wait(0.05):
            for pid in set(cluster.worker_pids(WORKER)) - limited:
                with suppress(OSError):  # it may have ended
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
                    most = pages * resource.getpagesize() + more
                    resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
                    limited.add(pid)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_run_out_of_memory_goes_on_with_smaller_micro_batches(field: LocalCluster, tmp_path: Path) -> None:
    """64 packs need 9 GB here, 32 about 5 and 16 about 3; the plan is told that there is more than there is."""
    model = tmp_path / "model"
    make_model(model, hidden_size=256, layers=4)
    rows = write_rows(tmp_path / "rows.jsonl", list(tasks.rows("orders-json", "train")) * 3)
    store = open_store(f"file://{tmp_path}/store")
    recipe = write_recipe(tmp_path, model, [rows], name="large", store=store.url, sequence_length=1024)
    options = ("train.steps=2", "train.global_batch=64", "cluster.memory_gb_per_worker=12", "train.max_failures=0")
    said(field, "jobs.train", str(recipe), *options, "name=small", "publish.name=small", "train.micro_batch=4")
    with limited_memory(field, more=4_500_000_000):
        said(field, "jobs.train", str(recipe), *options, "train.micro_batch=64")
    (large, small) = runs.run_ids(store)
    told = [event.text for event in runs.read_events(store, large) if "out of memory" in event.text]
    assert "train.micro_batch is 32 from now on; the global batch stays" in told[0]
    last = runs.attempts(store, large)[-1]
    assert last.micro_batch == 64 >> len(told)
    losses = [[step["loss"] for step in runs.read_steps(store, run_id)] for run_id in (large, small)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
