"""`python -m tests.e2e.reserved keep|release`: a job that reserves a CPU, and keeps it or gives it back."""

import json
import sys
import time

import ray
from ray.util.placement_group import placement_group, placement_group_table

from cluster.session import release_places

WAIT_S = 60.0


def main(what: str) -> None:
    """Print the reserved group's id, and then, if it is given back, the state of all there are."""
    ray.init()
    group = placement_group([{"CPU": 1}])
    assert group.wait(WAIT_S)
    print(group.id.hex(), flush=True)
    if what == "keep":
        time.sleep(WAIT_S)
        return
    release_places()
    print(json.dumps({name: found["state"] for name, found in placement_group_table().items()}))


if __name__ == "__main__":
    main(sys.argv[1])
