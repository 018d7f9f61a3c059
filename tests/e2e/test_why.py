"""Twelve faults, made on real clusters, each named by `luthier why` as a person at a laptop would call it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from cluster.launch.spec import MARKET
from cluster.nodes import Group, LocalCluster
from cluster.processes import free_ports, ray_processes
from cluster.why import explain
from cluster.why.facts import NodeGroup
from cluster.why.finding import Cause, Finding
from cluster.why.gather import gather
from tests.conftest import TinyModels
from tests.e2e.submit import DEADLINE_S, ROOT, start

pytestmark = pytest.mark.long

SMALL, BIG = Group("small", {"CPU": 1}, most=2), Group("big", {"CPU": 2}, most=1)


@pytest.fixture(scope="module")
def cluster(cache: Path) -> Iterator[LocalCluster]:
    """A head without CPUs, two groups behind Ray's autoscaler, and this process with the cluster's token.

    The GCS writes down what it has counted every second here, not every minute; nodes are looked at every 2 s, not 15.
    """
    often = {"RAY_event_stats_print_interval_ms": "1000", "NODE_STATS_UPDATE_INTERVAL_SECONDS": "2"}
    variables = {"LUTHIER_CACHE": str(cache), **often}
    with (
        LocalCluster(groups=[SMALL, BIG], variables=variables, idle_s=3) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_AUTH_TOKEN_PATH", cluster.environment()["RAY_AUTH_TOKEN_PATH"])
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        yield cluster


class Jobs:
    """Submits python programs, and ends them."""

    def __init__(self, cluster: LocalCluster) -> None:
        headers = {"Authorization": f"Bearer {Path(cluster.environment()['RAY_AUTH_TOKEN_PATH']).read_text()}"}
        self._client = JobSubmissionClient(cluster.dashboard_url, headers=headers)
        self._started: list[str] = []

    def start(self, name: str, program: str, **options: Any) -> None:
        self._client.submit_job(entrypoint=shlex.join(["python", "-c", program]), submission_id=name, **options)
        self._started.append(name)

    def end(self) -> None:
        for name in self._started:
            self._client.stop_job(name)
        for name in self._started:
            self.wait(name)

    def wait(self, name: str) -> None:
        """Until it has ended."""
        until(lambda: self._client.get_job_status(name).is_terminal())


@pytest.fixture
def jobs(cluster: LocalCluster) -> Iterator[Jobs]:
    """The jobs of one test, ended with it. Their nodes may stay for the next."""
    jobs = Jobs(cluster)
    yield jobs
    jobs.end()


def named(cluster: LocalCluster, cause: Cause, run: str | None = None) -> Finding:
    """Ask until it is that cause: what a fault has not yet led to cannot be seen."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := explain(gather(cluster.dashboard_url, run, None))).cause is not cause:
        assert time.monotonic() < deadline, found
    return found


