"""What the tests of `luthier why` share: a cluster that can be in trouble, jobs that end with their test, and asking.

Every wait here has an end, and says then what was seen last.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.errors import InputError
from cluster.nodes import Group, LocalCluster
from cluster.submit import ENDED
from cluster.why import explain
from cluster.why.finding import Cause, Finding
from cluster.why.gather import gather
from tests.e2e.submit import ROOT

DEADLINE_S = 90.0
"""Far above what each takes (20 s at most), and so short that a test of several waits ends before pytest ends it."""

SMALL, BIG = Group("small", {"CPU": 1}, most=2), Group("big", {"CPU": 2}, most=1)

WAIT = "time.sleep(1000)"
ACTOR = ("class Worker:", "    def work(self): time.sleep(1000)")


@contextmanager
def troubled(cache: Path) -> Iterator[LocalCluster]:
    """A head without CPUs, two groups behind Ray's autoscaler, and this process with the cluster's token.

    The GCS writes down what it has counted every 5 s here, not every minute: the autoscaler reports once a second.
    Nodes are looked at every 2 s, not 15.
    """
    often = {"RAY_event_stats_print_interval_ms": "5000", "NODE_STATS_UPDATE_INTERVAL_SECONDS": "2"}
    variables = {"LUTHIER_CACHE": str(cache), **often}
    with (
        LocalCluster(groups=[SMALL, BIG], variables=variables, idle_s=3) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_AUTH_TOKEN_PATH", cluster.environment()["RAY_AUTH_TOKEN_PATH"])
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        yield cluster


class Jobs:
    """Submits python programs; ends them and whatever they hold, and lets Ray forget them."""

    def __init__(self, cluster: LocalCluster) -> None:
        headers = {"Authorization": f"Bearer {Path(cluster.environment()['RAY_AUTH_TOKEN_PATH']).read_text()}"}
        self._cluster = cluster
        self._http = httpx.Client(base_url=cluster.dashboard_url, headers=headers, timeout=30)
        self._started: list[str] = []

    def start(self, name: str, program: str, **options: Any) -> None:
        entrypoint = shlex.join(["python", "-c", program])
        job = {"entrypoint": entrypoint, "submission_id": name, **options}
        self._http.post("/api/jobs/", json=job).raise_for_status()
        self._started.append(name)

    def wait(self, name: str) -> None:
        """Until it has ended."""
        until(lambda: self._look(name)["status"] in ENDED, lambda: self._look(name))

    def end(self) -> None:
        """Ray stops what runs only: of what waits for a place the actor is killed that would run it."""
        for name in self._started:
            self._http.post(f"/api/jobs/{name}/stop").raise_for_status()
        waiting = [name for name in self._started if self._look(name)["status"] == "PENDING"]
        groups = self._http.get("/api/v0/placement_groups").raise_for_status().json()["data"]["result"]["result"]
        if waiting or any(group["state"] != "REMOVED" for group in groups):
            clear(self._cluster, waiting)
        for name in self._started:
            self.wait(name)
            self._http.delete(f"/api/jobs/{name}").raise_for_status()
        self._http.close()

    def _look(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get(f"/api/jobs/{name}").raise_for_status().json()
        return found


_CLEAR = """
import sys
import ray
from ray.dashboard.modules.job.common import JOB_ACTOR_NAME_TEMPLATE, SUPERVISOR_ACTOR_RAY_NAMESPACE
from ray.util.placement_group import PlacementGroup

ray.init(namespace=SUPERVISOR_ACTOR_RAY_NAMESPACE, log_to_driver=False)
for job in sys.argv[1:]:
    try:
        ray.kill(ray.get_actor(JOB_ACTOR_NAME_TEMPLATE.format(job_id=job)))
    except ValueError:
        pass  # it has ended meanwhile
for group in ray.util.placement_group_table():
    ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))
"""


def clear(cluster: LocalCluster, jobs: list[str]) -> None:
    """Kill the actors of these jobs, and remove all placement groups."""
    run(cluster, sys.executable, "-c", _CLEAR, *jobs, RAY_ADDRESS=cluster.address)


def run(cluster: LocalCluster, *command: str, **variables: str) -> str:
    """A command that shall do what it is for, at once."""
    done = ended(cluster, *command, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def said(cluster: LocalCluster, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """What `luthier why` prints, and its exit code."""
    done = ended(cluster, sys.executable, "-m", "cluster", "why", *arguments, **variables)
    return done.returncode, done.stdout, done.stderr


def ended(cluster: LocalCluster, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**cluster.environment(), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)


def named(cluster: LocalCluster, cause: Cause, run: str | None = None) -> Finding:
    """Ask until it is that cause: what a fault has not yet led to, or what is not there yet, cannot be seen."""
    found: Finding | None = None
    seen: object = None

    def is_named() -> bool:
        nonlocal found, seen
        try:
            seen = found = explain(gather(cluster.dashboard_url, run, None))
        except InputError as error:
            seen = error
        return found is not None and found.cause is cause

    until(is_named, lambda: seen)
    assert found
    return found


def until(condition: Callable[[], bool], told: Callable[[], object]) -> None:
    """Wait for a condition; when it does not come, fail with what is known."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def is_empty(cluster: LocalCluster) -> bool:
    """Whether all nodes that came have gone, Ray has seen it, and none is asked for, be it one that is refused."""
    if cluster.nodes() or len(cluster.alive()) > 1:
        return False
    scaler = gather(cluster.dashboard_url, None, None).autoscaler
    return scaler is not None and not scaler.starting


def program(*lines: str) -> str:
    return "\n".join(["import ray, time", "ray.init()", *lines])
