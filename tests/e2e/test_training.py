"""The training half of the loop on real parts: `ray job submit`, separate Ray nodes, DeepSpeed, a real S3 server."""

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import keys, records, registry
from cluster.models import ModelConfig, fetch
from cluster.nodes import LocalCluster
from cluster.records import BaseModelRef, CheckpointManifest, RunRecord
from cluster.store import Store, open_store
from jobs import lineage, runs
from jobs.data.card import Card
from jobs.progress import StepRecord
from jobs.runs import checkpoint_steps, read_events, read_steps
from tests.conftest import TinyModels
from tests.e2e.conftest import Pair
from tests.e2e.submit import ROOT, Submitted, command_line, submit, train, until, write_recipe

SHARED_DATA = ROOT.parent / "shared" / "data"


def losses(store: Store, result: dict[str, Any]) -> list[float]:
    return [step["loss"] for step in read_steps(store, result["run_id"])]


def test_one_worker_and_two_sharded_ones_train_alike(pair: Pair) -> None:
    one, two = pair.losses(pair.one), pair.losses(pair.two)
    assert (len(one), len(two)) == (48, 8)
    assert one[:8] == pytest.approx(two, abs=1e-3)
    assert one[-1] < 0.8 * one[0]


def test_the_records_say_what_happened(pair: Pair) -> None:
    store, one, two = pair.store, pair.one, pair.two
    assert one["state"] == "succeeded"
    assert (one["step"], one["store"]) == (48, store.url)
    assert (one["adapter"], two["adapter"]) == ("pair-one@1", "pair-two@1")
    run = records.read(store, keys.run_record(one["run_id"]), RunRecord)
    assert run.recipe["train"]["workers"] == 1
    assert run.prepared
    card = records.read(store, keys.prepared_card(run.prepared), Card)
    assert (card.before.rows, card.after.rows, card.model) == (300, 300, "tiny-test")
    steps = list(read_steps(store, two["run_id"]))
    assert [step["step"] for step in steps] == list(range(8))
    assert set(steps[0]) == set(StepRecord.__dataclass_fields__)
    assert steps[-1]["world_size"] == 2
    assert all(2**27 < step["memory_bytes"] < 2**34 for step in steps)
    assert all(step["supervised_tokens"] < step["tokens"] for step in steps)
    kept = checkpoint_steps(store, one["run_id"])
    assert (len(kept), kept[-1]) == (2, 48), "the last two, as the recipe's default is"
    for step in kept:
        manifest = records.read(store, keys.checkpoint_manifest(one["run_id"], step), CheckpointManifest)
        for file in manifest.files:
            data = store.get(keys.checkpoint_prefix(one["run_id"], step) + file.file)
            assert len(data) == file.size


def test_plain_peft_loads_what_was_published_and_answers_as_the_trainer(
    pair: Pair, tiny_models: TinyModels, tmp_path: Path
) -> None:
    for result in (pair.one, pair.two):
        record = registry.resolve(pair.store, result["adapter"])
        folder = tmp_path / record.name
        records.fetch_files(pair.store, keys.adapter_version_prefix(record.name, record.version), record.files, folder)
        base = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"])
        adapted = peft.PeftModel.from_pretrained(base, folder)
        probe = load_file(folder / "probe.safetensors")
        with torch.no_grad():
            logits = adapted(input_ids=probe["input_ids"]).logits[0, -1]
            with adapted.disable_adapter():
                plain = adapted(input_ids=probe["input_ids"]).logits[0, -1]
        torch.testing.assert_close(logits, probe["logits"], atol=1e-4, rtol=0)
        assert (logits - plain).abs().max() > 0.1
        assert "credit tiny-test, its licence and that it was changed" in (folder / "NOTICE").read_text()
        judged = records.read(pair.store, keys.run_record(record.run_id), RunRecord).licences
        assert judged
        assert judged.verdicts == {"train": "allowed", "serve": "allowed"}
        assert record.artefacts == judged.artefacts
        state = registry.alias_state(pair.store, record.name)
        assert state
        assert state.stable == 1