def said(cluster: LocalCluster, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """What `luthier why` prints, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "why", *arguments],
        cwd=ROOT, env={**cluster.environment(), **variables}, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def program(*lines: str) -> str:
    return "\n".join(["import ray, time", "ray.init()", *lines])


WAIT = "time.sleep(1000)"
ACTOR = ("class Worker:", "    def work(self): time.sleep(1000)")


def test_an_empty_cluster_has_nothing_wrong(cluster: LocalCluster) -> None:
    facts = gather(cluster.dashboard_url, None, None)
    assert facts.unread == ()
    assert facts.autoscaler
    labels = {MARKET: "on-demand"}
    assert facts.autoscaler.groups == {each.name: NodeGroup(each.resources, each.most, labels) for each in (SMALL, BIG)}
    (head,) = facts.nodes
    assert 0 < head.disk < 1
    assert explain(facts) == Finding(Cause.NOTHING, "no job runs or waits")


def test_a_job_that_starts_as_it_should_is_never_called_wrong(cluster: LocalCluster, jobs: Jobs) -> None:
    jobs.start("healthy", "import time; time.sleep(1000)", entrypoint_num_cpus=1)
    told: list[Finding] = []
    while not told or not told[-1].evidence.startswith("job healthy is running"):
        told.append(explain(gather(cluster.dashboard_url, "healthy", None)))
        assert told[-1].cause is Cause.NOTHING, told
    assert any("nodes are starting: 1 of small" in each.evidence for each in told), told


def test_a_shape_that_no_node_has(cluster: LocalCluster, jobs: Jobs) -> None:
    jobs.start("large", program("@ray.remote(num_cpus=8)", *ACTOR, "ray.get(Worker.remote().work.remote())"))
    found = named(cluster, Cause.INFEASIBLE, "large")
    assert "8 CPU" in found.evidence
    assert "big has 2 CPU" in found.evidence


def test_a_cloud_without_capacity(cluster: LocalCluster, jobs: Jobs) -> None:
    until(lambda: not cluster.nodes())
    cluster.sell_out("small", "big")
    jobs.start("unlucky", "print(1)", entrypoint_num_cpus=1)
    assert "no capacity for" in named(cluster, Cause.CAPACITY, "unlucky").evidence
    cluster.sell_out()


def test_an_environment_that_cannot_be_made(cluster: LocalCluster, jobs: Jobs) -> None:
    task = ('@ray.remote(num_cpus=0, runtime_env={"working_dir": "file:///nowhere/x.zip"})', "def work(): pass")
    jobs.start("astray", program(*task, "ray.get(work.remote())"))
    assert "/nowhere/x.zip" in named(cluster, Cause.ENVIRONMENT, "astray").evidence
    jobs.start("wrong", "print(1)", runtime_env={"conda": "no-such-environment"})
    assert "Conda" in named(cluster, Cause.ENVIRONMENT, "wrong").evidence


def test_workers_that_ask_for_nothing(cluster: LocalCluster, jobs: Jobs) -> None:
    jobs.start("modesty", program("@ray.remote(num_cpus=0)", *ACTOR, "ray.get(Worker.remote().work.remote())"))
    assert "Worker" in named(cluster, Cause.FORGOTTEN, "modesty").evidence


def test_more_nodes_than_there_may_be_and_beside_them_a_job_that_runs(cluster: LocalCluster, jobs: Jobs) -> None:
    workers = ("workers = [Worker.remote() for _ in range(6)]", "ray.get([each.work.remote() for each in workers])")
    jobs.start("many", program("@ray.remote(num_cpus=1)", *ACTOR, *workers))
    found = named(cluster, Cause.CAP, "many")
    assert "small has 2 of at most 2" in found.evidence
    assert "in use by many" in found.evidence
    jobs.start("modest", "import time; print('well', flush=True); time.sleep(1000)")
    until(lambda: named(cluster, Cause.NOTHING, "modest").evidence == "job modest is running; it said last: well")


def test_a_placement_group_that_is_held_for_nobody(cluster: LocalCluster, jobs: Jobs) -> None:
    hold = 'ray.get(ray.util.placement_group([{"CPU": 2}], name="kept", lifetime="detached").ready())'
    jobs.start("holder", program(hold))
    jobs.wait("holder")
    jobs.start("waiter", "print(1)", entrypoint_num_cpus=2)
    found = named(cluster, Cause.HELD, "waiter")
    assert "kept" in found.evidence
    jobs.start("mender", program(found.fix.split("`")[1]))  # what it says is what helps
    jobs.wait("waiter")


def test_a_node_that_an_idle_actor_keeps(cluster: LocalCluster, jobs: Jobs) -> None:
    jobs.start("idler", program("@ray.remote", *ACTOR, "worker = Worker.remote()", WAIT))  # 1 CPU to begin, then none
    assert "Worker of job idler" in named(cluster, Cause.PINNED).evidence


def test_a_node_that_an_object_keeps(cluster: LocalCluster, jobs: Jobs) -> None:
    made = ("@ray.remote(num_cpus=1)", "def made(): return bytes(10**7)", "kept = made.remote()", "ray.wait([kept])")
    jobs.start("keeper", program(*made, WAIT))
    assert "MiB of objects" in named(cluster, Cause.PINNED).evidence


@pytest.mark.long
def test_a_replica_that_cannot_start_and_an_adapter_that_is_missing(
    cluster: LocalCluster, tiny_models: TinyModels, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    config = tmp_path / "served.yaml"
    config.write_text(
        f"name: served\nmodel: {{name: tiny, source: {tiny_models['qwen3']}, licence: apache-2.0, dtype: fp32}}\n"
        f"store: file://{tmp_path}/store\nhttp: {{port: {port}}}\nadapters: {{pinned: [absent]}}\n"
    )
    deploy = ("deploy", str(config), "--address", cluster.address)
    failing = start(cluster, "serving", *deploy, "engine={kind: vllm, python: /nowhere/python}")
    assert "/nowhere/python" in named(cluster, Cause.REPLICA, "served").evidence
    assert failing.wait() == 1
    assert start(cluster, "serving", *deploy).wait() == 0
    assert "absent" in named(cluster, Cause.ADAPTER, "served").evidence
    assert start(cluster, "serving", "shutdown", "--address", cluster.address).wait() == 0


def test_another_token_another_ray_and_no_cluster(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "token"
    other.write_text("f" * 64)
    code, out, _ = said(cluster, "--json", RAY_AUTH_TOKEN_PATH=str(other))
    assert (code, json.loads(out)["cause"]) == (1, Cause.TOKEN)
    (closed,) = free_ports(1)
    assert named(cluster, Cause.NOTHING)
    assert explain(gather(f"http://127.0.0.1:{closed}", None, None)).cause is Cause.SILENT
    monkeypatch.setattr("cluster.submit.version", lambda name: "2.59.0")
    assert named(cluster, Cause.VERSION)


def test_an_unknown_run_is_bad_input(cluster: LocalCluster) -> None:
    code, out, err = said(cluster, "nonesuch")
    assert (code, out) == (2, "")
    assert "'nonesuch'" in err


def test_an_autoscaler_that_has_died(cluster: LocalCluster, jobs: Jobs) -> None:
    """Stopped, not killed: `ray start --block` would end with it, where a head on a cloud goes on without. Last."""
    until(lambda: not cluster.nodes())
    (monitor,) = [pid for pid in ray_processes(str(cluster.folder)) if "v2/monitor.py" in command(pid)]
    os.kill(monitor, signal.SIGSTOP)
    jobs.start("orphan", "print(1)", entrypoint_num_cpus=1)
    named(cluster, Cause.AUTOSCALER, "orphan")
    code, out, _ = said(cluster, "orphan")
    assert code == 1
    assert out.startswith("dead autoscaler: ")
    assert "\nfix: restart the head" in out


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
