"""Machines, as namespaces of this one: each with its own address, host name, processes, /tmp/ray, shared memory, home.

A test has `isolated(…)` run a module's `main` where it may make networks, and gets what that printed last. In there:

    bridge("br0", "10.77.0.1")
    machine = Machine(folder, "head", "10.77.0.10", gateway="10.77.0.1")
    machine.run(["ray", "status"], env)

What is installed is shared, and so are files, but for what `hidden` names. All ends with the process that `isolated`
starts. Only root can make namespaces.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE_S = 240.0

_ISOLATE = ["unshare", "--net", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
_FIRST = ["bash", "-c", '"$@"; exit $?', "bash"]  # the first process must reap, so it may not be the command itself

_SETUP = r"""
set -e
folder=$1 address=$2 gateway=$3
hostname "${folder##*/}"
# As Debian writes it: the name's own address is no address at which others find this machine.
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "${folder##*/}" > $folder/hosts
mount --bind $folder/hosts /etc/hosts
until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
ip link set lo up
ip address add $address/24 dev eth0
ip link set eth0 up
ip route add default via $gateway # Ray takes its own address from it
mkdir -p $folder/root $folder/ray /tmp/ray
mount --bind $folder/ray /tmp/ray
mount -t tmpfs tmpfs /dev/shm
"""


def isolated(module: str, folder: Path, *tools: str, timeout_s: float) -> tuple[dict[str, Any], str]:
    """Run `python -m MODULE FOLDER` in a network of its own. Gives its last line, which is JSON, and its complaints.

    Skips the test where that cannot be done.

    Args:
        tools: programs that must be installed besides.
    """
    missing = [tool for tool in ("ip", "unshare", "nsenter", *tools) if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")
    if subprocess.run([*_ISOLATE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here; it needs root")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    done = subprocess.run(
        [*_ISOLATE, *_FIRST, sys.executable, "-m", module, str(folder)],
        cwd=ROOT,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen, done.stderr


def bridge(name: str, address: str) -> None:
    """A network, and this process's address in it."""
    ip("link", "set", "lo", "up")
    ip("link", "add", name, "type", "bridge")
    ip("address", "add", f"{address}/24", "dev", name)
    ip("link", "set", name, "up")


class Machine:
    """One machine, up when it is made.

    Args:
        folder: its files are below, under its name: `root` is its home, `ray` its /tmp/ray.
        bridge: the network that it is in.
        setup: more that it does first, in bash, with $folder.
        hidden: folders of this machine that it does not see.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        address: str,
        *,
        gateway: str,
        bridge: str = "br0",
        setup: str = "",
        hidden: Sequence[Path] = (),
    ) -> None:
        self.address = address
        self.folder = folder / name
        self.folder.mkdir()
        hides = "".join(f"mount -t tmpfs tmpfs {each}\n" for each in hidden)
        script = f"{_SETUP}{hides}{setup}\ntouch $folder/up\nsleep infinity & wait\n"
        outer = ["unshare", "--uts", "--pid", "--net", "--mount", "--mount-proc", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            [*outer, "bash", "-c", script, "bash", str(self.folder), address, gateway],
            stdout=sys.stderr,  # the last line of stdout is for the findings
        )
        wait_for(f"machine {name}", lambda: self._inner() is not None)
        link = f"veth-{name}"
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(self._inner()))
        ip("link", "set", link, "master", bridge, "up")
        wait_for(f"machine {name}", (self.folder / "up").exists)

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        folder: Path | None = None,
        output: IO[str] | int = subprocess.PIPE,
    ) -> "subprocess.Popen[str]":
        """A process on it, in its home or in a folder. Its variables are these alone, and HOME and PATH.

        Args:
            output: where stdout and stderr go; by default a pipe each.
        """
        enter = ["nsenter", f"--target={self._inner()}", "--mount", "--uts", "--net", "--pid"]
        home = self.folder / "root"
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.Popen(
            [*enter, "env", "--chdir", str(folder or home), *command],
            env={"HOME": str(home), "PATH": path, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
        )

    def run(
        self, command: Sequence[str], env: Mapping[str, str], folder: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """A process on it, to its end."""
        process = self.start(command, env, folder)
        out, err = process.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def runs(self, program: str) -> bool:
        """Whether a program of that name runs on it."""
        return any(text.split("\0")[0].endswith(f"/{program}") for text in self.processes())

    def processes(self) -> list[str]:
        """Command lines and environments of all that runs on it."""
        texts = []
        for entry in Path(f"/proc/{self._inner()}/root/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended
                    told = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
                    texts.append(told.decode(errors="replace"))
        return texts

    def _inner(self) -> int | None:
        """The machine's first process, as it is numbered here."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else None


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def reaches(address: str, port: int) -> bool:
    """Whether something listens there, for this process."""
    try:
        socket.create_connection((address, port), 1.0).close()
    except OSError:
        return False
    return True


def wait_for(what: str, there: Callable[[], bool]) -> dict[str, Any]:
    """Nothing, once it is there. Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.3)
    return {}


def told(done: "subprocess.CompletedProcess[str]") -> list[Any]:
    """Exit code and the end of what was printed."""
    return [done.returncode, done.stdout[-3000:] + done.stderr[-3000:]]
