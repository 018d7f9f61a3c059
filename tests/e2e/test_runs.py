"""A run that is killed, resumed elsewhere, stopped and resumed again ends as one that was left alone."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from cluster import keys, registry
from cluster.nodes import LocalCluster
from cluster.store import Store, open_store
from jobs import runs
from tests.conftest import TinyModels
from tests.e2e.conftest import Pair
from tests.e2e.submit import adapter_weights, said, start, until, write_recipe


@pytest.fixture(scope="module")
def survivor(
    ray_cluster: LocalCluster,
    tiny_models: TinyModels,
    rows: Path,
    pair: Pair,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Store, str]:
    """48 steps in three parts: its driver killed on one worker; on two with ZeRO-3, stopped; on two with ZeRO-1."""
    folder = tmp_path_factory.mktemp("survivor")
    store = open_store(f"file://{folder}/store")
    recipe = write_recipe(folder, tiny_models["qwen3"], [rows], name="survivor", store=store.url)
    driver = start(ray_cluster, "jobs.train", str(recipe), "train.steps=48", "checkpoint.every_steps=2")
    until(lambda: any("manifest" in item.key for item in store.list(keys.runs_prefix())), driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    (run_id,) = runs.run_ids(store)
    refused = said(ray_cluster, "jobs", "resume", run_id, "--store", store.url, code=2)
    assert f"run {run_id} is running" in refused
    store.delete(keys.heartbeat(run_id))  # as if a minute had passed
    assert runs.find(store, run_id).state == "lost"
    assert "its state is lost" in said(ray_cluster, "jobs", "stop", run_id, "--store", store.url, code=2)

    second = start(ray_cluster, "jobs.resume", run_id, f"store={store.url}", "train.workers=2", "train.zero=3")
    until(lambda: runs.find(store, run_id).state == "resuming", second)
    assert "asked" in said(ray_cluster, "jobs", "stop", run_id, "--store", store.url)
    stopped = second.communicate()[0]
    assert second.returncode == 1, stopped
    assert json.loads(stopped.splitlines()[-1])["state"] == "stopped"
    assert runs.find(store, run_id).state == "stopped"
    assert registry.names(store) == []

    command = ("jobs", "resume", run_id, "train.zero=1", "--store", store.url, "--workers", "2")
    line = json.loads(said(ray_cluster, *command).splitlines()[-1])
    assert (line["state"], line["step"], line["adapter"]) == ("succeeded", 48, "survivor@1")
    return store, run_id


def test_it_ends_as_if_nothing_had_happened(survivor: tuple[Store, str], pair: Pair, tmp_path: Path) -> None:
    store, run_id = survivor
    steps = list(runs.read_steps(store, run_id))
    calm = list(runs.read_steps(pair.store, pair.one["run_id"]))
    assert [step["step"] for step in steps] == list(range(48))
    for name in ("samples_seen", "tokens", "supervised_tokens", "lr"):
        assert [step[name] for step in steps] == [step[name] for step in calm]
    assert {step["world_size"] for step in steps} == {1, 2}
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in calm], abs=1e-3)
    ours, theirs = (
        adapter_weights(store, "survivor", tmp_path / "ours"),
        adapter_weights(pair.store, "pair-one", tmp_path / "theirs"),
    )
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-3, rtol=0)


def test_the_log_tells_what_happened(survivor: tuple[Store, str], ray_cluster: LocalCluster) -> None:
    store, run_id = survivor
    states = [event.state for event in runs.read_events(store, run_id)]
    assert states == [
        *("preparing", "running"),
        *("resuming", "running", "saving", "stopped"),
        *("resuming", "running", "succeeded"),
    ]
    starts = runs.attempts(store, run_id)
    assert [attempt.number for attempt in starts] == [1, 2, 3]
    assert [attempt.world_size for attempt in starts] == [1, 2, 2]
    assert 0 == starts[0].first_step < starts[1].first_step < starts[2].first_step < 48
    printed = said(ray_cluster, "jobs", "logs", run_id, "--store", store.url, "--follow")
    assert [line.split()[1] for line in printed.splitlines()] == states
    (row,) = json.loads(said(ray_cluster, "jobs", "list", "--store", store.url, "--json"))
    assert (row["state"], row["steps"]) == ("succeeded", 48)
    shown = json.loads(said(ray_cluster, "jobs", "show", run_id, "--store", store.url))
    assert (shown["state"], len(shown["attempts"])) == ("succeeded", 3)


def test_what_cannot_be_resumed_is_refused(survivor: tuple[Store, str], ray_cluster: LocalCluster) -> None:
    store, run_id = survivor
    store_option = ("--store", store.url)
    assert "has succeeded: there is nothing" in said(ray_cluster, "jobs", "resume", run_id, *store_option, code=2)
    assert "no run 'nobody' in" in said(ray_cluster, "jobs", "resume", "nobody", *store_option, code=2)
    assert "its state is succeeded" in said(ray_cluster, "jobs", "stop", run_id, *store_option, code=2)
    runs.tell(store, run_id, "for this test", "stopped")
    changed = said(ray_cluster, "jobs", "resume", run_id, "optimizer.learning_rate=1", *store_option, code=2)
    assert "a run goes on as it began; only train.workers" in changed
    runs.tell(store, run_id, "for this test", "succeeded")


def test_an_export_is_whole_or_not_there(
    survivor: tuple[Store, str], ray_cluster: LocalCluster, tmp_path: Path
) -> None:
    store, _ = survivor
    export = ("jobs", "export", "survivor", "--store", store.url)
    said(ray_cluster, *export, str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "cannot write /proc/out" in said(ray_cluster, *export, "/proc/out", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_run_starts_from_a_checkpoint(
    survivor: tuple[Store, str], ray_cluster: LocalCluster, tiny_models: TinyModels, rows: Path, tmp_path: Path
) -> None:
    store, run_id = survivor
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="branch", store=store.url)
    start_at = ("jobs.train", str(recipe), "train.steps=1", f"from={run_id}")
    assert "from: method.rank: " in said(ray_cluster, *start_at, "method.rank=4", code=2)
    assert "no such checkpoint" in said(ray_cluster, *start_at[:-1], f"from={run_id}@3", code=2)
    assert "no such checkpoint" in said(ray_cluster, *start_at[:-1], f"from={run_id}@", code=2)
    line = json.loads(said(ray_cluster, *start_at).splitlines()[-1])
    (step,) = runs.read_steps(store, line["run_id"])
    before = list(runs.read_steps(store, run_id))
    assert step["loss"] < before[8]["loss"], "the first step begins where 48 steps had come to"
    record = runs.find(store, line["run_id"]).record
    assert record.parent
    assert (record.parent.run_id, record.parent.step) == (run_id, 48)


def test_two_runs_are_compared(survivor: tuple[Store, str], ray_cluster: LocalCluster) -> None:
    store, run_id = survivor
    assert said(ray_cluster, "jobs", "diff", run_id, run_id, "--store", store.url, "--json").strip() == "[]"


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_the_run_with_a_diagnosis(
    ray_cluster: LocalCluster, tiny_models: TinyModels, rows: Path, tmp_path: Path
) -> None:
    store = open_store(f"file://{tmp_path}/store")
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="wild", store=store.url, method="{kind: full}")
    output = said(ray_cluster, "jobs.train", str(recipe), "optimizer.learning_rate=1e30", code=1)
    assert "after 3 such steps in a row that were skipped; lower optimizer.learning_rate" in output
    assert "Traceback" not in output
    (run_id,) = runs.run_ids(store)
    assert runs.find(store, run_id).state == "failed"
    assert len(runs.attempts(store, run_id)) == 1
    assert not list(store.list(keys.checkpoints_prefix(run_id)))