def test_a_full_fine_tune_is_a_standard_folder(
    ray_cluster: LocalCluster, tiny_models: TinyModels, rows: Path, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/store"
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="whole", store=url, method="{kind: full}")
    result = train(ray_cluster, recipe, "train.workers=2", "train.zero=2").result
    name, _, revision = result["adapter"].partition("@")
    described = ModelConfig(
        name=name, source="store", revision=revision, licence="apache-2.0", dtype="fp32", shape=None
    )
    folder = fetch(described, BaseModelRef(name=name, revision=revision, licence=""), open_store(url))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"])
    ids = tokenizer("Please send three red lamps to Mira in Oslo.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (model(ids).logits - before(ids).logits).abs().max() > 0.1
    assert {path.name for path in folder.iterdir()} >= {"NOTICE", "config.json", "model.safetensors", "tokenizer.json"}
    assert ModelCard.load(folder / "README.md").data.base_model_relation == "finetune"
    root = lineage.trace(open_store(url), result["adapter"])
    assert [node.name for node in root.walk() if node.kind == "run"] == [result["run_id"]]
    assert "tiny-test" in [node.name for node in root.walk() if node.kind == "base"]


def test_a_killed_worker_costs_a_checkpoint_interval_and_nothing_else(
    ray_cluster: LocalCluster, tiny_models: TinyModels, rows: Path, pair: Pair, tmp_path: Path
) -> None:
    """Beside the calm run of the same recipe on one worker."""
    url = f"file://{tmp_path}/store"
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="killed", store=url)
    overrides = ("train.steps=48", "checkpoint.every_steps=5", "train.workers=2", "train.zero=1")
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command_line("python", "-m", "jobs.train", str(recipe), *overrides),
            cwd=ROOT,
            env=ray_cluster.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        ) as job,
    ):
        # Seen in the store: the whole run takes seconds, and its output comes later.
        until(lambda: bool(list(tmp_path.glob("store/runs/*/checkpoints/*/manifest.json"))), job)
        os.kill(ray_cluster.worker_pids("RayTrainWorker")[0], signal.SIGKILL)
        hit = Submitted(job.wait(), log.read_text()).result
    store = open_store(url)
    assert any("failure 1 of" in event.text for event in read_events(store, hit["run_id"]))
    assert [step["step"] for step in read_steps(store, hit["run_id"])] == list(range(48))
    assert losses(store, hit) == pytest.approx(pair.losses(pair.one), abs=1e-3)


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the folder of real data sets is not beside this checkout")
@pytest.mark.parametrize(
    ("file", "count"),
    [("alpaca_en_demo.json", 999), pytest.param("glaive_toolcall_en_demo.json", 300, marks=pytest.mark.long)],
)
def test_a_real_data_set_in_full(
    ray_cluster: LocalCluster, tiny_models: TinyModels, tmp_path: Path, file: str, count: int
) -> None:
    url = f"file://{tmp_path}/store"
    recipe = write_recipe(
        tmp_path, tiny_models["qwen3"], [SHARED_DATA / file], name="real", store=url, sequence_length=16384
    )
    whole = ("train.steps=null", "train.epochs=1", "train.global_batch=2")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(train, ray_cluster, recipe, *whole, "train.workers=1", "train.zero=0")
        second = pool.submit(train, ray_cluster, recipe, *whole, "train.workers=2", "train.zero=3")
        one, two = first.result().result, second.result().result
    store = open_store(url)
    history = losses(store, one)
    assert history == pytest.approx(losses(store, two), abs=1e-3)
    assert history[-1] < history[0] - 0.2
    assert list(read_steps(store, one["run_id"]))[-1]["samples_seen"] == count


def test_an_adapter_that_learned_nothing_is_refused_once(
    ray_cluster: LocalCluster, tiny_models: TinyModels, rows: Path, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/store"
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="nothing", store=url)
    done = train(ray_cluster, recipe, "optimizer.learning_rate=1e-30", "train.steps=2", "train.workers=2")
    assert done.code == 1
    assert "adapter nothing leaves the base model's logits as they were: it learned nothing" in done.output
    assert "exit code 1" in done.output
    store = open_store(url)
    assert registry.names(store) == []
    assert not list(store.list(keys.aliases_prefix("nothing")))
    (run_id,) = {item.key.split("/")[1] for item in store.list(keys.runs_prefix())}
    assert [step["step"] for step in read_steps(store, run_id)] == [0, 1]
    assert [attempt.number for attempt in runs.attempts(store, run_id)] == [1]
    assert runs.find(store, run_id).state == "failed"


def test_the_submitted_job_says_what_is_wrong_and_exits_2(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    """Through the real CLI: the job fails with the message in its log. `ray job submit` itself exits 1."""
    done = submit(ray_cluster, "python", "-m", "jobs.train", str(tmp_path / "none.yaml"))
    assert done.code == 1
    assert "none.yaml: no such file" in done.output
    assert "exit code 2" in done.output
