"""`luthier cluster doctor` on a live cluster: nothing to say of a healthy one, and faults that were made, by name."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.doctor.examine import examine
from cluster.doctor.finding import Check, Finding, Level
from cluster.doctor.gather import gather
from cluster.nodes import LocalCluster
from cluster.store import Store
from tests.e2e.submit import ROOT
from tests.servers import StubS3


@pytest.fixture
def readable_token(ray_cluster: LocalCluster) -> Iterator[Path]:
    token = Path(ray_cluster.environment()["RAY_AUTH_TOKEN_PATH"])
    token.chmod(0o644)
    yield token
    token.chmod(0o600)


def faults(found: list[Finding]) -> dict[Check, Finding]:
    return {each.check: each for each in found if each.level is Level.FAULT}


def test_a_healthy_cluster_has_no_fault(ray_cluster: LocalCluster, store: Store, tmp_path: Path) -> None:
    place = tmp_path / "here.yaml"
    place.write_text("name: here\nmemory_gb_per_worker: 0.5\n")
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "doctor", str(place), "--store", store.url, "--json"],
        cwd=ROOT, env=ray_cluster.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    levels = {(each["check"], each["level"]) for each in found}
    # Whatever else runs on this machine may fill its disk and its memory.
    assert {each for each in levels if each[0] not in ("disk", "memory", "shared memory")} == {
        (check.subject, "ok") for check in set(Check) - {Check.IMAGE, Check.DISK, Check.MEMORY, Check.SHARED_MEMORY}
    }, found
    said = {each["check"]: each for each in found}
    nodes = len(ray_cluster.alive())
    assert len(said["token asked for"]["nodes"]) == nodes
    asked = re.search(r"(\d+) refuse", said["token asked for"]["seen"])  # raylet, two agents; GCS, dashboard
    assert asked
    assert int(asked[1]) >= 3 * nodes + 2
    assert "127.0.0.1" in said["dashboard on loopback"]["seen"]
    assert said["node to node"]["seen"].startswith(f"{nodes * (nodes - 1)} ways")
    assert list(store.list(".probe/")) == []


def test_faults_that_were_made_are_named(
    laptop: LocalCluster, store: Store, readable_token: Path, tmp_path: Path
) -> None:
    with StubS3() as server:  # it ignores If-None-Match
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        (tmp_path / "endpoint").write_text(f"http://127.0.0.1:{server.server_port}")
        secrets = {"AWS_ENDPOINT_URL": f"secret://file{tmp_path}/endpoint"}
        found = examine(gather(laptop.dashboard_url, store=store.url, secrets=secrets))
        server.shutdown()
    named = faults(found)
    assert set(named) == {Check.TOKEN_FILE, Check.STORE}, found
    assert "ignores `If-None-Match: *`" in named[Check.STORE].seen
    assert len(named[Check.STORE].nodes) == len(laptop.alive())
    assert named[Check.TOKEN_FILE].seen.startswith(f"{readable_token} has mode 0644")
    assert named[Check.TOKEN_FILE].fix == f"chmod 600 {readable_token}"


def test_wrong_credentials_are_named(laptop: LocalCluster, store: Store, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("another-secret-key-than-the-servers")
    secrets = {"AWS_SECRET_ACCESS_KEY": f"secret://file{tmp_path}/key"}
    named = faults(examine(gather(laptop.dashboard_url, store=store.url, secrets=secrets)))
    assert set(named) == {Check.STORE}, named
    assert "check AWS_ACCESS_KEY_ID" in named[Check.STORE].seen


def test_nodes_that_do_not_answer_in_time_are_named(laptop: LocalCluster) -> None:
    named = faults(examine(gather(laptop.dashboard_url, timeout_s=0.001)))
    assert named[Check.NODES].seen == "no answer within 0.001 s"


def test_a_wrong_token_and_an_address_that_is_none(laptop: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("f" * 64)
    (tmp_path / "token").chmod(0o600)
    for address, variables, code, said in (
        (laptop.dashboard_url, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, 1, "refuses the token"),
        (laptop.address, {}, 2, "is not a dashboard"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cluster", "doctor", "--address", address],
            cwd=ROOT, env={**laptop.environment(), **variables}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stdout + done.stderr
