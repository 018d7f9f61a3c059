"""The plan's memory beside that of real workers: predicted and measured peak of each cell of a table.

    scripts/bench plan [--json] [--only TEXT] [--quick]

A cell is a model × method × sequence length × ZeRO stage × precision. Its workers are real ones (plan_rank.py runs all
of jobs/worker.py, in processes of their own, over gloo) on packs that are full and supervised throughout, which is the
worst case and what the plan states; they make three steps of two micro-batches and save after each. Measured is the
largest resident memory that the kernel saw of a worker (VmHWM), predicted is `total_bytes` of
`luthier jobs plan --json` for the same recipe. GPUs are not measured.

`ratio` is predicted ÷ measured. `worst_error` is the largest distance from 1 of any cell: ours, beside the 0.15 that is
the goal.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from cluster import env, keys, logs, models, records
from cluster.config import load
from cluster.errors import LuthierError, RunFailed
from cluster.models import read_shape
from cluster.nodes import LocalCluster
from cluster.processes import free_ports
from cluster.records import DatasetManifest
from cluster.store import Store, open_store
from jobs.attempts import prepare_environment
from jobs.config import Recipe
from jobs.dataset import SCHEMA
from jobs.memory import peak
from scripts.benchmarks import workload
from scripts.benchmarks.report import REPOSITORY, Measure, show

GOAL = 0.15
MIB = 1 << 20
STEPS, MICRO_BATCHES = 3, 2
TIMEOUT_S = 300
UNIT = "MiB"


@dataclass(frozen=True)
class Cell:
    """One run. `shape` is a name in SHAPES."""

    shape: str
    method: str
    length: int
    zero: int
    dtype: str
    workers: int = 1
    checkpointing: bool = False

    @property
    def name(self) -> str:
        parts = (self.shape, self.method, self.length, f"zero{self.zero}", f"{self.workers}w", self.dtype)
        return "_".join(map(str, parts)) + ("_recompute" if self.checkpointing else "")


SHAPES = {
    "qwen40m": workload.Shape(hidden_size=512, layers=8, heads=8, vocabulary=32_768),
    "llama89m": workload.Shape(hidden_size=768, layers=6, heads=12, vocabulary=32_768, family="llama"),
    "tiny": workload.QUICK,
}
"""40 million parameters, 17 of them in an embedding that is also the output layer; 89 million, 50 in two embeddings."""

CELLS = (
    Cell("qwen40m", "lora", 512, 0, "fp32"),
    Cell("qwen40m", "lora", 1024, 0, "fp32"),
    Cell("qwen40m", "lora", 2048, 0, "fp32"),
    Cell("qwen40m", "lora", 1024, 0, "bf16"),
    Cell("qwen40m", "lora", 2048, 0, "fp32", checkpointing=True),
    Cell("qwen40m", "full", 512, 0, "fp32"),
    Cell("qwen40m", "full", 1024, 0, "bf16"),
    Cell("qwen40m", "full", 1024, 0, "bf16", checkpointing=True),
    Cell("llama89m", "lora", 1024, 0, "fp32"),
    Cell("llama89m", "full", 512, 0, "fp32"),
    Cell("llama89m", "lora", 2048, 0, "bf16"),
    Cell("qwen40m", "full", 512, 1, "fp32", workers=2),
    Cell("qwen40m", "full", 1024, 2, "fp32", workers=2),
    Cell("qwen40m", "full", 512, 2, "bf16", workers=2),
    Cell("qwen40m", "lora", 1024, 3, "fp32", workers=2),
    Cell("qwen40m", "full", 512, 3, "fp32", workers=2),
)
QUICK = (Cell("tiny", "lora", 512, 0, "fp32"), Cell("tiny", "full", 512, 2, "bf16", workers=2))


class Bench:
    """Models, data and a store in one folder, and one Ray head for all cells."""

    def __init__(self, folder: Path, cluster: LocalCluster) -> None:
        self._folder = folder
        self._cluster = cluster
        self._store = open_store(f"file://{folder}/store")

    def run(self, cell: Cell) -> Measure:
        """Predict, train, compare. Raises RunFailed."""
        model = self._folder / cell.shape
        if not model.exists():
            workload.write_model(model, SHAPES[cell.shape])
        path = self._folder / f"{cell.name}.yaml"
        path.write_text(yaml.safe_dump(self._recipe(cell, model)))
        recipe = load(path, Recipe)
        predicted = peak(recipe, read_shape(model), cell.zero).total
        task = {
            "address": self._cluster.address,
            "run_id": cell.name.replace("_", "-"),
            "recipe": str(path),
            "base": models.pin(recipe.model, self._store).model_dump(mode="json"),
            "zero": cell.zero,
            "dataset": write_dataset(self._store, self._folder, cell.length, SHAPES[cell.shape].vocabulary),
        }
        measured = self._train(cell, task)
        notes = {"before_mib": measured["before_bytes"] / MIB}
        return Measure(cell.name, UNIT, [predicted / MIB], [measured["peak_bytes"] / MIB], notes)

    def _recipe(self, cell: Cell, model: Path) -> dict[str, Any]:
        return {
            "name": "bench-plan",
            "model": {"name": cell.shape, "source": str(model), "licence": "apache-2.0", "dtype": cell.dtype},
            "cluster": {"name": "here", "address": "local", "memory_gb_per_worker": 64.0},
            "store": self._store.url,
            "data": {"train": ["none.jsonl"], "sequence_length": cell.length},
            "method": {"kind": "lora", "rank": 16} if cell.method == "lora" else {"kind": "full"},
            "train": {
                "steps": STEPS,
                "global_batch": MICRO_BATCHES * cell.workers,
                "workers": cell.workers,
                "zero": cell.zero,
                "activation_checkpointing": cell.checkpointing,
            },
            "optimizer": {"learning_rate": 1e-4},
            "checkpoint": {"every_steps": 1, "keep_last": 1},
        }

    def _train(self, cell: Cell, task: dict[str, Any]) -> dict[str, Any]:
        (port,) = free_ports(1)
        out = self._folder / f"{cell.name}.json"
        variables = {
            **self._cluster.environment(),
            "WORLD_SIZE": str(cell.workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "scripts.benchmarks.plan_rank", json.dumps(task), str(out)]
        ranks = [
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(cell.workers)
        ]
        try:
            said = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            raise RunFailed(f"cell {cell.name} took more than {TIMEOUT_S} s") from None
        finally:
            for rank in ranks:
                rank.kill()
        if any(rank.returncode for rank in ranks):
            raise RunFailed(f"cell {cell.name} failed:\n{''.join(said)[-4_000:]}")
        measured: dict[str, Any] = json.loads(out.read_text())
        return measured


def write_dataset(store: Store, folder: Path, length: int, vocabulary: int) -> str:
    """Samples of a half and two quarters of a sequence, all but their first token supervised. Returns the digest."""
    digest = f"full-{length}-{vocabulary}"
    if store.exists(keys.dataset_manifest(digest)):
        return digest
    draw = np.random.default_rng(0)
    lengths = [length // 2, length // 4, length // 4] * (2 * STEPS * MICRO_BATCHES)
    rows = [
        {"input_ids": draw.integers(0, vocabulary, count).tolist(), "supervised": [False] + [True] * (count - 1)}
        for count in lengths
    ]
    path = folder / f"{digest}.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    key = keys.dataset_shard(digest, 0)
    store.upload(path, key)
    manifest = DatasetManifest(
        digest=digest,
        files=(records.describe_file(path, key.removeprefix(keys.dataset_prefix(digest))),),
        samples=len(rows),
        tokens=sum(lengths),
        supervised_tokens=sum(lengths) - len(lengths),
        skipped={},
        created_at=records.now(),
    )
    store.put(keys.dataset_manifest(digest), manifest.to_bytes())
    return digest


def measure(folder: Path, cells: tuple[Cell, ...]) -> Iterator[Measure]:
    """Each cell in turn, and at last the worst of them. Raises LuthierError."""
    variables = {env.LUTHIER_CACHE: str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    errors = []
    with LocalCluster(head_cpus=2, variables=variables) as cluster:
        bench = Bench(folder, cluster)
        for cell in cells:
            found = bench.run(cell)
            errors.append(abs(found.ratio - 1))
            print(
                f"{cell.name}: {found.ours[0]:,.0f} {UNIT} predicted, {found.peer[0]:,.0f} measured, "
                f"{found.ratio - 1:+.1%}",
                file=sys.stderr,
                flush=True,
            )
            yield found
    yield Measure("worst_error", "share, less is better", [max(errors)], [GOAL])


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench plan", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--quick", action="store_true", help="two tiny cells: does it work at all?")
    given = parser.parse_args()
    cells = tuple(cell for cell in (QUICK if given.quick else CELLS) if given.only in cell.name)
    if not cells:
        parser.error(f"no cell has {given.only!r} in its name; there are: {', '.join(cell.name for cell in CELLS)}")
    try:
        with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
            os.environ[env.LUTHIER_CACHE] = f"{name}/cache"
            prepare_environment("cpu")
            measures = list(measure(Path(name), cells))
    except LuthierError as error:
        return logs.fail(error)
    show("Peak memory of a worker, predicted (ours) beside measured (peer)", measures, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
