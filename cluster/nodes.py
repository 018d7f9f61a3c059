"""A Ray cluster of local processes, with token authentication: a head, and nodes that one adds, or that come on demand.

    with LocalCluster(head_cpus=2) as cluster:
        cluster.add_node(cpus=1)
        subprocess.run([..., "ray", "job", "submit", …], env=cluster.environment())

    with LocalCluster(groups=[Group("spot", {"CPU": 1}, most=4, spot=True), Group("on-demand", {"CPU": 1}, most=4)]):
        …  # Ray's own autoscaler starts and ends nodes of these groups: see provider.py

Used by the quickstart and the tests. It shares nothing with other Ray clusters of the machine: own ports, own token
file (mode 0600), own temporary folder; and `ray stop`, which would end them all, is never called.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from cluster import env, processes
from cluster.errors import LuthierError
from cluster.launch.spec import MARKET
from cluster.processes import HOST, free_ports

START_TIMEOUT_S = 120.0
POLL_S = 0.2

HEAD_GROUP = "ray.head.default"
"""What Ray's autoscaler calls the head; a name that it relies on."""


@dataclass(frozen=True)
class Group:
    """Nodes of one kind that come when they are asked for, and go when they are idle.

    Attributes:
        resources: what a node offers, by Ray's names.
        most: how many there may be.
        spot: whether they may be taken away at short notice; such groups are asked first.
    """

    name: str
    resources: dict[str, int]
    most: int
    spot: bool = False


