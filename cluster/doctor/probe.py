"""A node's facts, read on the node. Standard library and Ray; what cannot be read is said, and ends nothing."""

import fcntl
import os
import platform
import resource
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from cluster import env
from cluster.doctor import devices, sockets
from cluster.doctor.report import Disk, Interface, RdmaPort, Report, TokenFile

PACKAGES = (
    *("luthier", "ray", "torch", "deepspeed", "transformers", "tokenizers", "peft", "safetensors", "pyarrow", "numpy"),
    *("boto3", "pydantic", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"),
)
"""Whose versions are compared; CUDA's only with the driver."""

VARIABLES = (
    *(env.RAY_AUTH_MODE, env.RAY_AUTH_TOKEN_PATH, env.LUTHIER_CACHE, env.LUTHIER_IMAGE),
    *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE"),
)
"""What is reported of Ray's environment. None of them is a secret."""

_SMI_TIMEOUT_S = 30.0
_SIOCGIFADDR = 0x8915
_INFINIBAND = Path("/sys/class/infiniband")

Read = TypeVar("Read")


def report(session: str, gcs: str, is_head: bool) -> Report:
    """All that this node says of itself.

    Args:
        session: the folder of Ray's session on this node.
        gcs: the GCS' address.
    """
    failed: list[str] = []
    raylet = int(os.environ.get("RAY_RAYLET_PID") or os.getppid())
    variables = _environment(raylet)

    def read(what: str, how: Callable[[], Read], otherwise: Read) -> Read:
        try:
            return how()
        except (OSError, ValueError, KeyError, IndexError, ImportError, subprocess.SubprocessError) as error:
            failed.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    memory, free = read("memory", _memory, (0, 0))
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Report(
        machine=read("machine", machine, ""),
        user=os.geteuid(),
        capabilities=read("capabilities", _capabilities, 0),
        variables={name: variables[name] for name in VARIABLES if name in variables},
        has_token_variable=env.RAY_AUTH_TOKEN in variables,
        token_file=token_file(variables.get(env.RAY_AUTH_TOKEN_PATH)),
        usage_stats=read("usage statistics", _usage_stats, False),
        python=platform.python_version(),
        packages=read("packages", _packages, {}),
        sockets=read("ports", lambda: sockets.of_ray(raylet, session, gcs, is_head), ()),
        disks=read("disk", lambda: _disks(session, variables), ()),
        shared_memory=read("shared memory", lambda: _total("/dev/shm"), 0),  # noqa: S108 - Ray's, not a file of ours
        memory=memory,
        memory_free=free,
        nvidia_smi=read("nvidia-smi", _nvidia_smi, None),
        interfaces=read("interfaces", _interfaces, ()),
        rdma=read("RDMA", _rdma, ()),
        has_verbs=Path("/dev/infiniband").is_dir(),
        locked_memory=None if soft == resource.RLIM_INFINITY else soft,
        failed=tuple(failed),
    )


def machine() -> str:
    """The same for everything that runs on one kernel, until it is started anew."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def token_file(named: str | None) -> TokenFile:
    """The file that Ray reads its token from."""
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        found = path.stat()
    except OSError:
        return TokenFile(str(path))
    return TokenFile(str(path), stat.S_IMODE(found.st_mode), found.st_uid)


def _environment(raylet: int) -> Mapping[str, str]:
    """What Ray was started with on this node; this process's own may have more, from a job."""
    try:
        text = Path(f"/proc/{raylet}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return os.environ
    return dict(entry.partition("=")[::2] for entry in text.split("\0") if "=" in entry)


def _capabilities() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("CapEff:")).split()[1], 16)


def _usage_stats() -> bool:
    from ray._common.usage import usage_lib

    return bool(usage_lib.usage_stats_enabled())


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _disks(session: str, variables: Mapping[str, str]) -> tuple[Disk, ...]:
    cache = variables.get(env.LUTHIER_CACHE) or "~/.cache/luthier"
    return tuple(
        _disk(what, Path(path).expanduser()) for what, path in (("Ray's temporary folder", session), ("cache", cache))
    )


def _disk(what: str, path: Path) -> Disk:
    there = next(each for each in (path, *path.parents) if each.exists())
    found = os.statvfs(there)
    return Disk(what, str(path), found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail)


def _total(folder: str) -> int:
    found = os.statvfs(folder)
    return found.f_frsize * found.f_blocks


def _memory() -> tuple[int, int]:
    """All memory and what is available of it: of the machine, or of the container where that has less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    meminfo = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    total, free = meminfo["MemTotal"], meminfo["MemAvailable"]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit, or another kind of group
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        if limit < total:
            return limit, max(0, limit - used)
    return total, free


def _nvidia_smi() -> str | None:
    try:
        done = subprocess.run(devices.COMMAND, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S)
    except FileNotFoundError:
        return None
    return done.stdout or done.stderr


def _interfaces() -> tuple[Interface, ...]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            folder = Path("/sys/class/net") / name
            is_up = bool(int((folder / "flags").read_text(), 16) & 1)
            address = ""
            with suppress(OSError):  # it has none
                request = struct.pack("256s", name[:15].encode())
                address = socket.inet_ntoa(fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[20:24])
            found.append(Interface(name, int((folder / "mtu").read_text()), is_up, address))
    return tuple(found)


def _rdma() -> tuple[RdmaPort, ...]:
    ports = sorted(_INFINIBAND.glob("*/ports/*")) if _INFINIBAND.is_dir() else []
    return tuple(
        RdmaPort(
            device=port.parent.parent.name,
            state=(port / "state").read_text().partition(": ")[2].strip(),
            rate=(port / "rate").read_text().strip(),
        )
        for port in ports
    )
