"""One rank of `scripts/bench checkpoint`: a real engine in a plain process, and what its checkpoints cost.

    RANK=0 WORLD_SIZE=1 MASTER_ADDR=… MASTER_PORT=… python -m scripts.benchmarks.checkpoint_rank TASK OUT.json

TASK is a JSON object, which `stall`, `sent` and `throughput` describe; rank 0 writes the answer to OUT.json. The
server's address and key are in the AWS variables, and DeepSpeed's variables are set (jobs.attempts).
"""

import io
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Self

import boto3.session
import ray
import torch
import torch.distributed as dist
from boto3.s3.transfer import TransferConfig

from cluster import env, keys, records
from cluster.errors import RunFailed
from cluster.records import CheckpointManifest, FileRecord
from cluster.store import Store, open_store
from jobs import checkpoint, runs
from jobs.checkpoint import Retention, Shard
from jobs.config import FullConfig, LoraConfig, OptimizerConfig
from jobs.kernels import keep_freed_memory, summed_cross_entropy
from jobs.lora import prepare
from jobs.model import load_model
from jobs.objectives import PackedRow, supervised_logits
from jobs.progress import Board, Meeting, RemoteBoard
from jobs.saver import SHARDS, Position, Saver
from jobs.zero import PARTS, Fragment, ZeroEngine, join_process_group, sharded_loading
from scripts.benchmarks import workload

SAMPLES = [96, 160, 128, 128]
"""Tokens of the samples in each pack."""

STORED_TIMEOUT_S = 120.0
POLL_S = 0.05
MIB = 1 << 20
TRANSFER = TransferConfig(multipart_threshold=16 * MIB, multipart_chunksize=16 * MIB, max_concurrency=8)
"""As cluster/s3.py has it, and else boto3's defaults."""

DOWNLOADS = 2  # of each contestant in a round


class Training:
    """An engine, and steps of the training benchmark's size on packs of random tokens. It has made one when made."""

    def __init__(self, folder: Path, kind: str, stage: int) -> None:
        method = LoraConfig(kind="lora", rank=16, alpha=32.0) if kind == "lora" else FullConfig(kind="full")
        model = prepare(load_model(folder, "fp32", sharded_loading(stage, "fp32")), method, seed=0, fused=stage < 3)
        self.engine = ZeroEngine(model, OptimizerConfig(learning_rate=1e-4), stage, "fp32")
        self._rows = list(_rows())[dist.get_rank() :: dist.get_world_size()]
        self.step()

    def gradients(self) -> None:
        """Forward and backward of one step."""
        self.engine.module.train()
        for index, row in enumerate(self._rows):
            loss = summed_cross_entropy(supervised_logits(self.engine.engine, row), row.targets) / len(row.targets)
            self.engine.accumulate(loss / workload.GLOBAL_BATCH, last=index == len(self._rows) - 1)

    def update(self) -> None:
        """The optimizer's step."""
        self.engine.step(1e-4)

    def step(self) -> None:
        self.gradients()
        self.update()

    @property
    def state_bytes(self) -> int:
        """Weight and both moments of every trained element, in fp32."""
        return 12 * sum(getattr(each, "ds_numel", each.numel()) for _, each in self.engine.trained())


def _rows() -> Iterator[PackedRow]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(workload.GLOBAL_BATCH):
        tokens = torch.randint(0, workload.VOCABULARY, (sum(SAMPLES),), generator=generator)
        positions = torch.cat([torch.arange(length) for length in SAMPLES])
        predicts = torch.tensor([place for place in range(len(tokens) - 1) if place % 3])
        yield PackedRow(tokens[None], positions[None], SAMPLES, predicts, tokens[predicts + 1], 0, 1.0)


class Behind:
    """Ours: checkpoints by the saver that jobs/worker.py uses."""

    RUN_ID = "behind"

    def __init__(self, training: Training, store: Store, board: Meeting) -> None:
        self._training = training
        self._store = store
        self._step = 0
        attempt = runs.begin_attempt(store, self.RUN_ID, 0, 1, 1)
        self._saver = Saver(training.engine, store, self.RUN_ID, attempt, 0, board, Retention(last=1))

    def once(self) -> dict[str, float]:
        """One step of training with a checkpoint of the state before it; waits for the store, at last."""
        self._step += 1
        engine = self._training.engine
        began = time.perf_counter()
        self._saver.begin(Position(self._step, engine.updates(), 0, None))
        begun = time.perf_counter()
        self._training.gradients()
        computed = time.perf_counter()
        self._saver.settle()
        settled = time.perf_counter()
        self._training.update()
        updated = time.perf_counter()
        self._wait()
        return {
            "begin_s": begun - began,
            "settle_s": settled - computed,
            "step_meanwhile_s": computed - begun + updated - settled,
        }

    def close(self) -> None:
        self._saver.close()

    def _wait(self) -> None:
        """Until this checkpoint is committed and the one before it deleted: then the saver has nothing left to do."""
        deadline = time.monotonic() + STORED_TIMEOUT_S
        here, manifest = (make(self.RUN_ID, self._step) for make in (keys.checkpoint_prefix, keys.checkpoint_manifest))
        while True:
            found = [item.key for item in self._store.list(keys.checkpoints_prefix(self.RUN_ID))]
            if manifest in found and all(key.startswith(here) for key in found):
                return
            if self._saver.failure:
                raise self._saver.failure
            if time.monotonic() > deadline:
                raise RunFailed(f"checkpoint {self._step} is not in the store after {STORED_TIMEOUT_S:.0f} s: {found}")
            time.sleep(POLL_S)


