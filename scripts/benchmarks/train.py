"""Fine-tuning: a whole job's steps beside TRL's SFTTrainer and beside a bare torch + peft loop.

    scripts/bench train [--json] [--rounds 3] [--steps 8] [--data ROWS.json] [--quick]

All fine-tune one random 19-million-parameter Qwen3 shape (workload.py) on the same rows: LoRA of rank 16 on all
linear layers, the loss on the assistant's tokens, packs of 512 tokens, 4 packs a step, AdamW, fp32, one process with
one thread. What is measured is tokens per processor second, since that hardly depends on what else the machine does:

    ours        `python -m jobs.train`, with its private Ray, DeepSpeed, store and metrics: the steps' own records
    trl         peers/trl_train.py in .venv-trl, made at the first use (--quick leaves TRL out rather than make it);
                per_device_train_batch_size is the step's batch, as SFTTrainer is used where it fits
    trl_tuned   the same with a batch of 1, accumulated, which on a CPU is the fastest setting that we found for it
    bare_loop   peers/bare_loop.py, on the very batches that ours trained on

Padding is not counted as tokens by anyone. The first step is left out for all (--json has figures with it).
The benchmark fails when the losses of ours and of the bare loop differ by more than 1e-3 in any step: it would then
compare different work.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cluster import env, logs
from cluster.config import load
from cluster.errors import LuthierError, RunFailed
from cluster.store import open_store
from jobs import dataset
from jobs.config import Recipe
from jobs.packing import SampleSchedule
from jobs.runs import read_steps
from scripts.benchmarks import workload
from scripts.benchmarks.report import REPOSITORY, Measure, show

ROWS = 400
LOSS_TOLERANCE = 1e-3
TIMEOUT_S = 1_800
RAY_NICENESS = 15
"""Ray runs its workers so; the peers too, or on a busy machine they would be interrupted less than ours."""

UNIT = "tokens per CPU-second"
TRL_ENVIRONMENT = REPOSITORY / ".venv-trl"
TRL_REQUIREMENTS = REPOSITORY / "scripts" / "benchmarks" / "requirements-trl.txt"
PEERS = REPOSITORY / "scripts" / "benchmarks" / "peers"
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "rank": 16,
    "alpha": 32,
    "learning_rate": 1e-4,
    "clip_norm": 1.0,
    "global_batch": workload.GLOBAL_BATCH,
    "sequence_length": workload.SEQUENCE_LENGTH,
}
TRL_MICRO_BATCHES = {"trl": workload.GLOBAL_BATCH, "trl_tuned": 1}


@dataclass(frozen=True)
class Steps:
    """What one run of one contestant did, a figure a step."""

    losses: list[float]
    tokens: list[int]
    cpu_s: list[float]

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]]) -> "Steps":
        return cls(
            [record["loss"] for record in records],
            [record["tokens"] for record in records],
            [record["cpu_s"] for record in records],
        )

    def rate(self, first: int = 1) -> float:
        """Tokens per processor second from step `first` on."""
        return sum(self.tokens[first:]) / sum(self.cpu_s[first:])


class Bench:
    """The contestants in a folder that holds the model, the rows, the store and their answers."""

    def __init__(self, folder: Path, shape: workload.Shape, steps: int, rows: Path | None) -> None:
        self._folder = folder
        self._steps = steps
        self._model = folder / "model"
        self._settings = {**SETTINGS, "steps": steps}
        workload.write_model(self._model, shape)
        if rows is None:
            rows = folder / "rows.jsonl"
            workload.write_rows(rows, ROWS)
        self._recipe_path = folder / "recipe.yaml"
        self._recipe_path.write_text(yaml.safe_dump(_recipe(folder, self._model, rows, steps)))
        self._recipe = load(self._recipe_path, Recipe)
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != env.RAY_ADDRESS},
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def ours(self) -> Steps:
        """A run through the driver, as a person would start it; its metrics as the store has them."""
        output = self._run([sys.executable, "-m", "jobs.train", self._recipe_path])
        run_id = json.loads(output.splitlines()[-1])["run_id"]
        return Steps.of(list(read_steps(open_store(self._recipe.store), run_id)))

    def write_inputs(self) -> None:
        """For the peers, from the dataset that our run made: all samples, and the batches in our order."""
        data = self._recipe.data
        store = open_store(self._recipe.store)
        files = dataset.locate_all(data.train, store, self._folder)
        samples = dataset.Dataset.fetch(store, dataset.dataset_digest(files, data, self._model))
        schedule = SampleSchedule(
            samples.lengths, SETTINGS["seed"], data.sequence_length, data.packing, SETTINGS["global_batch"]
        )
        everything = [_plain(samples, index) for index in range(len(samples))]
        batches = [
            [[everything[index] for index in pack] for pack in schedule.batch(step)] for step in range(self._steps)
        ]
        (self._folder / "samples.json").write_text(json.dumps(everything))
        (self._folder / "batches.json").write_text(json.dumps(batches))

    def bare_loop(self) -> Steps:
        return self._peer([sys.executable, "-m", "scripts.benchmarks.peers.bare_loop"], "batches")

    def trl(self, micro_batch: int) -> Steps:
        program: list[str | Path] = [TRL_ENVIRONMENT / "bin" / "python", PEERS / "trl_train.py"]
        return self._peer(program, "samples", {"micro_batch": micro_batch})

    def _peer(self, command: list[str | Path], inputs: str, more: dict[str, Any] | None = None) -> Steps:
        out = self._folder / "out.json"
        settings = json.dumps({**self._settings, **(more or {})})
        given = {"model": self._model, inputs: self._folder / f"{inputs}.json", "settings": settings, "out": out}
        self._run(["nice", "-n", str(RAY_NICENESS), *command, *(f"--{name}={value}" for name, value in given.items())])
        return Steps.of(json.loads(out.read_text()))

    def _run(self, command: list[str | Path]) -> str:
        finished = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if finished.returncode:
            said = (finished.stdout + finished.stderr)[-4_000:]
            raise RunFailed(f"`{' '.join(map(str, command))}` ended with {finished.returncode}:\n{said}")
        return finished.stdout


def _recipe(folder: Path, model: Path, rows: Path, steps: int) -> dict[str, Any]:
    return {
        "name": "bench-train",
        "model": {"name": "bench", "source": str(model), "licence": "apache-2.0", "dtype": "fp32"},
        "cluster": {"name": "here", "address": "local", "memory_gb_per_worker": 4.0},
        "store": f"file://{folder}/store",
        "data": {"train": [str(rows)], "sequence_length": SETTINGS["sequence_length"], "overlong": "drop"},
        "method": {"kind": "lora", "rank": SETTINGS["rank"], "alpha": float(SETTINGS["alpha"])},
        "train": {"steps": steps, "global_batch": SETTINGS["global_batch"], "seed": SETTINGS["seed"]},
        "optimizer": {"learning_rate": SETTINGS["learning_rate"], "clip_norm": SETTINGS["clip_norm"]},
        "schedule": {"kind": "constant"},
    }


def _plain(samples: dataset.Dataset, index: int) -> dict[str, list[Any]]:
    ids, marks = samples.sample(index)
    return {"input_ids": ids.tolist(), "supervised": marks.tolist()}


def measure(bench: Bench, rounds: int, with_trl: bool) -> list[Measure]:
    """All rounds, contestants in turn. Raises RunFailed when a run fails or ours and the bare loop do not agree."""
    ours: list[Steps] = []
    trl = TRL_MICRO_BATCHES if with_trl else {}
    peers: dict[str, list[Steps]] = {name: [] for name in (*trl, "bare_loop")}
    apart = 0.0
    for number in range(rounds):
        ours.append(bench.ours())
        if number == 0:
            bench.write_inputs()
        for name, micro_batch in trl.items():
            peers[name].append(bench.trl(micro_batch))
        peers["bare_loop"].append(bench.bare_loop())
        apart = max(apart, _distance(ours[-1], peers["bare_loop"][-1]))
        latest = {"ours": ours[-1], **{name: runs[-1] for name, runs in peers.items()}}
        figures = "  ".join(f"{name} {run.rate():,.0f}" for name, run in latest.items())
        _note(f"round {number + 1} of {rounds}: {figures} {UNIT}; losses of ours and bare_loop within {apart:.1e}")
    return [_measured(name, ours, runs, apart) for name, runs in peers.items()]


def _measured(name: str, ours: list[Steps], peer: list[Steps], apart: float) -> Measure:
    notes = {
        "ours_with_first_step": float(np.median([run.rate(0) for run in ours])),
        "peer_with_first_step": float(np.median([run.rate(0) for run in peer])),
    }
    if name == "bare_loop":
        notes["loss_difference_max"] = apart
    return Measure(name, UNIT, [run.rate() for run in ours], [run.rate() for run in peer], notes)


def _distance(ours: Steps, bare: Steps) -> float:
    """The largest difference of a step's loss. Raises RunFailed when the two did not do the same work."""
    apart = float(np.abs(np.subtract(ours.losses, bare.losses)).max())
    if ours.tokens != bare.tokens or not apart <= LOSS_TOLERANCE:
        raise RunFailed(
            f"ours and the bare loop do not agree, so their speeds compare nothing: losses {ours.losses} and "
            f"{bare.losses} (at most {LOSS_TOLERANCE:g} apart is allowed), tokens {ours.tokens} and {bare.tokens}"
        )
    return apart


