"""Checkpoints: how little training feels of them, what they send, how fast they come and go, and a worker's death.

    scripts/bench checkpoint [--json] [--rounds 3] [--quick] [--only PART …]

On an S3 server of its own: Ceph's object gateway where it is installed, else an emulator; the output says which. Less
is better for all but the throughputs, and a note `goal` (--json has the notes) is what the ratio is meant to reach.

    stall                of a LoRA run (rank 16) of the 19-million-parameter model of workload.py, one worker with one
                         thread: how long a checkpoint keeps training waiting, which is the time within Saver.begin
                         and Saver.settle around a step's forward and backward pass. The peer saves the same state to
                         the same store and lets training wait: copy, SHA-256, upload, manifest. Checkpoints follow
                         one another only when the one before is stored. Notes: how long a step takes with an upload
                         in the background (`step_meanwhile_s`) and without (`step_s`): the upload and the server
                         take processor time from training where they have no cores of their own
    stall_full           the same when all weights are trained
    stall_over_copy      the first measure again, beside one copy of as many bytes within memory
    uploaded_bytes       what two ranks send to the server for one checkpoint when all weights are trained, HTTP and
                         all, counted on the wire, beside the bytes of the state: 12 a parameter. Of ZeRO-1 and ZeRO-3
                         the worse; the notes have both ratios
    upload_throughput    of one shard from memory with its SHA-256, as the saver does it, beside boto3's own
                         upload_fileobj of the same bytes in as large parts, as many at a time
    restore_throughput   of checkpoint.load, which fetches and verifies, beside boto3's download_file
    seek_s               until a sample schedule that stands in another epoch has the batch of the ten-millionth sample:
                         the 100th epoch of 100,000 samples, or one epoch of ten million. The worse of both, beside the
                         goal of one second. Making the schedule comes before; it is in the notes (`build_*_s`)
    recovery_s           of a run on two nodes: from the SIGKILL of a worker until a step is done again and in the
                         store. Notes: until the driver tells of the failure (`notice_s`), until there are two new
                         workers (`place_s`), until they have imported torch, loaded the model and restored the state
                         (`prepare_s`), until the step is done (`step_s`). The peer is the first start of the same
                         run: from the driver's first heartbeat, just before it starts workers, until its first step
                         is in the store (`first_*_s`). Ray Train's settings are its own
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from types import FrameType
from typing import Any

import numpy as np
import yaml

from cluster import env, keys, logs, records
from cluster.errors import LuthierError, RunFailed
from cluster.nodes import LocalCluster
from cluster.processes import free_ports
from cluster.records import RunEvent
from cluster.store import Store, open_store
from jobs import runs
from jobs.attempts import prepare_environment
from jobs.packing import SampleSchedule
from scripts.benchmarks import workload
from scripts.benchmarks.peers.object_server import HOST, ObjectServer, started
from scripts.benchmarks.report import REPOSITORY, Measure, show

MOST_ROUNDS = 5
"""A round writes about 1.5 GB, and the server's disk, which keeps what is deleted for hours, has 12."""

TIMEOUT_S = 900.0
POLL_S = 0.05
MIB = 1 << 20
WORKERS = 2
SEEK_GOAL_S = 1.0
SEEK_BATCH, SEEK_CAPACITY = 64, 2048


@dataclass(frozen=True)
class Size:
    """How much of everything: `*_checkpoints` a round and contestant."""

    shape: workload.Shape
    lora_checkpoints: int
    full_checkpoints: int
    shard_mib: int
    epoch_samples: int
    seek_to: int


FULL = Size(workload.FULL, 4, 2, 256, 100_000, 10_000_000)
QUICK = Size(workload.QUICK, 2, 1, 24, 10_000, 100_000)


