"""Training workers as forked processes: the real worker on the tests' Ray cluster, without Ray Train around it.

A process that has imported everything is forked for each rank, so that a trial of start, kill −9 and start again takes
seconds. What Ray Train and the driver add is tested with whole jobs, in test_events.py and tests/e2e.
"""

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.nodes import LocalCluster
from cluster.processes import free_ports
from cluster.records import RunRecord

NAMESPACE = "ranks"
_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(["tests.faults.preload"])


@dataclass(frozen=True)
class Setting:
    """What a rank needs to take part: who it is, and where the Ray cluster and the store are."""

    rank: int
    world_size: int
    port: int
    address: str
    environment: dict[str, str]
    board: str
    out: Path


class Ranks:
    """Some processes that do one thing together, from their start to their end."""

    def __init__(
        self,
        cluster: LocalCluster,
        variables: dict[str, str],
        world_size: int,
        out: Path,
        do: Callable[..., Any],
        *given: Any,
    ) -> None:
        (port,) = free_ports(1)
        environment = {**cluster.environment(), **variables}
        board = f"board-{uuid4().hex}"
        out.mkdir(parents=True, exist_ok=True)
        self._out = out
        for old in out.glob("rank-*"):
            old.unlink()
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            setting = Setting(rank, world_size, port, cluster.address, environment, board, out)
            process = _forking.Process(target=_main, args=(setting, do, *given))
            process.start()
            self.processes.append(process)

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """kill −9, all at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self) -> Any:
        """To the end. Returns what rank 0 came to; fails with what the ranks said when one of them failed."""
        deadline = time.monotonic() + 300
        for process in self.processes:
            process.join(max(1.0, deadline - time.monotonic()))
        if any(process.exitcode != 0 for process in self.processes):
            self.kill()
            logs = [path.read_text(errors="replace")[-3000:] for path in sorted(self._out.glob("rank-*.log"))]
            raise AssertionError("\n".join([*(f"exit {process.exitcode}" for process in self.processes), *logs]))
        found: Any = json.loads((self._out / "rank-0.json").read_text())
        return found


def _main(setting: Setting, do: Callable[..., Any], *given: Any) -> None:
    log = os.open(setting.out / f"rank-{setting.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(setting.environment)
    os.environ.update(RANK=str(setting.rank), WORLD_SIZE=str(setting.world_size), LOCAL_RANK=str(setting.rank))
    try:
        found = do(setting, *given)
        if setting.rank == 0:
            (setting.out / "rank-0.json").write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # Ray and gloo have threads that a forked child need not wait for


def join(setting: Setting) -> Any:
    """Join Ray and the process group. Returns the board."""
    import ray
    import torch
    import torch.distributed as dist

    from jobs.progress import Board

    ray.init(address=setting.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{setting.port}",
        rank=setting.rank,
        world_size=setting.world_size,
    )
    if setting.rank == 0:
        board = ray.remote(num_cpus=0)(Board).options(name=setting.board).remote()
        ray.get(board.look.remote())
    dist.barrier()
    return board if setting.rank == 0 else ray.get_actor(setting.board, namespace=NAMESPACE)


def prepare(setting: Setting, recipes: list[Path]) -> list[str]:
    """What a driver does before it starts workers, for each recipe. Returns the run ids."""
    os.environ["RAY_ADDRESS"] = setting.address
    from cluster.config import load
    from cluster.licences.gate import Gate
    from cluster.session import joined
    from cluster.store import open_store
    from jobs import dataset, driver
    from jobs.config import Recipe

    loaded = [load(path, Recipe) for path in recipes]
    begun = []
    with joined(loaded[0].cluster, 1):
        for recipe in loaded:
            store = open_store(recipe.store)
            files = dataset.locate_all(recipe.data.train, store, setting.out)
            begun.append(driver.begin(recipe, [files, []], None, store, Gate.here())[0].run_id)
    return begun


def train(setting: Setting, store_url: str, record: RunRecord, changes: dict[str, int], zero: int) -> Any:
    """One rank's part in an attempt of a run, to its end."""
    import ray

    from cluster.config import load
    from cluster.store import open_store
    from jobs.config import Recipe
    from jobs.job import Job
    from jobs.worker import work

    path = setting.out / f"recipe-{setting.rank}.yaml"
    path.write_text(json.dumps(record.recipe))
    recipe = load(path, Recipe).at(**changes)
    board = join(setting)
    store = open_store(store_url)
    data = (record.dataset, record.evaluation)
    work(Job(record.run_id, recipe, record.base, zero, *data, record.parent, store, board, record.licences))
    import torch.distributed as dist

    result = ray.get(board.result.remote())
    dist.barrier()  # the board ends with rank 0
    if isinstance(result, Exception):
        raise result
    return result
