"""A run that is killed, resumed elsewhere, stopped and resumed again ends as one that was left alone."""

import json
import os
import signal
import time
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cluster import keys, ledger, registry
from cluster.nodes import LocalCluster
from cluster.store import Store, open_store
from jobs import lineage, runs
from jobs.pulse import LOOK_S
from tests.conftest import TinyModels
from tests.e2e.conftest import Pair
from tests.e2e.submit import adapter_weights, said, start, until, write_recipe


class Survivor(NamedTuple):
    """The run, and when its first driver was killed, in milliseconds since 1970."""

    store: Store
    run_id: str
    killed_ms: float


@pytest.fixture(scope="module")
def survivor(
    ray_cluster: LocalCluster,
    tiny_models: TinyModels,
    rows: Path,
    pair: Pair,
    tmp_path_factory: pytest.TempPathFactory,
) -> Survivor:
    """48 steps in three parts: its driver killed on one worker; on two with ZeRO-3, stopped; on two with ZeRO-1."""
    folder = tmp_path_factory.mktemp("survivor")
    store = open_store(f"file://{folder}/store")
    recipe = write_recipe(folder, tiny_models["qwen3"], [rows], name="survivor", store=store.url)
    counted = ("project=acme", "limits.ledger_s=1", "cluster.prices.cpu=0.04")
    driver = start(ray_cluster, "jobs.train", str(recipe), "train.steps=48", "checkpoint.every_steps=2", *counted)
    until(lambda: any("manifest" in item.key for item in store.list(keys.runs_prefix())), driver)
    os.kill(driver.pid, signal.SIGKILL)
    killed_ms = 1000 * time.time()
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
    return Survivor(store, run_id, killed_ms)


def test_it_ends_as_if_nothing_had_happened(survivor: Survivor, pair: Pair, tmp_path: Path) -> None:
    store, run_id, _ = survivor
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


def test_the_log_tells_what_happened(survivor: Survivor, ray_cluster: LocalCluster) -> None:
    store, run_id, _ = survivor
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


def test_the_ledger_counts_what_the_log_tells(survivor: Survivor, ray_cluster: LocalCluster) -> None:
    """Of three drivers: from between its start and its workers' first step, to its end, or to just before its death."""
    store, run_id, killed_ms = survivor
    found = runs.find(store, run_id)
    entries = runs.ledger_entries(store, found.record)
    at = [ledger.to_ms(event.at) for event in found.events]  # whole seconds, cut off
    spans = [(at[0], at[1], killed_ms), (at[2], at[3], at[5]), (at[6], at[7], at[8])]
    late_ms = [1000 * (1 + 2 * LOOK_S), 1000, 1000]  # the interval, and the pulse's own
    drivers = [list(group) for _, group in groupby(entries, key=lambda entry: entry.driver)]
    assert len(drivers) == 3
    for entries_of, workers, (begins, trains, ends), late in zip(drivers, (1, 2, 2), spans, late_ms, strict=True):
        first, last = ledger.to_ms(entries_of[0].since), ledger.to_ms(entries_of[-1].until)
        assert begins <= first <= trains + 1000
        assert ends - late <= last <= ends + 1000
        assert [one.until for one in entries_of[:-1]] == [other.since for other in entries_of[1:]], "no gap"
        assert {sum(line.amount for line in entry.lines) for entry in entries_of} == {workers}
        assert ledger.total(entries_of).cpu_ms == workers * (last - first)
    total = ledger.total(entries).to_dict()
    assert total["usd"] == pytest.approx(0.04 * total["cpu_hours"])
    shown = json.loads(said(ray_cluster, "jobs", "show", run_id, "--store", store.url))["cost"]
    assert shown == {**total, "by_market": {"unlabelled": total}}
    since = ("--since", found.record.created_at[:10])
    rows = json.loads(said(ray_cluster, "cluster", "costs", "--store", store.url, "--by", "project", *since, "--json"))
    assert {"project": "acme", **total} in rows


