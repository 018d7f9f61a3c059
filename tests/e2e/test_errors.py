"""A person's mistakes, through the command line: one clear message, the right exit code, and nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.nodes import LocalCluster
from cluster.processes import free_ports
from scripts.demo import tasks
from tests.conftest import TinyModels
from tests.e2e.submit import ROOT, write_recipe, write_rows
from tests.servers import S3Server

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", list(tasks.rows("orders-json", "train"))[:40])


@pytest.fixture
def recipe(tmp_path: Path, tiny_models: TinyModels, rows: Path) -> Path:
    return write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="mistakes", store=f"file://{tmp_path}/store")


@pytest.fixture
def run(ray_cluster: LocalCluster, tmp_path: Path) -> Command:
    """Run the driver here, joined to the tests' cluster; afterwards no run may be in the folder store."""

    def run_driver(recipe: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.train", str(recipe), *overrides],
            cwd=ROOT,
            env={**ray_cluster.environment(), "RAY_ADDRESS": ray_cluster.address, **variables},
            capture_output=True,
            text=True,
        )
        written = [
            str(path) for kind in ("runs", "adapters", "aliases") for path in tmp_path.glob(f"store/{kind}/**/*")
        ]
        assert not written
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run_driver


def refused(done: subprocess.CompletedProcess[str], *wanted: str, code: int = 2) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    (message,) = re.split(r"^error: ", done.stderr, flags=re.MULTILINE)[1:]  # Ray has errors of its own to tell
    for text in wanted:
        assert text in message, message
    assert not done.stdout.rstrip().endswith("}")


def test_wrong_keys_and_types_are_told_together(run: Command, recipe: Path) -> None:
    done = run(recipe, "data.sequence_lenght=10", "train.steps=many", "optimizer.learning_rate=-1")
    refused(
        done,
        "3 faults in the config",
        "data.sequence_lenght: unknown key; did you mean 'sequence_length'?",
        'train.steps: got "many"; input should be a valid integer',
        "optimizer.learning_rate: got -1; input should be greater than 0",
    )


def test_a_missing_recipe(run: Command, tmp_path: Path) -> None:
    refused(run(tmp_path / "none.yaml"), "none.yaml: no such file; give the path of a .yaml file")


def test_no_recipe_at_all() -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.train"], cwd=ROOT, capture_output=True, text=True)
    refused(done, "write python -m jobs.train RECIPE.yaml key=value")


def test_a_missing_data_file(run: Command, recipe: Path) -> None:
    refused(run(recipe, "data.train=[nowhere.jsonl]"), "data file nowhere.jsonl", "there is no such file")


def test_malformed_rows_are_named_by_file_and_line(run: Command, recipe: Path, rows: Path) -> None:
    lines = rows.read_text().splitlines()
    lines[6] = lines[6][:-5]
    lines[9] = '{"messages": [{"role": "user", "content": "hello"}]}'
    rows.write_text("\n".join(lines))
    done = run(recipe)
    refused(done, "2 of 40 rows cannot be used", f"{rows}:7: ", f"{rows}:10: ", "raise data.max_unusable")
    assert not [path for path in (rows.parent / "store" / "datasets").rglob("*") if path.is_file()]


def test_some_bad_rows_are_allowed_when_asked_for_and_still_reported(
    run: Command, recipe: Path, rows: Path, tmp_path: Path
) -> None:
    rows.write_text(rows.read_text() + "{\n")
    # The bad evaluation file ends the run after the training rows have been looked at, and before it begins.
    empty = write_rows(tmp_path / "empty.jsonl", [{"nothing": 1}])
    done = run(recipe, "data.max_unusable=0.1", f"data.evaluation=[{empty}]")
    assert f"warning: left out {rows}:41: " in done.stdout
    assert "1 row(s) left out" in done.stdout
    refused(done, f"{empty}:1: ", "nothing is left to train on")


def test_an_unknown_model(run: Command, recipe: Path, tmp_path: Path) -> None:
    refused(run(recipe, "model=qwen4"), "no file", "qwen4.yaml")
    refused(run(recipe, f"model.source={tmp_path}/nothing"), "is not a model folder")
    refused(run(recipe, "model.source=store"), "holds no model tiny-test; its models: none")
    refused(run(recipe, "model.source=owner/name"), "is a Hub id: pin it with revision")
    hub = run(recipe, "model.source=owner/name", f"model.revision={'a' * 40}")
    refused(hub, "neither in the store nor reachable on the Hub", "luthier cluster models add")


