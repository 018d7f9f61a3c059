"""A laptop and two machines with sshd, as namespaces of this machine: `ray up` for real, on all of it.

The machines are those of tests/machines.py. What is seen is printed as one JSON object on the last line;
test_launch_ssh.py says what it has to be.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.machines import PATIENCE_S, ROOT, Machine, bridge, reaches, told, wait_for

LAPTOP, HEAD, WORKER = "10.77.0.1", "10.77.0.10", "10.77.0.11"
PORT = 8265

SETUP = r"""
mkdir -p $folder/root/.ssh
cp $folder/../key.pub $folder/root/.ssh/authorized_keys
chmod -R go-rwx $folder/root
sed "s#^root:\([^:]*:[^:]*:[^:]*:[^:]*\):[^:]*:#root:\1:$folder/root:#" /etc/passwd > $folder/passwd
mount --bind $folder/passwd /etc/passwd # Python itself may lie in the real home
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f $folder/../sshd_config 2>$folder/sshd.log &
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


def machine(folder: Path, name: str, address: str) -> Machine:
    """A machine that runs sshd."""
    made = Machine(folder, name, address, gateway=LAPTOP, setup=SETUP)
    wait_for("sshd", lambda: reaches(address, 22))
    return made


def luthier(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, cwd=Path.home(), capture_output=True, text=True, timeout=PATIENCE_S)


def prepare(folder: Path) -> Path:
    """The laptop: its network, its home, its keys, and the cluster's file."""
    bridge("br0", LAPTOP)
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
    machines = (machine(folder, "head", HEAD), machine(folder, "worker", WORKER))
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