def trl_is_installed() -> bool:
    """Whether .venv-trl was made, to its end, from today's requirements."""
    made_from = TRL_ENVIRONMENT / TRL_REQUIREMENTS.name
    return made_from.exists() and made_from.read_bytes() == TRL_REQUIREMENTS.read_bytes()


def install_trl() -> None:
    """Make .venv-trl. Raises RunFailed."""
    _note(f"making {TRL_ENVIRONMENT.name} for TRL; this happens once")
    python = TRL_ENVIRONMENT / "bin" / "python"
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", "--clear", TRL_ENVIRONMENT],
        [python, "-m", "pip", "install", "--quiet", "--requirement", TRL_REQUIREMENTS],
    ]
    for command in commands:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RunFailed(f"cannot make {TRL_ENVIRONMENT}: {finished.stderr[-2_000:]}")
    shutil.copy(TRL_REQUIREMENTS, TRL_ENVIRONMENT)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench train", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a run (default: 8)")
    parser.add_argument("--data", type=Path, help="chat rows in any format that jobs reads, instead of those made here")
    parser.add_argument(
        "--quick", action="store_true", help="one round of 3 steps of a tiny model: does it work at all?"
    )
    given = parser.parse_args()
    if given.rounds < 1 or given.steps < 2:
        parser.error("at least 1 round and 2 steps: the first step is not counted")
    try:
        if not given.quick and not trl_is_installed():
            install_trl()
        with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
            os.environ[env.LUTHIER_CACHE] = f"{name}/cache"
            shape, rounds, steps = (workload.QUICK, 1, 3) if given.quick else (workload.FULL, given.rounds, given.steps)
            rows = given.data.resolve() if given.data else None
            measures = measure(Bench(Path(name), shape, steps, rows), rounds, trl_is_installed())
    except LuthierError as error:
        return logs.fail(error)
    show("Supervised LoRA fine-tuning, one thread, fp32", measures, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