class Waited:
    """The peer: the same bytes to the same store, while training waits. And a copy of as many bytes in memory."""

    RUN_ID = "waited"
    FILE = "state.safetensors"

    def __init__(self, training: Training, store: Store) -> None:
        self._training = training
        self._store = store
        self._step = 0
        self._fragments = training.engine.fragments()
        self._shard = Shard(self._fragments)
        self._plain = torch.ones(training.state_bytes // 4)
        self._buffer = torch.zeros_like(self._plain)

    def once(self) -> dict[str, float]:
        """A copy in memory, a checkpoint, and then one step of training."""
        self._step += 1
        began = time.perf_counter()
        self._buffer.copy_(self._plain)
        copied = time.perf_counter()
        self._save()
        saved = time.perf_counter()
        self._training.step()
        trained = time.perf_counter()
        for item in list(self._store.list(keys.checkpoints_prefix(self.RUN_ID))):
            self._store.delete(item.key)
        return {"copy_s": copied - began, "waited_s": saved - copied, "step_s": trained - saved}

    def _save(self) -> None:
        self._shard.copy(self._fragments)
        file = records.describe_memory(self._shard.memory, self.FILE)
        self._store.upload(self._shard.memory, keys.checkpoint_prefix(self.RUN_ID, self._step) + self.FILE)
        manifest = CheckpointManifest(
            run_id=self.RUN_ID,
            step=self._step,
            attempt=1,
            updates=self._training.engine.updates(),
            samples_seen=0,
            world_size=1,
            metric=None,
            files=(file,),
            created_at=records.now(),
        )
        self._store.put(keys.checkpoint_manifest(self.RUN_ID, self._step), manifest.to_bytes())


class CountingProxy:
    """A TCP proxy on loopback that counts what clients send."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                for source, sink, counts in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=(source, sink, counts), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                if counts:
                    with self._lock:
                        self.sent += len(data)
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def stall(task: dict[str, Any], board: Meeting) -> dict[str, Any]:
    """How long training stands still, checkpoints of ours and of the peer in turn.

    Args:
        task: `model`, a folder; `method`, `lora` or `full`; `store`; `rounds` of `checkpoints` each.
    """
    training = Training(Path(task["model"]), task["method"], 0)
    store = open_store(task["store"])
    behind, waited = Behind(training, store, board), Waited(training, store)
    first = [behind.once() for _ in range(SHARDS)]  # these allocate the memory that all later ones use
    waited.once()
    turns = [
        {"round": number, **behind.once(), **waited.once()}
        for number in range(task["rounds"])
        for _ in range(task["checkpoints"])
    ]
    behind.close()
    return {"state_bytes": training.state_bytes, "first": first, "turns": turns}


def sent(task: dict[str, Any], board: Meeting) -> list[dict[str, int]]:
    """What all ranks together send to the server for one checkpoint of each ZeRO stage.

    Args:
        task: `model`, a folder; `store`; `host` and `port` of its server; `stages`.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    answers = []
    for stage in task["stages"]:
        training = Training(Path(task["model"]), "full", stage)
        run_id = f"sent-{stage}"
        with CountingProxy((task["host"], task["port"])) if rank == 0 else nullcontext() as proxy:
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{_from_rank_0(proxy.port if proxy else None)}"
            store = open_store(task["store"])
            attempt = _from_rank_0(runs.begin_attempt(store, run_id, 0, world_size, 1) if rank == 0 else None)
            saver = Saver(training.engine, store, run_id, attempt, rank, board, Retention(last=1))
            dist.barrier()
            before = proxy.sent if proxy else 0
            dist.barrier()
            saver.begin(Position(1, training.engine.updates(), 0, None))
            saver.close()
            dist.barrier()
            if proxy:
                (step,) = runs.checkpoint_steps(store, run_id)  # it was committed
                manifest = records.read(store, keys.checkpoint_manifest(run_id, step), CheckpointManifest)
                files = sum(file.size for file in manifest.files)
                answers.append({"sent": proxy.sent - before, "files": files, "unique": training.state_bytes})
    return answers


class PlainBoto3:
    """The peer: the same bytes by boto3 as its manual shows it."""

    KEY = "plain/state.safetensors"

    def __init__(self, bucket: str, shard: Shard) -> None:
        self._client = boto3.session.Session().client("s3")
        self._bucket = bucket
        self._bytes = shard.memory[:]

    def upload(self) -> None:
        self._client.upload_fileobj(io.BytesIO(self._bytes), self._bucket, self.KEY, Config=TRANSFER)

    def download(self, path: Path) -> None:
        self._client.download_file(self._bucket, self.KEY, str(path), Config=TRANSFER)


class StoredShard:
    """Ours: a shard as jobs/saver.py uploads it, and as jobs/checkpoint.py reads it back."""

    RUN_ID = "shard"
    FILE = "state-0001-00000.safetensors"

    def __init__(self, store: Store, shard: Shard) -> None:
        self._store = store
        self._shard = shard
        self._threads = ThreadPoolExecutor(2)
        self._key = keys.checkpoint_prefix(self.RUN_ID, 1) + self.FILE
        self._file = self.upload()
        manifest = CheckpointManifest(
            run_id=self.RUN_ID,
            step=1,
            attempt=1,
            updates=1,
            samples_seen=0,
            world_size=1,
            metric=None,
            files=(self._file,),
            created_at=records.now(),
        )
        store.put(keys.checkpoint_manifest(self.RUN_ID, 1), manifest.to_bytes())

    def upload(self) -> FileRecord:
        described = self._threads.submit(records.describe_memory, self._shard.memory, self.FILE)
        self._threads.submit(self._store.upload, self._shard.memory, self._key).result()
        return described.result()

    def restore(self, cache: Path) -> None:
        """Into an empty cache."""
        os.environ[env.LUTHIER_CACHE] = str(cache)
        checkpoint.load(self._store, self.RUN_ID, 1).close()

    def hash(self) -> None:
        """What `upload` does besides uploading."""
        records.describe_memory(self._shard.memory, self.FILE)

    def fetch(self, path: Path) -> None:
        """What `restore` does besides reading the shard's table."""
        self._store.download(self._key, path)


def throughput(task: dict[str, Any], _board: Meeting) -> dict[str, Any]:
    """Seconds for one shard up and down, by ours and by boto3 alone in turn.

    Args:
        task: `store`; `bucket`, the same store's; `mib` of the shard; `rounds`; `folder` for what is downloaded.
    """
    shard = _random_shard(task["mib"])
    ours, peer = StoredShard(open_store(task["store"]), shard), PlainBoto3(task["bucket"], shard)
    peer.upload()
    turns = []
    for number in range(task["rounds"]):
        times = {"upload_s": _seconds(ours.upload), "plain_upload_s": _seconds(peer.upload)}
        times["hash_s"] = _seconds(ours.hash)
        for place in range(DOWNLOADS):
            with tempfile.TemporaryDirectory(dir=task["folder"]) as name:
                turns.append({"round": number, **times, **_down(ours, peer, Path(name), ours_first=place % 2 == 0)})
    return {"bytes": len(shard.memory), "turns": turns}


def _down(ours: StoredShard, peer: PlainBoto3, folder: Path, ours_first: bool) -> dict[str, float]:
    acts: list[tuple[str, Callable[[], object]]] = [
        ("restore_s", lambda: ours.restore(folder / "cache")),
        ("plain_download_s", lambda: peer.download(folder / "plain")),
    ]
    acts = acts if ours_first else acts[::-1]
    acts.append(("fetch_s", lambda: ours.fetch(folder / "fetched")))
    return {name: _seconds(act) for name, act in acts}


def _random_shard(mib: int) -> Shard:
    """A shard of parameters with random values, since a server may compress."""
    parameters = 8
    count = mib * MIB // (4 * len(PARTS) * parameters)
    fragments = [
        Fragment(f"parameter.{number}", 0, {part: torch.randn(count) for part in PARTS}) for number in range(parameters)
    ]
    shard = Shard(fragments)
    shard.copy(fragments)
    return shard


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _from_rank_0(value: Any) -> Any:
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def _make_board() -> Any:
    """Rank 0's private Ray with the board that a driver would have made; the others join it."""
    quiet: dict[str, Any] = {"namespace": "bench", "log_to_driver": False}
    if dist.get_rank() == 0:
        ray.init(address="local", num_cpus=2, include_dashboard=False, **quiet)
        board = ray.remote(num_cpus=0)(Board).options(name="board").remote()
        ray.get(board.result.remote())
        _from_rank_0(ray.get_runtime_context().gcs_address)
        return board
    ray.init(address=_from_rank_0(None), **quiet)
    return ray.get_actor("board")


def run() -> None:
    task, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo")
    join_process_group()
    board = RemoteBoard(_make_board())
    answer = {"stall": stall, "sent": sent, "throughput": throughput}[task["what"]](task, board)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(answer))
    dist.barrier()
    if dist.get_rank() > 0:
        ray.shutdown()
    dist.barrier()  # the private Ray ends when its last guest has left
    if dist.get_rank() == 0:
        ray.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    run()
