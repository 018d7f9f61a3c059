"""Twelve faults, made on real clusters, each named by `luthier why` as a person at a laptop would call it.

Each test stands alone, whatever ran before it on the cluster. The first ones guard every commit, in an order in which
they need not wait for nodes to go.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.launch.spec import MARKET
from cluster.nodes import LocalCluster
from cluster.processes import free_ports, ray_processes
from cluster.why import explain
from cluster.why.facts import NodeGroup
from cluster.why.finding import Cause, Finding
from cluster.why.gather import gather
from tests.conftest import TinyModels
from tests.e2e.submit import start
from tests.e2e.why import (
    ACTOR,
    BIG,
    DEADLINE_S,
    SMALL,
    WAIT,
    Jobs,
    is_empty,
    named,
    program,
    run,
    said,
    troubled,
    until,
)


@pytest.fixture(scope="module")
def cluster(cache: Path) -> Iterator[LocalCluster]:
    with troubled(cache) as cluster:
        yield cluster


@pytest.fixture
def jobs(cluster: LocalCluster) -> Iterator[Jobs]:
    """The jobs of one test, ended with it, and capacity for all. Nodes may stay for the next one."""
    jobs = Jobs(cluster)
    yield jobs
    jobs.end()
    cluster.sell_out()


@pytest.fixture
def empty(cluster: LocalCluster) -> None:
    """No node but the head is there when the test begins."""
    until(lambda: is_empty(cluster), cluster.nodes)


@pytest.mark.usefixtures("empty")
def test_an_empty_cluster_has_nothing_wrong(cluster: LocalCluster) -> None:
    facts = gather(cluster.dashboard_url, None, None)
    assert facts.unread == ()
    assert facts.autoscaler
    labels = {MARKET: "on-demand"}
    assert facts.autoscaler.groups == {each.name: NodeGroup(each.resources, each.most, labels) for each in (SMALL, BIG)}
    (head,) = facts.nodes
    assert 0 < head.disk < 1
    assert explain(facts) == Finding(Cause.NOTHING, "no job runs or waits")


@pytest.mark.usefixtures("empty")
def test_a_cloud_without_capacity(cluster: LocalCluster, jobs: Jobs) -> None:
    cluster.sell_out("big")
    jobs.start("unlucky", "print(1)", entrypoint_num_cpus=2)
    assert "no capacity for big" in named(cluster, Cause.CAPACITY, "unlucky").evidence


@pytest.mark.usefixtures("empty")
def test_a_job_that_starts_as_it_should_is_never_called_wrong(cluster: LocalCluster, jobs: Jobs) -> None:
    jobs.start("healthy", "import time; time.sleep(1000)", entrypoint_num_cpus=1)
    told: list[Finding] = []

    def runs() -> bool:
        told.append(explain(gather(cluster.dashboard_url, "healthy", None)))
        assert told[-1].cause is Cause.NOTHING, told
        return told[-1].evidence.startswith("job healthy is running")

    until(runs, lambda: told)
    assert any("nodes are starting: 1 of small" in each.evidence for each in told), told


def test_a_shape_that_no_node_has(cluster: LocalCluster, jobs: Jobs) -> None:
    jobs.start("large", program("@ray.remote(num_cpus=8)", *ACTOR, "ray.get(Worker.remote().work.remote())"))
    found = named(cluster, Cause.INFEASIBLE, "large")
    assert "8 CPU" in found.evidence
    assert "big has 2 CPU" in found.evidence


@pytest.mark.long
def test_an_autoscaler_that_has_died(cluster: LocalCluster, jobs: Jobs) -> None:
    """Stopped, not killed: `ray start --block` would end with it, where a head on a cloud goes on without."""
    until(lambda: "big" not in cluster.nodes(), cluster.nodes)
    (monitor,) = [pid for pid in ray_processes(str(cluster.folder)) if "v2/monitor.py" in command(pid)]
    os.kill(monitor, signal.SIGSTOP)
    try:
        jobs.start("orphan", "print(1)", entrypoint_num_cpus=2)
        named(cluster, Cause.AUTOSCALER, "orphan")
        code, out, _ = said(cluster, "orphan")
    finally:
        os.kill(monitor, signal.SIGCONT)
    named(cluster, Cause.NOTHING, "orphan")
    assert code == 1
    assert out.startswith("dead autoscaler: ")
    assert "\nfix: restart the head" in out


@pytest.mark.long
def test_an_environment_that_cannot_be_made(cluster: LocalCluster, jobs: Jobs) -> None:
    task = ('@ray.remote(num_cpus=0, runtime_env={"working_dir": "file:///nowhere/x.zip"})', "def work(): pass")
    jobs.start("astray", program(*task, "ray.get(work.remote())"))
    assert "/nowhere/x.zip" in named(cluster, Cause.ENVIRONMENT, "astray").evidence
    jobs.start("wrong", "print(1)", runtime_env={"conda": "no-such-environment"})
    assert "Conda" in named(cluster, Cause.ENVIRONMENT, "wrong").evidence


def test_workers_that_ask_for_nothing(cluster: LocalCluster, jobs: Jobs) -> None:
    jobs.start("modesty", program("@ray.remote(num_cpus=0)", *ACTOR, "ray.get(Worker.remote().work.remote())"))
    assert "Worker" in named(cluster, Cause.FORGOTTEN, "modesty").evidence


@pytest.mark.long
def test_more_nodes_than_there_may_be_and_beside_them_a_job_that_runs(cluster: LocalCluster, jobs: Jobs) -> None:
    workers = ("workers = [Worker.remote() for _ in range(6)]", "ray.get([each.work.remote() for each in workers])")
    jobs.start("many", program("@ray.remote(num_cpus=1)", *ACTOR, *workers))
    found = named(cluster, Cause.CAP, "many")
    assert "small has 2 of at most 2" in found.evidence
    assert "in use by many" in found.evidence
    jobs.start("modest", "import time; print('well', flush=True); time.sleep(1000)")
    well = "job modest is running; it said last: well"
    until(
        lambda: named(cluster, Cause.NOTHING, "modest").evidence == well,
        lambda: named(cluster, Cause.NOTHING, "modest"),
    )


@pytest.mark.long
def test_a_placement_group_that_is_held_for_nobody(cluster: LocalCluster, jobs: Jobs) -> None:
    hold = 'ray.get(ray.util.placement_group([{"CPU": 2}], name="kept", lifetime="detached").ready())'
    jobs.start("holder", program(hold))
    jobs.wait("holder")
    jobs.start("waiter", "print(1)", entrypoint_num_cpus=2)
    found = named(cluster, Cause.HELD, "waiter")
    assert "kept" in found.evidence
    run(cluster, *shlex.split(found.fix.split("`")[1]))  # what it says is what helps
    jobs.wait("waiter")


@pytest.mark.long
def test_a_node_that_an_idle_actor_keeps(cluster: LocalCluster, jobs: Jobs) -> None:
    jobs.start("idler", program("@ray.remote", *ACTOR, "worker = Worker.remote()", WAIT))  # 1 CPU to begin, then none
    assert "Worker of job idler" in named(cluster, Cause.PINNED).evidence


@pytest.mark.long
def test_a_node_that_an_object_keeps(cluster: LocalCluster, jobs: Jobs) -> None:
    made = ("@ray.remote(num_cpus=1)", "def made(): return bytes(10**7)", "kept = made.remote()", "ray.wait([kept])")
    jobs.start("keeper", program(*made, WAIT))
    assert "MiB of objects" in named(cluster, Cause.PINNED).evidence


@pytest.fixture
def full_node(cluster: LocalCluster) -> Iterator[str]:
    """A node whose temporary folder is on a full disk of its own, in memory; gives the node's id."""
    folder = cluster.folder / "1"  # the second node that is started by hand
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"only root makes a small disk: {mounted.stderr.decode()}")
    try:
        before = cluster.alive()
        node = cluster.add_node(cpus=1)
        (joined,) = cluster.alive() - before
        with (folder / "data").open("wb") as file:
            file.write(bytes(shutil.disk_usage(folder).free - 10 * 2**20))  # 96 % full then; Ray's own logs go on
            file.flush()
            yield joined
        node.terminate()
        node.wait(DEADLINE_S)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.long
