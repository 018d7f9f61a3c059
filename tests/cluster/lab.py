"""A laptop and two machines with sshd, as namespaces of this machine: `ray up` for real, on all of it.

    unshare --net --pid --mount --mount-proc --fork --kill-child python -m tests.cluster.lab FOLDER

Each machine has its own network address, processes, /tmp/ray, shared memory and home; the packages are shared. What is
seen is printed as one JSON object on the last line; test_launch_ssh.py says what it has to be.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAPTOP, HEAD, WORKER = "10.77.0.1", "10.77.0.10", "10.77.0.11"
PORT = 8265
PATIENCE_S = 120.0

MACHINE = r"""
set -e
folder=$1
until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
ip link set lo up
ip address add $2/24 dev eth0
ip link set eth0 up
ip route add default via 10.77.0.1 # to nowhere; Ray takes its own address from it
mkdir -p $folder/root/.ssh $folder/ray
cp $folder/../key.pub $folder/root/.ssh/authorized_keys
chmod -R go-rwx $folder/root
sed "s#^root:\([^:]*:[^:]*:[^:]*:[^:]*\):[^:]*:#root:\1:$folder/root:#" /etc/passwd > $folder/passwd
mount --bind $folder/passwd /etc/passwd # Python itself may lie in the real home
mkdir -p /tmp/ray
mount --bind $folder/ray /tmp/ray
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f $folder/../sshd_config 2>$folder/sshd.log
"""

SSHD = """
HostKey {folder}/host_key
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
"""

CLUSTER = """\
name: lab
memory_gb_per_worker: 1
provider:
  kind: ssh
  head: {head}
  workers: [{worker}]
  venv: {venv}
  environment_file: {folder}/store.env
  labels: {{rack: a1}}
  access: {{user: root, private_key: {folder}/key, via: direct}}
"""

JOB = """\
import json, os, ray

@ray.remote(label_selector={"ray.io/market-type": "on-demand", "rack": "a1"})
def work():
    return ray.util.get_node_ip_address(), os.environ.get("LAB_CANARY")

ray.init()
where, canary = ray.get(work.remote())
print("RESULT", json.dumps({"driver": ray.util.get_node_ip_address(), "task": where, "canary": canary}))
"""


class Machine:
    """A machine that runs sshd."""

    def __init__(self, folder: Path, name: str, address: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        outer = ["unshare", "--uts", "--pid", "--net", "--mount", "--mount-proc", "--fork", "--kill-child"]
        self.process = subprocess.Popen([*outer, "bash", "-c", MACHINE, "bash", str(self.folder), address])
        wait_for("a machine", lambda: self._inner() is not None)
        link = f"veth-{name}"
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(self._inner()))
        ip("link", "set", link, "master", "br0", "up")
        wait_for("sshd", lambda: reaches(address, 22))

    def _inner(self) -> int | None:
        """The machine's first process, as it is numbered here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def runs(self, program: str) -> bool:
        """Whether a program of that name runs on it."""
        return any(text.split("\0")[0].endswith(f"/{program}") for text in self.processes())

    def processes(self) -> list[str]:
        """Command lines and environments of all that runs on it."""
        inside = f"/proc/{self._inner()}/root/proc"
        texts = []
        for entry in Path(inside).iterdir():
            if entry.name.isdigit():
                try:
                    told = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
                    texts.append(told.decode(errors="replace"))
                except OSError:
                    continue  # it has ended
        return texts


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def reaches(address: str, port: int) -> bool:
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


def luthier(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, cwd=Path.home(), capture_output=True, text=True, timeout=PATIENCE_S)


def prepare(folder: Path) -> Path:
    """The laptop: its network, its home, its keys, and the cluster's file."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "br0", "type", "bridge")
    ip("address", "add", f"{LAPTOP}/24", "dev", "br0")
    ip("link", "set", "br0", "up")
    home = folder / "home"
    (folder / "ray").mkdir()
    home.mkdir()
    os.environ |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    Path("/tmp/ray").mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(folder / "ray"), "/tmp/ray"], check=True)
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    environment = folder / "store.env"
    environment.write_text(f"LAB_CANARY=canary-{secrets.token_hex(4)}\n")
    environment.chmod(0o600)
    file = folder / "lab.yaml"
    file.write_text(CLUSTER.format(head=HEAD, worker=WORKER, venv=sys.prefix, folder=folder))
    return file


def main(folder: Path) -> dict[str, Any]:
    """Up, look, submit, down; each step's findings, and under `failed` what did not come about."""
    file = str(prepare(folder))
    machines = (Machine(folder, "head", HEAD), Machine(folder, "worker", WORKER))
    seen: dict[str, Any] = {"failed": []}
    steps: list[Callable[[], dict[str, Any]]] = [
        lambda: {"up": told(luthier("up", file, "--yes"))},
        lambda: wait_for("a Ray node on the worker", lambda: machines[1].runs("raylet")),
        lambda: look(folder, machines),
        lambda: jobs(file, folder),
        lambda: {"status": told(luthier("status", file))},
        lambda: {"down": told(luthier("down", file, "--yes"))},
        lambda: wait_for("the end of Ray", lambda: not any(machine.runs("raylet") for machine in machines)),
    ]
    for step in steps:
        try:
            seen |= step()
        except (TimeoutError, OSError, subprocess.SubprocessError) as error:
            seen["failed"].append(repr(error))
    logs = folder / "head" / "ray" / "session_latest" / "logs"
    for name in ("monitor.log", "monitor.err"):
        file_there = folder / "head" / "ray" / Path(os.readlink(logs.parent)).name / "logs" / name
        seen[name] = file_there.read_text()[-3000:] if file_there.exists() else ""
    return seen


def told(done: subprocess.CompletedProcess[str]) -> list[Any]:
    """Exit code and the end of what was printed."""
    return [done.returncode, done.stdout[-3000:] + done.stderr[-3000:]]


def look(folder: Path, machines: tuple[Machine, ...]) -> dict[str, Any]:
    """Where the token is, and what the laptop can reach."""
    token = (folder / "home/.luthier/clusters/lab/token").read_text()
    kept = [machine.folder / "root/luthier-cluster" / name for machine in machines for name in ("token", "environment")]
    return {
        "modes": [oct(path.stat().st_mode & 0o777) for path in kept],
        "tokens_differ": any(path.read_text() != token for path in kept if path.name == "token"),
        "token_in_processes": any(token in text for machine in machines for text in machine.processes()),
        "open_to_the_laptop": [port for port in (PORT, 8076, 6379) if reaches(HEAD, port)],
    }


def jobs(file: str, folder: Path) -> dict[str, Any]:
    """Submit through the tunnel, with the token and without."""
    (folder / "job.py").write_text(JOB)
    tunnel = subprocess.Popen(
        [sys.executable, "-m", "cluster", "dashboard", file],
        cwd=Path.home(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for("the tunnel", lambda: reaches("127.0.0.1", PORT))
        ray = str(Path(sys.executable).with_name("ray"))
        options = ["--address", f"http://127.0.0.1:{PORT}", "--entrypoint-num-cpus", "1"]
        command = [ray, "job", "submit", *options, "--", sys.executable, str(folder / "job.py")]
        path = str(folder / "home/.luthier/clusters/lab/token")
        runs = {
            "job": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path},
            "refused": {"RAY_AUTH_MODE": "disabled"},
        }
        done = {
            name: subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=PATIENCE_S)
            for name, env in runs.items()
        }
        return {name: told(run) for name, run in done.items()}
    finally:
        os.killpg(tunnel.pid, signal.SIGINT)
        tunnel.wait(30)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
