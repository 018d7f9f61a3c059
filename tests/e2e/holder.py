"""`python -m tests.e2e.holder FILE`: a job that holds a whole cluster of two CPUs until there is such a file."""

import sys
import time
from pathlib import Path

import ray

from cluster.place import ClusterConfig
from jobs.turn import Turn, ticket

WHOLE = ClusterConfig(name="test", memory_gb_per_worker=1, cpus_per_worker=2, shared=True)


def main(file: Path) -> None:
    ray.init()
    with Turn(ticket("holder", "cat", 0, 1, WHOLE), WHOLE) as turn:
        assert turn.wait(print, lambda: False)
        print("holds", flush=True)
        while not file.exists():
            time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
