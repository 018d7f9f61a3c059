"""The evaluation gate on real parts: a run's own release, a damaged version that is stopped, a good one promoted."""

import json
from itertools import islice
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster import evaluation, keys, records, registry
from cluster.errors import ReleaseRefused
from cluster.nodes import LocalCluster
from cluster.records import AdapterRecord
from cluster.store import Store, open_store
from jobs import runs
from scripts.demo import tasks
from tests.conftest import TinyModels
from tests.e2e.conftest import Pair
from tests.e2e.submit import luthier, said, train, write_recipe, write_rows


def test_a_run_is_released_by_its_report(pair: Pair) -> None:
    assert pair.one["promoted"] is True
    record = registry.resolve(pair.store, "pair-one")
    report = evaluation.newest(pair.store, record)
    assert report
    assert report.passed
    assert record.gate == report.requirement
    assert record.gate.settings["loss"]["max_loss"] == 4
    assert report.against is None
    named = {measure.name: measure for measure in report.measures}
    assert set(named) == {"loss", "increase over stable", "share worse than stable", "share answered safely"}
    assert named["loss"].value == pytest.approx(pair.one["metrics"]["evaluation_loss"], abs=1e-4), (
        "as the trainer has it"
    )
    told = [event.text for event in runs.read_events(pair.store, pair.one["run_id"])]
    assert "evaluation 1 of pair-one@1 passed: 4 measure(s)" in told
    assert pair.two["promoted"] is True, "asks for no evaluation"


def copy(store: Store, source: AdapterRecord, name: str, folder: Path, step: int, times: float = 1.0) -> AdapterRecord:
    """The next version of `name`: an adapter's own weights, with its low-rank products `times` as large."""
    records.fetch_files(store, keys.adapter_version_prefix(source.name, source.version), source.files, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    grown = {key: tensor * times if "lora_B" in key else tensor for key, tensor in weights.items()}
    save_file(grown, folder / "adapter_model.safetensors", {"format": "pt"})
    return registry.publish(store, name, folder, source.base, source.run_id, step, gate=source.gate)


def test_a_damaged_version_is_stopped(pair: Pair, ray_cluster: LocalCluster, tmp_path: Path) -> None:
    store, source = pair.store, registry.resolve(pair.store, "pair-one")
    for step, times in ((1, 1.0), (2, -2.0)):
        copy(store, source, "gated", tmp_path / str(step), step, times)
    registry.set_alias(store, "gated", "stable", 1, why="the first", override_gate=True)
    with pytest.raises(ReleaseRefused, match=r"gated@2 may not become gated@canary:\n.*was not evaluated by what"):
        registry.set_alias(store, "gated", "canary", 2, why="try", percent=1)

    output = said(ray_cluster, "jobs", "evaluate", "gated@2", "--store", store.url, code=1)
    assert not json.loads(output.splitlines()[-1])["passed"]
    assert "regression: " in output, "examples of what went wrong"
    refused = said(ray_cluster, "cluster", "promote", "gated@2", "--store", store.url, code=2)
    for expected in ("loss is", "increase over stable is", "share worse than stable is", "at most 0.25 is required"):
        assert expected in refused
    report = evaluation.newest(store, registry.record(store, "gated", 2))
    assert report
    assert report.against
    assert report.against.version == 1
    assert registry.resolve(store, "gated").version == 1
    assert registry.resolve(store, "gated@2").version == 2, "by its number, whoever wants to look at it"


@pytest.mark.long
def test_a_run_that_regresses_is_published_and_not_released(
    ray_cluster: LocalCluster, tiny_models: TinyModels, rows: Path, tmp_path: Path
) -> None:
    """Trained twice under one name: the second time on shuffled answers, far too fast, and then on another base."""
    store = open_store(f"file://{tmp_path}/store")
    lines = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    asking = write_rows(tmp_path / "asking.jsonl", [{"messages": messages[:-1]} for messages in lines[:6]])
    answers = [messages[-1] for messages in lines]
    mixed = [{"messages": [*each[:-1], answer]} for each, answer in zip(lines, answers[7:] + answers[:7], strict=True)]
    shuffled = write_rows(tmp_path / "shuffled.jsonl", mixed)
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="again", store=store.url)
    gate = {
        "loss": {"max_increase": 0.05},
        "regression": {"prompts": [str(asking)], "max_worse": 0.5},
        "max_tokens": 12,
    }
    unseen = write_rows(tmp_path / "unseen.jsonl", [*islice(tasks.rows("orders-json", "heldout"), 40)])
    held_out = (f"data.evaluation=[{unseen}]", f"evaluation={json.dumps(gate)}")
    first = train(ray_cluster, recipe, *held_out).result
    assert (first["adapter"], first["promoted"]) == ("again@1", True)

    bad = train(ray_cluster, recipe, *held_out, f"data.train=[{shuffled}]", "optimizer.learning_rate=0.2")
    line = json.loads([line for line in bad.output.splitlines() if line.startswith('{"run_id')][-1])
    assert (bad.code, line["state"], line["adapter"], line["promoted"]) == (1, "succeeded", "again@2", False)
    assert registry.resolve(store, "again").version == 1
    told = " ".join(event.text for event in runs.read_events(store, line["run_id"]))
    assert "the alias did not move: again@2 may not become again@stable; loss: increase over stable is" in told
    assert runs.find(store, line["run_id"]).state == "succeeded"

    asked = luthier(
        ray_cluster, "evaluate", line["run_id"], "--store", store.url, "--address", ray_cluster.dashboard_url
    )
    output, errors = asked.communicate()
    assert asked.returncode == 1, output + errors
    reports = [report.passed for report in evaluation.reports(store, "again", 2)]
    assert reports == [False, False]

    good = copy(store, registry.record(store, "again", 1), "again", tmp_path / "good", 100)
    said(ray_cluster, "jobs", "evaluate", "again@3", "--store", store.url)
    assert "again@stable is version 3" in said(ray_cluster, "cluster", "promote", "again@3", "--store", store.url)
    assert registry.resolve(store, "again") == good
    passed = evaluation.newest(store, good)
    assert passed
    named = {measure.name: measure.value for measure in passed.measures}
    assert named == {"increase over stable": 0, "share worse than stable": 0}
    assert [item.key for item in store.list(keys.evaluations_prefix("again", 3))] == [
        "adapters/again/3/evaluations/00000001.json"
    ]
    assert store.exists(keys.adapter_file("again", 3, "NOTICE"))

    other = train(ray_cluster, recipe, *held_out, f"model.source={tiny_models['llama']}", "model.name=tiny-other")
    line = json.loads([line for line in other.output.splitlines() if line.startswith('{"run_id')][-1])
    assert (other.code, line["adapter"], line["promoted"]) == (1, "again@4", False)
    report = next(evaluation.reports(store, "again", 4))
    (loss,) = [measure for measure in report.measures if measure.suite == "loss"]
    assert (loss.value, loss.passed) == (None, False)
    assert "has another base, whose losses are not comparable" in loss.note
    (regression,) = [measure for measure in report.measures if measure.suite == "regression"]
    assert regression.value is not None