class Bench:
    """All parts, each a method that returns its measures."""

    def __init__(self, folder: Path, server: ObjectServer, size: Size, rounds: int) -> None:
        self._folder = folder
        self._server = server
        self._size = size
        self._rounds = rounds
        self._model = folder / "model"
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != env.RAY_ADDRESS},
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            env.RAY_AUTH_MODE: "token",
            env.RAY_AUTH_TOKEN: secrets.token_hex(32),
            "TOKENIZERS_PARALLELISM": "false",
        }
        workload.write_model(self._model, size.shape)

    def _url(self, prefix: str) -> str:
        return f"s3://{self._server.bucket}/{prefix}"

    def stall(self) -> list[Measure]:
        lora = self._ranks(1, self._stall_task("lora", self._size.lora_checkpoints))
        full = self._ranks(1, self._stall_task("full", self._size.full_checkpoints))
        copies = [1e3 * seconds for seconds in _by_round(lora["turns"], "copy_s")]
        unit = "ms, less is better"
        over_copy = Measure("stall_over_copy", unit, _stalls(lora), copies, {"state_mib": lora["state_bytes"] / MIB})
        return [_stall_measure("stall", unit, lora), _stall_measure("stall_full", unit, full), over_copy]

    def _stall_task(self, method: str, checkpoints: int) -> dict[str, Any]:
        return {
            "what": "stall",
            "model": str(self._model),
            "method": method,
            "store": self._url(f"stall-{method}"),
            "rounds": self._rounds,
            "checkpoints": checkpoints,
        }

    def uploaded_bytes(self) -> list[Measure]:
        stages = (1, 3)
        task = {
            "what": "sent",
            "model": str(self._model),
            "store": self._url("sent"),
            "host": HOST,
            "port": self._server.port,
            "stages": stages,
        }
        answers = self._ranks(2, task)
        notes = {"goal": 1.0}
        for stage, answer in zip(stages, answers, strict=True):
            notes[f"zero_{stage}"] = answer["sent"] / answer["unique"]
            notes[f"zero_{stage}_files"] = answer["files"] / answer["unique"]
        worse = max(answers, key=lambda answer: float(answer["sent"]))
        return [
            Measure("uploaded_bytes", "MB, less is better", [worse["sent"] / 1e6], [worse["unique"] / 1e6], notes),
        ]

    def throughput(self) -> list[Measure]:
        """One shard, up and down again."""
        task = {
            "what": "throughput",
            "store": self._url("throughput"),
            "bucket": self._server.bucket,
            "mib": self._size.shard_mib,
            "rounds": self._rounds,
            "folder": str(self._folder),
        }
        answer = self._ranks(1, task)
        mib, turns = answer["bytes"] / MIB, answer["turns"]

        def rates(name: str) -> list[float]:
            return [mib / seconds for seconds in _by_round(turns, name)]

        up = {"goal": 0.8, "sha256_alone": median(rates("hash_s"))}
        down = {"goal": 0.8, "fetch_alone": median(rates("fetch_s"))}
        return [
            Measure("upload_throughput", "MiB/s", rates("upload_s"), rates("plain_upload_s"), up),
            Measure("restore_throughput", "MiB/s", rates("restore_s"), rates("plain_download_s"), down),
        ]

    def seek_s(self) -> list[Measure]:
        """The sample is the last one of its epoch, so that its number is the same in both runs."""
        notes: dict[str, float] = {"goal": 1.0}
        found: dict[str, list[float]] = {}
        for name, samples in (("many_epochs", self._size.epoch_samples), ("one_epoch", self._size.seek_to)):
            draws = np.random.default_rng(0).lognormal(np.log(148), 0.8, samples)
            lengths = np.clip(draws.astype(np.int64), 1, SEEK_CAPACITY)
            began = time.perf_counter()
            schedule = SampleSchedule(lengths, 0, SEEK_CAPACITY, global_batch=SEEK_BATCH)
            notes[f"build_{name}_s"] = time.perf_counter() - began
            last = self._size.seek_to // samples * schedule.steps_per_epoch - 1
            found[name] = [_seek(schedule, last) for _ in range(self._rounds)]
            notes[f"seek_{name}_s"] = median(found[name])
        worse = max(found.values(), key=median)
        return [Measure("seek_s", "s, less is better", worse, [SEEK_GOAL_S] * self._rounds, notes)]

    def recovery_s(self) -> list[Measure]:
        rows = self._folder / "rows.jsonl"
        tiny = self._folder / "tiny"
        workload.write_model(tiny, workload.QUICK)
        workload.write_rows(rows, 200)
        variables = {name: self._environment[name] for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
        variables |= {env.LUTHIER_CACHE: str(self._folder / "cache"), **self._server.variables}
        killings = []
        cluster = LocalCluster(head_cpus=1, variables=variables)
        try:
            cluster.add_node(cpus=1)
            for number in range(self._rounds):
                killing = Killing(cluster, self._folder, self._url(f"recovery-{number}"), tiny, rows)
                killings.append(killing.times())
                _note(f"recovery {number + 1} of {self._rounds}: {killings[-1]['recovery_s']:.1f} s")
        finally:
            cluster.stop()
            for pid in cluster.worker_pids(""):  # Ray's agents may outlive their node
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        ours, peer = ([times[name] for times in killings] for name in ("recovery_s", "first_start_s"))
        notes = {name: median(times[name] for times in killings) for name in killings[0]}
        return [Measure("recovery_s", "s, less is better", ours, peer, notes)]

    def _ranks(self, count: int, task: dict[str, Any]) -> Any:
        """Have `count` ranks do a task (checkpoint_rank.py). Returns rank 0's answer. Raises RunFailed."""
        _note(f"{count} rank(s): {json.dumps({name: task[name] for name in task if name not in ('folder', 'model')})}")
        out, log = self._folder / "out.json", self._folder / "ranks.log"
        environment = {
            **self._environment,
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(free_ports(1)[0]),
            "WORLD_SIZE": str(count),
        }
        with log.open("w") as output:
            ranks = [
                subprocess.Popen(
                    [sys.executable, "-m", "scripts.benchmarks.checkpoint_rank", json.dumps(task), out],
                    cwd=REPOSITORY,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=output,
                )
                for rank in range(count)
            ]
            try:
                _until("the ranks to end", lambda: all(rank.poll() is not None for rank in ranks) or _failed(ranks))
            finally:
                for rank in ranks:
                    rank.kill()
                    rank.wait()
        if _failed(ranks):
            raise RunFailed(f"a rank failed:\n{log.read_text(errors='replace')[-4_000:]}")
        return json.loads(out.read_text())


def _failed(ranks: list[subprocess.Popen[bytes]]) -> bool:
    return any(rank.poll() for rank in ranks)


def _by_round(turns: list[dict[str, float]], name: str) -> list[float]:
    """The mean of each round's turns."""
    rounds = sorted({turn["round"] for turn in turns})
    return [fmean(turn[name] for turn in turns if turn["round"] == number) for number in rounds]


def _stalls(answer: dict[str, Any]) -> list[float]:
    """Of ours, in milliseconds."""
    parts = (_by_round(answer["turns"], name) for name in ("begin_s", "settle_s"))
    return [1e3 * (begin + settle) for begin, settle in zip(*parts, strict=True)]


def _stall_measure(name: str, unit: str, answer: dict[str, Any]) -> Measure:
    turns = answer["turns"]
    stalls = [1e3 * (turn["begin_s"] + turn["settle_s"]) for turn in turns]
    notes = {
        "goal": 0.05,
        "state_mib": answer["state_bytes"] / MIB,
        "checkpoints": len(turns),
        "ours_worst": max(stalls),
        "ours_first": max(1e3 * (turn["begin_s"] + turn["settle_s"]) for turn in answer["first"]),
        "settle_share": sum(turn["settle_s"] for turn in turns) / (sum(stalls) / 1e3),
    }
    for seconds in ("step_meanwhile_s", "step_s"):
        notes[seconds] = median(turn[seconds] for turn in turns)
    peer = [1e3 * waited for waited in _by_round(turns, "waited_s")]
    return Measure(name, unit, _stalls(answer), peer, notes)


def _seek(schedule: SampleSchedule, step: int) -> float:
    """Seconds until the batch of `step` is there, coming from another epoch."""
    schedule.batch(step + schedule.steps_per_epoch)
    began = time.perf_counter()
    schedule.batch(step)
    return time.perf_counter() - began


class Killing:
    """One run on two nodes with a checkpoint after every step, one of whose workers is killed."""

    STEPS_BEFORE = 5
    TITLE = "RayTrainWorker"  # of a worker's process

    def __init__(self, cluster: LocalCluster, folder: Path, url: str, model: Path, rows: Path) -> None:
        self._cluster = cluster
        self._store: Store = open_store(url)
        self._recipe = folder / "recovery.yaml"
        self._recipe.write_text(yaml.safe_dump(_recipe(url, model, rows)))
        self._log = folder / "driver.log"
        self._seen: dict[str, float] = {}

    def times(self) -> dict[str, float]:
        """Seconds by part. Raises RunFailed."""
        with self._log.open("w") as output:
            driver = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", self._recipe],
                cwd=REPOSITORY,
                env={**self._cluster.environment(), env.RAY_ADDRESS: self._cluster.address},
                stdout=output,
                stderr=output,
            )
        try:
            return self._times(driver)
        finally:
            driver.kill()
            driver.wait()
            _until("the workers to end", lambda: not self._cluster.worker_pids(self.TITLE))

    def _times(self, driver: subprocess.Popen[bytes]) -> dict[str, float]:
        def until(what: str, found: Callable[[str], bool]) -> float:
            return self._until_seen(driver, what, found)

        started_at = until("a heartbeat", lambda key: key.endswith("/heartbeat.json"))
        run_id = next(iter(self._seen)).split("/")[1]
        placed_at = self._until_workers(set())
        ready_at = until("the first attempt", keys.attempt(run_id, 1).__eq__)
        stepped_at = until("its first step", lambda key: key.startswith(keys.metrics_prefix(run_id) + "0001-"))
        until("a checkpoint", keys.checkpoint_manifest(run_id, self.STEPS_BEFORE).__eq__)
        known = set(self._seen)
        workers = self._cluster.worker_pids(self.TITLE)
        os.kill(workers[-1], signal.SIGKILL)
        killed_at = time.monotonic()
        noticed_at = until(
            "the failure in the run's log",
            lambda key: (
                key.startswith(keys.events_prefix(run_id))
                and key not in known
                and records.read(self._store, key, RunEvent).state == "resuming"
            ),
        )
        placed_again_at = self._until_workers(set(workers))
        again_at = until("the second attempt", keys.attempt(run_id, 2).__eq__)
        done_at = until("a step of it", lambda key: key.startswith(keys.metrics_prefix(run_id) + "0002-"))
        starts = runs.attempts(self._store, run_id)
        return {
            "recovery_s": done_at - killed_at,
            "notice_s": noticed_at - killed_at,
            "place_s": placed_again_at - noticed_at,
            "prepare_s": again_at - placed_again_at,
            "step_s": done_at - again_at,
            "first_start_s": stepped_at - started_at,
            "first_place_s": placed_at - started_at,
            "first_prepare_s": ready_at - placed_at,
            "first_step_s": stepped_at - ready_at,
            "resumed_at_step": starts[1].first_step,
        }

    def _until_workers(self, earlier: set[int]) -> float:
        """When both of a new attempt's worker processes are there."""
        _until("two workers", lambda: len(set(self._cluster.worker_pids(self.TITLE)) - earlier) == WORKERS)
        return time.monotonic()

    def _until_seen(self, driver: subprocess.Popen[bytes], what: str, found: Callable[[str], bool]) -> float:
        """When a key of that kind was first seen in the store, by this process's clock."""

        def look() -> bool:
            if driver.poll() is not None:
                said = self._log.read_text(errors="replace")[-4_000:]
                raise RunFailed(f"the driver ended before there was {what}:\n{said}")
            now = time.monotonic()
            for item in self._store.list(keys.runs_prefix()):
                self._seen.setdefault(item.key, now)
            return any(map(found, self._seen))

        _until(what, look)
        return min(at for key, at in self._seen.items() if found(key))