class LocalCluster:
    """Starts a head at once; nodes are added one by one, or come on demand where `groups` are given.

    Args:
        head_cpus: CPUs that the head offers for work.
        variables: environment variables of every Ray process, on top of this process's own.
        groups: what the autoscaler may start; without, it has nothing to do.
        idle_s: how long a node that came on demand has nothing to do before it goes.
        metadata: the address of what answers as the metadata service of spot nodes, each below its own id.

    Raises:
        LuthierError: Ray did not come up; the message holds the end of its log.
    """

    def __init__(
        self,
        head_cpus: int = 0,
        variables: dict[str, str] | None = None,
        groups: Sequence[Group] = (),
        idle_s: float = 10.0,
        metadata: str | None = None,
    ) -> None:
        # A short path, because Ray puts Unix sockets (at most 107 characters) under it.
        self.folder = Path(tempfile.mkdtemp(prefix="luthier-"))
        self._variables = variables or {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watcher: subprocess.Popen[bytes] | None = None
        token = self.folder / "token"
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        self._token = token
        gcs, dashboard, client = free_ports(3)
        self.address = f"{HOST}:{gcs}"
        self.dashboard_url = f"http://{HOST}:{dashboard}"
        options = [
            *("--head", f"--port={gcs}", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}"),
            *(f"--ray-client-server-port={client}", f"--num-cpus={head_cpus}"),
        ]
        if groups:
            config = self.folder / "autoscaler.yaml"
            config.write_text(json.dumps(self._autoscaler(groups, head_cpus, idle_s, metadata)))  # JSON is YAML
            options.append(f"--autoscaling-config={config}")
        try:
            self._start(options, _AUTOSCALES if groups else {})
            self._wait_for_dashboard()
            if any(group.spot for group in groups):
                self._watch_market(config)
        except BaseException:
            self.stop()
            raise

    def environment(self) -> dict[str, str]:
        """Variables for a process that submits to this cluster or joins it."""
        ours = {
            env.RAY_AUTH_MODE: "token",
            env.RAY_AUTH_TOKEN_PATH: str(self._token),
            env.RAY_ADDRESS: self.dashboard_url,
            "RAY_USAGE_STATS_ENABLED": "0",
            # The entry point of a job is a shell command: `python` must be this interpreter.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        inherited = {name: value for name, value in os.environ.items() if name != env.RAY_AUTH_TOKEN}  # it would win
        return {**inherited, **self._variables, **ours}

    def add_node(self, cpus: int) -> subprocess.Popen[bytes]:
        """Start another Ray node, and wait until the cluster counts it. Killing the process kills the node."""
        before = self.alive()
        node = self._start([f"--address={self.address}", f"--num-cpus={cpus}"])
        self._wait(lambda: bool(self.alive() - before), node, "the node did not join")
        return node

    def alive(self) -> set[str]:
        """Ray's ids of the nodes that live."""
        answer = self._get("/nodes?view=summary")
        raylets = [node["raylet"] for node in answer.json()["data"]["summary"]] if answer else []
        return {raylet["nodeId"] for raylet in raylets if raylet.get("state") == "ALIVE"}

    def worker_pids(self, name: str) -> list[int]:
        """Process ids of this cluster's `ray::NAME` processes, by what they inherited: faults are made with them."""
        return processes.ray_processes(str(self._token), name)

    def nodes(self) -> dict[str, list[str]]:
        """The ids of the nodes that came on demand and live, by group."""
        found: dict[str, list[str]] = {}
        for file in sorted((self.folder / "nodes").glob("*/node.json")):
            record = json.loads(file.read_text())
            if processes.born(record["pid"]) == record["born"]:
                found.setdefault(record["group"], []).append(file.parent.name)
        return found

    def sell_out(self, *groups: str) -> None:
        """From now on this cloud has no capacity for these groups, and has it again for all others."""
        (self.folder / processes.SOLD_OUT).write_text("\n".join(groups))

    def autoscaler_errors(self) -> str:
        """What Ray's autoscaler has written as an error: when it is dead, nothing else shows it."""
        return "".join(file.read_text() for file in self.folder.glob("0/session_*/logs/monitor.err"))

    def stop(self) -> None:
        """End every process of this cluster, and remove its folder."""
        started = [*self._processes, *([self._watcher] if self._watcher else [])]
        for process in reversed(started):
            process.terminate()
        deadline = time.monotonic() + processes.STOP_TIMEOUT_S
        for process in started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        processes.kill_all(str(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, options: Sequence[str], more: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
        variables = {**self.environment(), **(more or {})}
        del variables[env.RAY_ADDRESS]
        process = processes.start_ray(self.folder / str(len(self._processes)), options, variables)
        self._processes.append(process)
        return process

    def _watch_market(self, config: Path) -> None:
        command = [sys.executable, "-m", "cluster.market", f"--config={config}", f"--gcs={self.address}"]
        with (self.folder / "market.log").open("wb") as log:
            self._watcher = subprocess.Popen(
                command, env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=processes.ROOT
            )

    def _autoscaler(
        self, groups: Sequence[Group], head_cpus: int, idle_s: float, metadata: str | None
    ) -> dict[str, Any]:
        """The cluster file of Ray's autoscaler. Whatever it may hold must be there: Ray looks without asking."""
        kinds = {
            group.name: {
                "node_config": {"spot": group.spot},
                "resources": group.resources,
                "labels": {MARKET: "spot" if group.spot else "on-demand"},
                "min_workers": 0,
                "max_workers": group.most,
                "priority": 1 if group.spot else 0,
            }
            for group in groups
        }
        return {
            "cluster_name": self.folder.name,
            "max_workers": sum(group.most for group in groups),
            "upscaling_speed": 100.0,
            "idle_timeout_minutes": idle_s / 60,
            "provider": {
                "type": "external",
                "module": "cluster.provider.LocalNodes",
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "folder": str(self.folder),
                "gcs_address": self.address,
                **({"metadata": metadata} if metadata else {}),
            },
            "head_node_type": HEAD_GROUP,
            "available_node_types": {
                HEAD_GROUP: {"node_config": {}, "resources": {"CPU": head_cpus}, "max_workers": 0},
                **kinds,
            },
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in _COMMANDS},
        }

    def _wait_for_dashboard(self) -> None:
        # The job API answers late, so whoever sees it answer can submit; and the head is not counted from the start.
        head = self._processes[0]
        self._wait(lambda: self._get("/api/jobs/") is not None, head, "the head did not come up")
        self._wait(lambda: bool(self.alive()), head, "the head did not join itself")

    def _get(self, path: str) -> httpx.Response | None:
        headers = {"Authorization": f"Bearer {self._token.read_text()}"}
        try:
            answer = httpx.get(f"{self.dashboard_url}{path}", headers=headers, timeout=10)
        except httpx.TransportError:
            return None
        return answer if answer.is_success else None

    def _wait(self, ready: Callable[[], bool], process: subprocess.Popen[bytes], failure: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                number = self._processes.index(process)
                tail = (self.folder / f"{number}.log").read_text(errors="replace")[-2000:]
                raise LuthierError(f"Ray: {failure} (exit {process.poll()}):\n{tail}")
            time.sleep(POLL_S)


_AUTOSCALES = {
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": "head",
    "RAY_NODE_TYPE_NAME": HEAD_GROUP,
    "PYTHONPATH": os.pathsep.join([str(processes.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
"""For Ray's monitor, on the head."""

_COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
)
