"""Ray nodes as processes: starting one, seeing whether it lives, ending it and what it leaves behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

HOST = "127.0.0.1"

ROOT = Path(__file__).parent.parent
"""Where our packages lie: what Ray imports by name must find them."""

SOLD_OUT = "sold-out"
"""A file of a local cluster's folder: the groups, a line each, that its cloud has no capacity for."""

STOP_TIMEOUT_S = 10.0
_POLL_S = 0.1


def start_ray(folder: Path, options: Sequence[str], variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a Ray node that lives as long as the process that is returned. Its log is `folder`.log.

    A folder for each node: nodes that share one remove the working directories of one another's running jobs.
    """
    agent, metrics = free_ports(2)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
        *(f"--node-ip-address={HOST}", f"--temp-dir={folder}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
        *options,
    ]
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            command, env=dict(variables), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )


def shape(resources: Mapping[str, float]) -> list[str]:
    """Options of `ray start` for what a node offers; `resources` by Ray's names, CPU and GPU among them."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    options = [f"--num-cpus={resources.get('CPU', 0):g}", f"--num-gpus={resources.get('GPU', 0):g}"]
    if others:
        options.append(f"--resources={json.dumps(others)}")
    return options


def born(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot, so that another under its number is not taken for it.

    None when it has ended; a child that has, is reaped.
    """
    with suppress(ChildProcessError):  # not ours to wait for
        os.waitpid(pid, os.WNOHANG)
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(rest[18])


def end(pid: int, since: int | None, mark: str) -> None:
    """End a node, kindly at first, and then what is left with its mark: one that was killed leaves its daemons.

    Args:
        since: as `born` said; another process under that number is left alone.
    """
    deadline = time.monotonic() + STOP_TIMEOUT_S
    if since is not None and born(pid) == since:
        os.kill(pid, signal.SIGTERM)
        while born(pid) == since and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if born(pid) == since:
            os.kill(pid, signal.SIGKILL)
    kill_all(mark)


def kill_all(mark: str) -> None:
    """End at once what `ray_processes` finds."""
    for left in ray_processes(mark):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(left, signal.SIGKILL)


def ray_processes(mark: str, name: str = "") -> list[int]:
    """Ids of Ray's processes whose command or environment has `mark` in it: a node's folder, or a cluster's token.

    What submits to a cluster has its token too, and is not one of them.

    Args:
        name: only `ray::NAME…`.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title, inherited = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
        is_worker = title.startswith(f"ray::{name}".encode())
        is_daemon = not name and mark.encode() in title
        if (is_worker or is_daemon) and mark.encode() in title + inherited and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return sorted(found)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
