"""What came of real runs can be answered for: done again with the same losses, and traced to the end."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import keys, registry
from cluster.nodes import LocalCluster
from jobs import lineage, runs
from tests.e2e.conftest import Pair
from tests.e2e.submit import said
from tests.jobs.commands import luthier
from tests.jobs.family import add


def test_a_published_adapter_is_reproduced(pair: Pair, ray_cluster: LocalCluster) -> None:
    store = pair.store
    before = registry.names(store), registry.alias_state(store, "pair-one")
    printed = said(ray_cluster, "jobs", "reproduce", "pair-one@1", "--store", store.url)
    line = json.loads(printed.splitlines()[-1])
    assert line["reproduces"] == pair.one["run_id"]
    assert (line["state"], line["steps_compared"], line["is_reproduced"], line["adapter"]) == (
        "succeeded",
        48,
        True,
        None,
    )
    assert line["largest_difference"] <= 1e-4, printed
    losses = [step["loss"] for step in runs.read_steps(store, line["run_id"])]
    assert max(abs(one - other) for one, other in zip(losses, pair.losses(pair.one), strict=True)) <= 1e-4
    ours, theirs = (runs.find(store, run_id).record for run_id in (line["run_id"], pair.one["run_id"]))
    assert ours.reproduces == theirs.run_id
    assert (ours.dataset, ours.base, ours.sources) == (theirs.dataset, theirs.base, theirs.sources)
    assert (registry.names(store), registry.alias_state(store, "pair-one")) == before, "nothing was published"


def test_an_adapter_merged_into_its_base_is_a_model_that_knows_where_it_comes_from(pair: Pair, tmp_path: Path) -> None:
    store, folder = pair.store, tmp_path / "merged"
    luthier("jobs", "export", "pair-one@1", str(folder), "--merge", "--store", store.url)
    record = registry.record(store, "pair-one", 1)
    (tmp_path / "probe").write_bytes(store.get(keys.adapter_file("pair-one", 1, "probe.safetensors")))
    probe = load_file(tmp_path / "probe")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(probe["input_ids"]).logits[0, -1], probe["logits"], atol=1e-3, rtol=0)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.license, card.data.base_model_relation) == (
        "tiny-test",
        "apache-2.0",
        "merge",
    )
    assert record.digest in card.content
    assert "credit tiny-test, its licence and that it was changed" in (folder / "NOTICE").read_text()
    assert (folder / "LICENSE.Apache-2.0.txt").exists()

    base = add(store, "pair-merged", folder)
    root = lineage.trace(store, f"pair-merged@{base.revision[:8]}")
    met = [(node.kind, node.name) for node in root.walk() if not node.again]
    run = runs.find(store, record.run_id).record
    for expected in (
        ("adapter", "pair-one@1"),
        ("run", record.run_id),
        ("base", "tiny-test"),
        ("data", run.dataset),
        ("file", run.sources[0].name),
    ):
        assert expected in met
    assert not [node for node in root.walk() if node.broken]


def test_what_was_published_has_a_card(pair: Pair) -> None:
    card = ModelCard(pair.store.get(keys.adapter_file("pair-two", 1, "README.md")).decode())
    assert (card.data.base_model, card.data.library_name, card.data.license) == ("tiny-test", "peft", "apache-2.0")
    losses = pair.losses(pair.two)
    assert f"| training, first step | {losses[0]:.4f} |" in card.content
    assert f"| training, last of 8 steps | {losses[-1]:.4f} |" in card.content
    run = runs.find(pair.store, pair.two["run_id"]).record
    assert run.digests
    assert run.digests.config in card.content
    assert run.code_revision.startswith("sha256:"), "it ran from a directory that was sent to the cluster"


@pytest.mark.long
def test_two_sharded_workers_are_reproduced_by_a_submitted_job(pair: Pair, ray_cluster: LocalCluster) -> None:
    options = ("--store", pair.store.url, "--address", ray_cluster.dashboard_url, "--publish", "pair-again")
    printed = said(ray_cluster, "jobs", "reproduce", pair.two["run_id"], *options)
    line = json.loads([each for each in printed.splitlines() if each.startswith("{")][-1])
    assert (line["reproduces"], line["steps_compared"], line["is_reproduced"]) == (pair.two["run_id"], 8, True)
    assert line["adapter"] == "pair-again@1"
    assert runs.attempts(pair.store, line["run_id"])[0].world_size == 2
    assert registry.alias_state(pair.store, "pair-again") is None
