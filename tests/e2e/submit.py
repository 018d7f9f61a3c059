"""Real jobs: with the real `ray job submit`, or as processes here that can be killed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cluster import keys, records, registry
from cluster.nodes import LocalCluster
from cluster.store import Store

DEADLINE_S = 240.0
ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
started: "list[subprocess.Popen[str]]" = []


@dataclass(frozen=True)
class Submitted:
    """How a job ended: its exit code, what it printed, and its last line where that is JSON."""

    code: int
    output: str

    @property
    def result(self) -> dict[str, Any]:
        lines = [line for line in self.output.splitlines() if line.startswith("{")]
        assert self.code == 0, self.output[-4000:]
        assert lines, self.output[-4000:]
        found: dict[str, Any] = json.loads(lines[-1])
        return found


def submit(cluster: LocalCluster, *command: str) -> Submitted:
    """`ray job submit --working-dir . -- COMMAND`, to its end."""
    done = subprocess.run(command_line(*command), cwd=ROOT, env=cluster.environment(), capture_output=True, text=True)
    return Submitted(done.returncode, done.stdout + done.stderr)


def command_line(*command: str) -> list[str]:
    return [str(RAY), "job", "submit", "--working-dir", ".", "--", *command]


def train(cluster: LocalCluster, recipe: Path, *overrides: str) -> Submitted:
    return submit(cluster, "python", "-m", "jobs.train", str(recipe), *overrides)


def luthier(cluster: LocalCluster, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    """`luthier jobs …` from this checkout, as somebody who has the cluster's token."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *arguments],
        cwd=ROOT,
        env={**cluster.environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(
    folder: Path,
    model: Path | str,
    data: Sequence[Path | str],
    *,
    name: str = "test",
    store: str,
    method: str = "{kind: lora, rank: 8}",
    sequence_length: int = 256,
    learning_rate: float = 5e-3,
) -> Path:
    """A recipe of eight steps on one worker, at a constant rate; tests override the rest."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""
name: {name}
model: {{name: tiny-test, source: {model}, licence: apache-2.0, dtype: fp32}}
cluster: {{name: test, memory_gb_per_worker: 4}}
store: {store}
data: {{train: {json.dumps([str(file) for file in data])}, sequence_length: {sequence_length}}}
method: {method}
train: {{steps: 8, global_batch: 4, zero: 0}}
optimizer: {{learning_rate: {learning_rate}}}
schedule: {{kind: constant}}
publish: {{name: {name}}}
"""
    )
    return path


def start(cluster: LocalCluster, *command: str) -> subprocess.Popen[str]:
    """A driver, or any command of ours, as a process here; it is ended with the test module at the latest."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**cluster.environment(), "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started.append(process)
    return process


def said(cluster: LocalCluster, *command: str, code: int = 0) -> str:
    """What a command prints, to its end."""
    process = start(cluster, *command)
    output = process.communicate()[0]
    assert process.returncode == code, output
    return output


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a condition, as long as the process lives. It looks often: a run may be over soon."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def adapter_weights(store: Store, reference: str, folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by name."""
    record = registry.resolve(store, reference)
    records.fetch_files(store, keys.adapter_version_prefix(record.name, record.version), record.files, folder)
    loaded: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return loaded
