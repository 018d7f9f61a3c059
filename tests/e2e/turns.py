"""`python -m tests.e2e.turns`: a driver process in which several jobs ask for the whole of a small cluster."""

import json
import threading
import time

import ray

from cluster.place import ClusterConfig
from cluster.queue import Ticket
from jobs.turn import Turn, ticket

WHOLE = ClusterConfig(name="test", memory_gb_per_worker=1, shared=True)
WORKERS = 4


def main() -> None:
    """Print the span of each job that ran, and what those said that waited."""
    ray.init()
    spans: dict[str, tuple[float, float]] = {}
    said: list[str] = []

    def run(asked: Ticket) -> None:
        with Turn(asked, WHOLE) as turn:
            assert turn.wait(said.append, lambda: False)
            began = time.monotonic()
            time.sleep(0.3)  # it trains
            spans[asked.id] = (began, time.monotonic())

    with Turn(ticket("holds", "ann", 0, WORKERS, WHOLE), WHOLE) as first:
        assert first.wait(said.append, lambda: False)
        with Turn(ticket("gives-up", "bob", 0, WORKERS, WHOLE), WHOLE) as second:
            looks = iter([False, False, True])
            assert not second.wait(said.append, lambda: next(looks))
    asked = [ticket(f"{user}-{number}", user, 0, WORKERS, WHOLE) for number in range(2) for user in ("ann", "bob")]
    threads = [threading.Thread(target=run, args=(each,)) for each in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"spans": spans, "said": said}))


if __name__ == "__main__":
    main()
