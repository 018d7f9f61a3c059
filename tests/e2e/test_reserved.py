"""What a failed attempt has reserved is given back, and what others have reserved is not touched."""

import json
import re

from cluster.nodes import LocalCluster
from tests.e2e.submit import said, start


def test_a_job_gives_back_its_own_reservations_alone(ray_cluster: LocalCluster) -> None:
    other = start(ray_cluster, "tests.e2e.reserved", "keep")
    assert other.stdout
    kept = next(line for line in other.stdout if re.fullmatch(r"[0-9a-f]{36}\n", line)).strip()
    *_, given_back, states = said(ray_cluster, "tests.e2e.reserved", "release").splitlines()
    found = json.loads(states)
    assert found[kept] == "CREATED"
    assert found[given_back] == "REMOVED"
    other.kill()
    other.communicate()
