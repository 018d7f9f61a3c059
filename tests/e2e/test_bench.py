"""`scripts/bench` works and says what DESIGN.md promises. Its figures are for people: no test looks at them."""

import json
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BENCH = REPOSITORY / "scripts" / "bench"


def test_train_prints_one_json_object_with_its_measures() -> None:
    finished = subprocess.run([BENCH, "train", "--quick", "--json"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    said = json.loads(finished.stdout)
    wanted = {"bare_loop"} | (
        {"trl", "trl_tuned"} if (REPOSITORY / ".venv-trl" / "requirements-trl.txt").exists() else set()
    )
    assert set(said) == wanted | {"machine", "commit", "date"}
    for name in wanted:
        figures = said[name]
        assert figures["unit"] == "tokens per CPU-second"
        assert figures["ours"] > 0
        assert figures["ratio"] == round(figures["ours"] / figures["peer"], 3) or figures["rounds"] == 1
        assert figures["ratio_min"] <= figures["ratio"] <= figures["ratio_max"]
    assert 0 <= said["bare_loop"]["loss_difference_max"] <= 1e-3


@pytest.mark.long
def test_checkpoint_prints_one_json_object_with_its_measures() -> None:
    finished = subprocess.run([BENCH, "checkpoint", "--quick", "--json"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    said = json.loads(finished.stdout)
    wanted = {
        *("stall", "stall_full", "stall_over_copy", "uploaded_bytes"),
        *("upload_throughput", "restore_throughput", "seek_s", "recovery_s"),
    }
    assert set(said) == wanted | {"machine", "commit", "date", "server"}
    for name in wanted:
        assert said[name]["ours"] > 0
        assert said[name]["peer"] > 0
        assert said[name]["ratio_min"] <= said[name]["ratio"] <= said[name]["ratio_max"]
    for name in ("zero_1", "zero_3"):
        assert 1.0 <= said["uploaded_bytes"][name] < 1.1
    recovery = said["recovery_s"]
    parts = ("notice_s", "place_s", "prepare_s", "step_s")
    assert recovery["ours"] >= 0.99 * sum(recovery[part] for part in parts)
    assert recovery["resumed_at_step"] > 0


@pytest.mark.long
def test_serve_prints_the_cold_start_by_part() -> None:
    command = [BENCH, "serve", "--quick", "--json", "--only", "cold"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    said = json.loads(finished.stdout)
    parts = ("resolve", "fetch", "verify", "place", "first_token", "whole")
    assert set(said) == {f"cold_start_{part}_ms" for part in parts} | {"machine", "commit", "date", "store"}
    for part in parts:
        figures = said[f"cold_start_{part}_ms"]
        assert figures["ours"] > 0
        assert figures["peer"] > 0
        assert figures["ratio_min"] <= figures["ratio"] <= figures["ratio_max"]


@pytest.mark.long
def test_quantized_prints_one_json_object_with_its_measures() -> None:
    finished = subprocess.run([BENCH, "quantized", "--quick", "--json"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    said = json.loads(finished.stdout)
    kinds = ("bf16", "int8", "nf4", "int8_bf16", "nf4_bf16")
    wanted = {f"{kind}_quick{part}" for kind in kinds for part in ("", "_mixed", "_bytes")}
    assert set(said) == wanted | {"machine", "commit", "date"}
    assert all(said[name]["ours"] > 0 and said[name]["peer"] > 0 for name in wanted)
    assert said["nf4_quick_bytes"]["ratio"] < said["int8_quick_bytes"]["ratio"] < 1


@pytest.mark.long
def test_plan_prints_one_json_object_with_a_measure_for_each_cell() -> None:
    finished = subprocess.run([BENCH, "plan", "--quick", "--json"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    said = json.loads(finished.stdout)
    cells = {"tiny_lora_512_zero0_1w_fp32", "tiny_full_512_zero2_2w_bf16"}
    assert set(said) == cells | {"worst_error", "machine", "commit", "date"}
    errors = [abs(said[cell]["ratio"] - 1) for cell in cells]
    assert said["worst_error"]["ours"] == pytest.approx(max(errors), abs=1e-3)
    assert said["worst_error"]["peer"] == 0.15


def test_alone_it_lists_the_benchmarks_and_an_unknown_one_is_refused() -> None:
    alone = subprocess.run([BENCH], capture_output=True, text=True, check=True)
    assert "train" in [line.split()[0] for line in alone.stdout.splitlines()]
    unknown = subprocess.run([BENCH, "../train"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "no benchmark '../train'" in unknown.stderr
