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
PATIENCE_S = 150.0

MACHINE = r"""
set -e
folder=$1
until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
ip link set lo up
ip address add $2/24 dev eth0
ip link set eth0 up
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
  ssh: {{user: root, private_key: {folder}/key, via: direct}}
"""

JOB = """
import os, socket, ray
ray.init()
@ray.remote(label_selector={"ray.io/market-type": "on-demand", "rack": "a1"})
def work():
    context = ray.get_runtime_context()
    return context.get_node_labels(), os.environ.get("LAB_CANARY")
labels, canary = ray.get(work.remote())
print("RESULT", canary, labels["rack"], ray.cluster_resources().get("node:HEAD"))
"""


class Machine:
    """A machine that runs sshd."""

    def __init__(self, folder: Path, name: str, address: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        outer = ["unshare", "--uts", "--pid", "--net", "--mount", "--mount-proc", "--fork", "--kill-child"]
        script = f"{MACHINE}"
        self.process = subprocess.Popen([*outer, "bash", "-c", script, "bash", str(self.folder), address])
        wait_for("a machine", lambda: self._inner() is not None)
        link = f"veth-{name}"
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(self._inner()))
        ip("link", "set", link, "master", "br0", "up")
        wait_for("sshd", lambda: reaches(address, 22))

    def _inner(self) -> int | None:
        """The machine's first process, as it is numbered here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def processes(self) -> list[str]:
        """Command lines and environments of all that runs on it."""
        inside = f"/proc/{self._inner()}/root/proc"
        texts = []
        for entry in Path(inside).iterdir():
            if entry.name.isdigit():
                try:
                    texts.append(((entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()).decode())
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


def wait_for(what: str, there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.3)


def luthier(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )


def prepare(folder: Path) -> Path:
    """The laptop: its network, its home, its keys, and the cluster's file."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "br0", "type", "bridge")
    ip("address", "add", f"{LAPTOP}/24", "dev", "br0")
    ip("link", "set", "br0", "up")
    home = folder / "home"
    (folder / "ray").mkdir()
    home.mkdir()
    os.environ["HOME"] = str(home)
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
    file = str(prepare(folder))
    head, worker = Machine(folder, "head", HEAD), Machine(folder, "worker", WORKER)
    seen: dict[str, Any] = {}
    up = luthier("up", file, "--yes")
    seen["up"] = [up.returncode, up.stdout[-3000:] + up.stderr[-2000:]]
    if up.returncode:
        return seen
    wait_for("the worker", lambda: "1 lab" in luthier("status", file).stdout or both_active(file))
    seen["status"] = luthier("status", file).stdout[-2000:]
    token = (folder / "home/.luthier/clusters/lab/token").read_text()
    seen["modes"] = [
        oct((machine.folder / "root/luthier-cluster" / name).stat().st_mode & 0o777)
        for machine in (head, worker)
        for name in (".", "token", "environment")
    ]
    seen["same_token"] = (worker.folder / "root/luthier-cluster/token").read_text() == token
    seen["token_in_processes"] = any(token in text for machine in (head, worker) for text in machine.processes())
    seen["dashboard_open"] = reaches(HEAD, PORT)
    seen.update(jobs(file, folder, token))
    down = luthier("down", file, "--yes")
    seen["down"] = [down.returncode, down.stdout[-1500:] + down.stderr[-1500:]]
    seen["left"] = sum("raylet" in text.split("\0")[0] for machine in (head, worker) for text in machine.processes())
    return seen


def both_active(file: str) -> bool:
    return luthier("status", file).stdout.count("local.cluster.node") >= 2


def jobs(file: str, folder: Path, token: str) -> dict[str, Any]:
    """Submit through the tunnel, with the token and without."""
    ray = str(Path(sys.executable).with_name("ray"))
    tunnel = subprocess.Popen([sys.executable, "-m", "cluster", "dashboard", file], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for("the tunnel", lambda: reaches("127.0.0.1", PORT))
        url = f"http://127.0.0.1:{PORT}"
        command = [ray, "job", "submit", "--address", url, "--entrypoint-num-cpus", "1", "--"]
        script = [sys.executable, "-c", JOB.replace("HEAD", HEAD)]
        path = str(folder / "home/.luthier/clusters/lab/token")
        with_token = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path}
        without = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        done = subprocess.run([*command, *script], env=with_token, capture_output=True, text=True, timeout=PATIENCE_S)
        refused = subprocess.run([*command, *script], env=without, capture_output=True, text=True, timeout=PATIENCE_S)
    finally:
        tunnel.send_signal(signal.SIGINT)
        tunnel.wait(30)
    return {
        "job": [done.returncode, done.stdout[-1500:] + done.stderr[-1500:]],
        "refused": [refused.returncode, refused.stderr[-600:]],
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