def _recipe(url: str, model: Path, rows: Path) -> dict[str, Any]:
    return {
        "name": "recovery",
        "model": {"name": "tiny", "source": str(model), "licence": "apache-2.0", "dtype": "fp32"},
        "cluster": {"name": "two-nodes", "memory_gb_per_worker": 4.0},
        "store": url,
        "data": {"train": [str(rows)], "sequence_length": workload.SEQUENCE_LENGTH, "overlong": "drop"},
        "method": {"kind": "lora", "rank": 8},
        "train": {"steps": 100_000, "global_batch": workload.GLOBAL_BATCH, "workers": WORKERS, "zero": 1},
        "optimizer": {"learning_rate": 1e-4},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every_steps": 1},
    }


def _until(what: str, condition: Callable[[], bool]) -> None:
    """Wait for it. Raises RunFailed after 15 minutes."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise RunFailed(f"waited {TIMEOUT_S:.0f} s for {what}")
        time.sleep(POLL_S)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[Bench], list[Measure]]] = {
    "stall": Bench.stall,
    "uploaded_bytes": Bench.uploaded_bytes,
    "throughput": Bench.throughput,
    "seek_s": Bench.seek_s,
    "recovery_s": Bench.recovery_s,
}


def _on_terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's signature
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench checkpoint", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=3, help=f"of each measure, at most {MOST_ROUNDS} (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one round of little: does it work at all?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone")
    given = parser.parse_args()
    if not 1 <= given.rounds <= MOST_ROUNDS:
        parser.error(f"--rounds is 1 to {MOST_ROUNDS}: the server's disk has room for no more")
    signal.signal(signal.SIGTERM, _on_terminate)  # so that what was started ends too
    prepare_environment("cpu")
    try:
        with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name, started() as server:
            os.environ |= server.variables
            size, rounds = (QUICK, 1) if given.quick else (FULL, given.rounds)
            bench = Bench(Path(name), server, size, rounds)
            measures = []
            for part in given.only:
                for measure in PARTS[part](bench):
                    _note(f"{measure.name}: {json.dumps(measure.to_dict())}")
                    measures.append(measure)
    except LuthierError as error:
        return logs.fail(error)
    show("Checkpoints", measures, given.json, server=server.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
