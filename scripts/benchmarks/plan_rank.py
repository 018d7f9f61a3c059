"""One rank of `scripts/bench plan`: the real worker in a plain process, and the most memory that it held.

    RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=… MASTER_PORT=… python -m scripts.benchmarks.plan_rank TASK OUT.json

TASK is the JSON object that `plan.Bench` makes. All of jobs/worker.py runs, but under this process instead of Ray
Train: in a thread that is not the main one, as there, because glibc's allocator differs between the two.
DeepSpeed's variables are set (jobs.attempts).
"""

import json
import sys
import threading
from pathlib import Path

import ray
import torch
import torch.distributed as dist

from cluster.config import load
from cluster.records import BaseModelRef
from cluster.store import open_store
from jobs.config import Recipe
from jobs.job import Job
from jobs.progress import Board
from jobs.worker import work

MIB = 1 << 20


def resident(what: str) -> int:
    """This process's memory by the kernel's word: `VmRSS` now, `VmHWM` at most so far; bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(lines[what].split()[0])


def take_part() -> None:
    """Join Ray and the process group, work, and say what it held."""
    task, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    ray.init(address=task["address"], namespace="bench-plan", log_to_driver=False, logging_level="ERROR")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        board = ray.remote(num_cpus=0)(Board).options(name=task["run_id"]).remote()
        ray.get(board.look.remote())
    dist.barrier()
    board = board if rank == 0 else ray.get_actor(task["run_id"])
    recipe = load(Path(task["recipe"]), Recipe)
    job = Job(
        run_id=task["run_id"],
        recipe=recipe,
        base=BaseModelRef(**task["base"]),
        zero=task["zero"],
        dataset=task["dataset"],
        evaluation=None,
        parent=None,
        store=open_store(recipe.store),
        board=board,
    )
    before = resident("VmRSS")
    thread = threading.Thread(target=work, args=(job,))
    thread.start()
    thread.join()
    dist.barrier()  # rank 0 leaves the result after all others have ended
    result = ray.get(board.result.remote())
    if not isinstance(result, dict) or result["state"] != "succeeded":
        raise SystemExit(f"the run did not succeed: {result}")
    held: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(held, resident("VmHWM"))
    if rank == 0:
        out.write_text(json.dumps({"peak_bytes": max(held), "before_bytes": before, "loss": result["metrics"]["loss"]}))
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    take_part()
