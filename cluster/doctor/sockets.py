"""Which of Ray's ports listen where, and what each says to somebody without a token. Runs on a node.

Asking is the proof: a setting can be right in one process and wrong in another. Ports of HTTP are asked for a page,
ports of gRPC for something that only tells: the cluster's nodes, a raylet's statistics, the client server's state.
"""

import http.client
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Literal

from cluster.doctor.report import Socket

_LISTENS = "0A"
_TIMEOUT_S = 2.0
_KINDS = {
    "gcs": r"/gcs_server\b",
    "raylet": r"/raylet/raylet\b",
    "dashboard": r"dashboard/dashboard\.py|^ray-dashboard",
    "agent": r"dashboard/agent\.py|^ray::DashboardAgent",
    "environment agent": r"runtime_env/agent/main\.py|^ray::RuntimeEnvAgent",
    "monitor": r"/monitor\.py",
    "client server": r"ray\.util\.client\.server",
}
_TELLS = {
    "gcs": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "raylet": "/ray.rpc.NodeManagerService/GetNodeStats",
    "client server": "/ray.rpc.RayletDriver/ClusterInfo",
}
"""Methods that only tell; an empty message is a request to each."""

Answer = Literal["refuses", "open", "metrics", "unknown"]


def listening(table: str) -> dict[str, tuple[str, int]]:
    """Address and port of what listens, by inode, from the text of /proc/net/tcp or tcp6."""
    found = {}
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTENS:
            host, port = fields[1].split(":")
            found[fields[9]] = (_address(host), int(port, 16))
    return found


def kind(command: str) -> str | None:
    """Which of Ray's own processes has this command line; None for workers and all others."""
    return next((name for name, pattern in _KINDS.items() if re.search(pattern, command)), None)


def of_ray(raylet: int, session: str, gcs: str, is_head: bool) -> tuple[Socket, ...]:
    """What the Ray of this node listens on.

    Args:
        raylet: its process id.
        session: the session's folder, which is in the commands of the other processes of this node.
        gcs: the GCS' address, by which the client server on the head is known.
    """
    listens = {inode: where for file in ("tcp", "tcp6") for inode, where in listening(_read(f"net/{file}")).items()}
    found = set()
    for process, name in _processes(raylet, session, gcs if is_head else None):
        for inode in _inodes(process):
            if inode in listens:
                found.add((name, *listens[inode]))
    return tuple(Socket(name, address, port, ask(name, address, port)) for name, address, port in sorted(found))


def ask(process: str, address: str, port: int) -> Answer:
    """What a port says to somebody without a token."""
    host = "127.0.0.1" if ip_address(address).is_unspecified else address
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/api/jobs/")
        reply = connection.getresponse()
        if reply.status in (401, 403):
            return "refuses"
        return "metrics" if reply.read(6) == b"# HELP" else "open"
    except (http.client.HTTPException, OSError):
        return _ask_grpc(f"{host}:{port}", _TELLS[process]) if process in _TELLS else "unknown"
    finally:
        connection.close()


def _ask_grpc(target: str, method: str) -> Answer:
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(target) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return "refuses" if error.code() is grpc.StatusCode.UNAUTHENTICATED else "unknown"
    return "open"


def _processes(raylet: int, session: str, gcs: str | None) -> Iterator[tuple[int, str]]:
    """Ids and kinds of Ray's own processes of this node."""
    commands, parents = _commands()
    ours = {raylet}
    for process, command in commands.items():
        if (
            f"{session}/" in command
            or f"{session} " in command
            or (gcs and kind(command) == "client server" and gcs in command)
        ):
            ours.add(process)
    for process, command in commands.items():
        name = kind(command)
        if name and (process in ours or parents[process] in ours):
            yield process, name


def _commands() -> tuple[Mapping[int, str], Mapping[int, int]]:
    """Command lines, and parents, of all processes."""
    commands, parents = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended meanwhile
        commands[int(entry.name)], parents[int(entry.name)] = command, parent
    return commands, parents


def _inodes(process: int) -> Iterator[str]:
    try:
        for link in Path(f"/proc/{process}/fd").iterdir():
            target = str(link.readlink())
            if target.startswith("socket:["):
                yield target[8:-1]
    except OSError:
        return  # ended, or another user's


def _address(text: str) -> str:
    """The kernel writes each four bytes as a number in the machine's own order."""
    words = [struct.pack("=I", int(text[start : start + 8], 16)) for start in range(0, len(text), 8)]
    if len(words) == 1:
        return socket.inet_ntop(socket.AF_INET, words[0])
    address = IPv6Address(b"".join(words))
    return str(address.ipv4_mapped or address)


def _read(name: str) -> str:
    path = Path("/proc") / name
    return path.read_text() if path.exists() else ""  # a kernel without IPv6
