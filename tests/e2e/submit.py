"""Submitting real jobs, with the real `ray job submit`, to the cluster that all tests share."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.nodes import LocalCluster

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


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


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(
    folder: Path,
    model: Path,
    data: Sequence[Path | str],
    *,
    name: str = "test",
    store: str,
    method: str = "{kind: lora, rank: 8}",
    sequence_length: int = 256,
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
optimizer: {{learning_rate: 5e-3}}
schedule: {{kind: constant}}
publish: {{name: {name}}}
"""
    )
    return path
