"""`luthier cluster up` on two machines with real sshd, `ray up` and Ray's autoscaler, from a laptop beside them.

The machines are namespaces (tests/machines.py): own addresses, processes, homes. It takes two minutes and 2 GB.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lab import HEAD, WORKER
from tests.machines import isolated

SSHD = "/usr/sbin/sshd"

pytestmark = pytest.mark.long


def test_a_cluster_over_ssh_comes_up_closed_works_and_goes(tmp_path: Path) -> None:
    seen, complaints = isolated("tests.cluster.lab", tmp_path, "rsync", "ssh", "ssh-keygen", SSHD, timeout_s=500)
    check(seen, complaints)


def check(seen: dict[str, Any], complaints: str) -> None:
    """Up, closed, working, down."""
    said = json.dumps(seen, indent=1) + complaints
    assert seen["up"][0] == 0, said
    assert seen["failed"] == [], said
    assert seen["modes"] == ["0o600"] * 4, "token and environment, on both machines"
    assert seen["tokens_differ"] is False
    assert seen["token_in_processes"] is False
    assert 8265 not in seen["open_to_the_laptop"], "the dashboard is behind the tunnel"
    code, output = seen["job"]
    assert code == 0, said
    result = json.loads(re.search(r"RESULT (\{.*\})", output)[1])  # type: ignore[index]
    assert (result["driver"], result["task"]) == (WORKER, WORKER), f"{HEAD} is the head, which runs no work"
    assert re.fullmatch(r"canary-[0-9a-f]{8}", result["canary"]), "the environment's file reached the worker"
    code, output = seen["refused"]
    assert code != 0
    assert "Missing authentication token" in output, said
    assert seen["status"][0] == 0, said
    assert "2 local.cluster.node" in seen["status"][1], said
    assert seen["down"][0] == 0, said
    assert "Traceback" not in seen["monitor.err"], said  # ssh writes its remarks there
