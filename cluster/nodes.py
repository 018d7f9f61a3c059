"""A Ray cluster of local processes: a head and worker nodes, with token authentication, ended by process id.

    with LocalCluster(head_cpus=2) as cluster:
        cluster.add_node(cpus=1)
        subprocess.run([..., "ray", "job", "submit", …], env=cluster.environment())

Used by the quickstart and the tests. It shares nothing with other Ray clusters of the machine: own ports, own token
file (mode 0600), own temporary folder; and `ray stop`, which would end them all, is never called.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from cluster import env
from cluster.errors import LuthierError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.2
HOST = "127.0.0.1"


class LocalCluster:
    """Starts a head at once; nodes are added one by one.

    Args:
        head_cpus: CPUs that the head offers for work.
        variables: environment variables of every Ray process, on top of this process's own.

    Raises:
        LuthierError: Ray did not come up; the message holds the end of its log.
    """

    def __init__(self, head_cpus: int, variables: dict[str, str] | None = None) -> None:
        # A short path, because Ray puts Unix sockets (at most 107 characters) under it.
        self.folder = Path(tempfile.mkdtemp(prefix="luthier-"))
        self._variables = variables or {}
        self._processes: list[subprocess.Popen[bytes]] = []
        token = self.folder / "token"
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        self._token = token
        gcs, dashboard, client = free_ports(3)
        self.address = f"{HOST}:{gcs}"
        self.dashboard_url = f"http://{HOST}:{dashboard}"
        try:
            self._start(
                f"--head --port={gcs} --dashboard-host={HOST} --dashboard-port={dashboard} "
                f"--ray-client-server-port={client} --num-cpus={head_cpus}"
            )
            self._wait_for_dashboard()
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
        node = self._start(f"--address={self.address} --num-cpus={cpus}")
        self._wait(lambda: bool(self.alive() - before), node, "the node did not join")
        return node

    def alive(self) -> set[str]:
        """Ray's ids of the nodes that live."""
        answer = self._get("/nodes?view=summary")
        raylets = [node["raylet"] for node in answer.json()["data"]["summary"]] if answer else []
        return {raylet["nodeId"] for raylet in raylets if raylet.get("state") == "ALIVE"}

    def worker_pids(self, name: str) -> list[int]:
        """Process ids of this cluster's `ray::NAME` processes, by what they inherited: faults are made with them."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                title, inherited = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if title.startswith(f"ray::{name}".encode()) and str(self._token).encode() in inherited:
                found.append(int(entry.name))
        return sorted(found)

    def stop(self) -> None:
        """End every process of this cluster, and remove its folder."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self._left_over():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, options: str) -> subprocess.Popen[bytes]:
        agent, metrics = free_ports(2)
        # A folder for each node: nodes that share one remove the working directories of one another's running jobs.
        folder = self.folder / str(len(self._processes))
        command = (
            f"{sys.executable} -m ray.scripts.scripts start --block --disable-usage-stats --node-ip-address={HOST} "
            f"--temp-dir={folder} --dashboard-agent-listen-port={agent} --metrics-export-port={metrics} "
            f"{options}"
        )
        variables = self.environment()
        del variables[env.RAY_ADDRESS]
        with (self.folder / f"node-{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                command.split(), env=variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._processes.append(process)
        return process

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
                tail = (self.folder / f"node-{number}.log").read_text(errors="replace")[-2000:]
                raise LuthierError(f"Ray: {failure} (exit {process.poll()}):\n{tail}")
            time.sleep(POLL_S)

    def _left_over(self) -> list[int]:
        """Ray's processes that inherited this cluster's token: a killed head leaves its daemons.

        What submitted to the cluster has the token too, and is left alone.
        """
        left = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                title, inherited = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            is_ray = title.startswith(b"ray::") or str(self.folder).encode() in title
            if is_ray and str(self._token).encode() in inherited and int(entry.name) != os.getpid():
                left.append(int(entry.name))
        return left


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind((HOST, 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()