def test_no_chat_template(run: Command, recipe: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_models["qwen3"], folder)
    (folder / "chat_template.jinja").unlink()
    refused(run(recipe, f"model.source={folder}"), "chat template")


def test_an_unreachable_store_is_no_fault_of_the_input(run: Command, recipe: Path, s3: S3Server) -> None:
    (port,) = free_ports(1)
    done = run(recipe, f"store=s3://{s3.bucket}/x", **{**s3.env, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
    refused(done, f"127.0.0.1:{port}", "AWS_ENDPOINT_URL", code=1)


def test_wrong_credentials(run: Command, recipe: Path, s3: S3Server) -> None:
    done = run(recipe, f"store=s3://{s3.bucket}/x", **{**s3.env, "AWS_SECRET_ACCESS_KEY": "wrong-secret-value"})
    refused(done, s3.bucket, "AWS_SECRET_ACCESS_KEY")
    assert "wrong-secret-value" not in done.stdout + done.stderr


def test_a_missing_bucket_and_a_wrong_address(run: Command, recipe: Path, s3: S3Server) -> None:
    refused(run(recipe, "store=s3://no-such-bucket/x", **s3.env), "no-such-bucket")
    refused(run(recipe, "store=ftp://x/y"), "write s3://bucket/prefix or file:///absolute/folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(run: Command, recipe: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(run(recipe, f"store=file://{locked}/store"), str(locked))


def test_a_file_where_the_store_should_be(run: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    done = run(recipe, f"store=file://{tmp_path}/taken/store")
    assert done.returncode in (1, 2)
    assert f"{tmp_path}/taken" in done.stderr


def test_a_cluster_that_is_too_small(run: Command, recipe: Path) -> None:
    refused(run(recipe, "train.workers=9"), "the job needs 9 workers of 1 CPU each", "has room for 4", "add nodes")
    refused(run(recipe, "cluster.accelerator=gpu"), "1 workers of 1 CPU, 1 GPU each", "room for 0")


def test_a_model_that_does_not_fit(run: Command, recipe: Path) -> None:
    refused(run(recipe, "cluster.memory_gb_per_worker=1e-3"), "tiny-test needs", "no change of the recipe")


def test_no_cluster_to_join(run: Command, recipe: Path) -> None:
    (port,) = free_ports(1)
    refused(run(recipe, f"cluster.address=127.0.0.1:{port}"), f"cannot join the Ray cluster at 127.0.0.1:{port}")
    refused(run(recipe, RAY_ADDRESS=""), "RAY_ADDRESS is not set")


def test_a_wrong_token(run: Command, recipe: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    refused(run(recipe, RAY_AUTH_TOKEN_PATH=str(token)), "cannot join the Ray cluster", "RAY_AUTH_TOKEN_PATH")


def test_targets_that_the_model_does_not_have(run: Command, recipe: Path) -> None:
    refused(run(recipe, "method.targets=[w_pack]"), "no linear layer called w_pack; it has: down_proj")


def test_rows_that_a_template_would_spoil_are_named_by_file_and_line(
    run: Command, recipe: Path, rows: Path, tmp_path: Path
) -> None:
    """Some of tests/jobs/test_known_bad.py, by the whole command."""
    lines = rows.read_text().splitlines()
    asked, answered = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi", "weight": 0}
    lines[1] = json.dumps({"messages": [asked, answered]})
    lines[3] = json.dumps({"messages": [asked, answered | {"weight": 1, "reasoning_content": "a greeting"}]})
    lines[5] = json.dumps({"messages": [asked, {"role": "assistant", "content": "<|im_end|>"}]})
    rows.write_text("\n".join(lines))
    done = run(recipe)
    refused(done, "3 of 40 rows", f"{rows}:2: no assistant turn", f"{rows}:4: turn 2: the", f"{rows}:6: turn 2: holds")
    assert "leaves out the reasoning" in done.stderr


def test_a_template_whose_answers_never_end_is_named_with_the_row_that_needs_it(
    run: Command, recipe: Path, rows: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_models["qwen3"], folder)
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        eos = {"eos_token": "<|pad|>"} if name == "tokenizer_config.json" else {"eos_token_id": 0}
        (folder / name).write_text(json.dumps(settings | eos))
    done = run(recipe, f"model.source={folder}")
    refused(
        done, f"{rows}:1: ", "ends it with '<|im_end|>', at which generation does not stop", "generation_config.json"
    )