def test_what_cannot_be_resumed_is_refused(survivor: Survivor, ray_cluster: LocalCluster) -> None:
    store, run_id, _ = survivor
    store_option = ("--store", store.url)
    assert "has succeeded: there is nothing" in said(ray_cluster, "jobs", "resume", run_id, *store_option, code=2)
    assert "no run 'nobody' in" in said(ray_cluster, "jobs", "resume", "nobody", *store_option, code=2)
    assert "its state is succeeded" in said(ray_cluster, "jobs", "stop", run_id, *store_option, code=2)
    runs.tell(store, run_id, "for this test", "stopped")
    changed = said(ray_cluster, "jobs", "resume", run_id, "optimizer.learning_rate=1", *store_option, code=2)
    assert "a run goes on as it began; only train.workers" in changed
    runs.tell(store, run_id, "for this test", "succeeded")


def test_an_export_is_whole_or_not_there(survivor: Survivor, ray_cluster: LocalCluster, tmp_path: Path) -> None:
    store, _, _ = survivor
    export = ("jobs", "export", "survivor", "--store", store.url)
    said(ray_cluster, *export, str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "cannot write /proc/out" in said(ray_cluster, *export, "/proc/out", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_run_starts_from_a_checkpoint(
    survivor: Survivor, ray_cluster: LocalCluster, tiny_models: TinyModels, rows: Path, tmp_path: Path
) -> None:
    store, run_id, _ = survivor
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="branch", store=store.url)
    start_at = ("jobs.train", str(recipe), "train.steps=100", "limits.hours=1e-5", f"from={run_id}")
    assert "from: method.rank: " in said(ray_cluster, *start_at, "method.rank=4", code=2)
    assert "no such checkpoint" in said(ray_cluster, *start_at[:-1], f"from={run_id}@3", code=2)
    assert "no such checkpoint" in said(ray_cluster, *start_at[:-1], f"from={run_id}@", code=2)
    line = json.loads(said(ray_cluster, *start_at, code=1).splitlines()[-1])
    step = next(runs.read_steps(store, line["run_id"]))
    before = list(runs.read_steps(store, run_id))
    assert step["loss"] < before[8]["loss"], "the first step begins where 48 steps had come to"
    record = runs.find(store, line["run_id"]).record
    assert record.parent
    assert (record.parent.run_id, record.parent.step) == (run_id, 48)

    assert line["state"] == "stopped", "its limit was used up before its first step"
    assert runs.checkpoint_steps(store, line["run_id"]) == [line["step"]]
    assert line["step"] < 100
    assert any("limits.hours 1e-05 is reached" in event.text for event in runs.read_events(store, line["run_id"]))
    again = ("jobs", "resume", line["run_id"], "--store", store.url)
    assert "`luthier jobs resume " in said(ray_cluster, *again, code=2)
    assert "cluster.prices.cpu: has no price" in said(ray_cluster, *again, "--max-cost", "5", code=2)
    resumed = json.loads(said(ray_cluster, *again, "--max-hours", "1").splitlines()[-1])
    assert (resumed["state"], resumed["step"]) == ("succeeded", 100)

    root = lineage.trace(store, "branch@1")
    met = [(node.kind, node.name) for node in root.walk()]
    for expected in (("checkpoint", f"{run_id}@48"), ("adapter", "survivor@1"), ("run", run_id), ("file", str(rows))):
        assert expected in met
    question = json.loads(rows.read_text().splitlines()[7])["messages"][0]["content"]
    forget = ("jobs", "data", "forget", "--contains", question, "--store", store.url, "--json")
    learned = json.loads(said(ray_cluster, *forget))
    assert {each["adapter"] for each in learned["adapters"]} == {"survivor@1", "branch@1"}


def test_two_runs_are_compared(survivor: Survivor, ray_cluster: LocalCluster) -> None:
    store, run_id, _ = survivor
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