@pytest.mark.usefixtures("empty")
def test_a_disk_that_is_full(cluster: LocalCluster, full_node: str) -> None:
    found = named(cluster, Cause.DISK)
    assert f"the disk of node {full_node[:8]} is 9" in found.evidence


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
    try:
        failing = start(cluster, "serving", *deploy, "engine={kind: vllm, python: /nowhere/python}")
        assert "/nowhere/python" in named(cluster, Cause.REPLICA, "served").evidence
        output, _ = failing.communicate(timeout=DEADLINE_S)
        assert failing.returncode == 1, output
        serving = start(cluster, "serving", *deploy)
        output, _ = serving.communicate(timeout=DEADLINE_S)
        assert serving.returncode == 0, output
        assert "absent" in named(cluster, Cause.ADAPTER, "served").evidence
    finally:
        start(cluster, "serving", "shutdown", "--address", cluster.address).communicate(timeout=DEADLINE_S)


def test_another_token_another_ray_and_no_cluster(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "token"
    other.write_text("f" * 64)
    code, out, _ = said(cluster, "--json", RAY_AUTH_TOKEN_PATH=str(other))
    assert (code, json.loads(out)["cause"]) == (1, Cause.TOKEN)
    (closed,) = free_ports(1)
    assert explain(gather(f"http://127.0.0.1:{closed}", None, None)).cause is Cause.SILENT
    assert not gather(cluster.dashboard_url, None, None).refused
    monkeypatch.setattr("cluster.submit.version", lambda name: "2.59.0")
    assert named(cluster, Cause.VERSION)


def test_an_unknown_run_is_bad_input(cluster: LocalCluster) -> None:
    code, out, err = said(cluster, "nonesuch")
    assert (code, out) == (2, "")
    assert "'nonesuch'" in err


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
