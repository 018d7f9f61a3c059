"""`python -m tests.e2e.addresses FOLDER`: a job from a laptop that a firewall lets reach one port of the cluster.

    laptop 10.88.0.2 ── firewall ── head 10.77.0.10, workers 10.77.0.11 and 10.77.0.12, S3 server 10.77.0.1

The machines are those of tests/machines.py; the firewall is this process's own routing. What the job reads lies in the
laptop's working folder, which no other machine sees. What is seen is printed as one JSON object on the last line;
test_addresses.py says what it has to be.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from cluster import registry
from cluster.store import open_store
from jobs import runs
from scripts.demo import tasks
from scripts.demo.model import make_model
from tests.e2e.submit import write_recipe, write_rows
from tests.machines import ROOT, Machine, bridge, ip, told, wait_for
from tests.servers import S3Server, ministack

STORE, HEAD, WORKERS = "10.77.0.1", "10.77.0.10", ("10.77.0.11", "10.77.0.12")
FIREWALL, LAPTOP = "10.88.0.1", "10.88.0.2"
GCS, DASHBOARD = 6379, 8265
URL = f"http://{HEAD}:{DASHBOARD}"

PROBE = """\
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def is_open(place):
    try:
        socket.create_connection(place, 2.0).close()
    except OSError:
        return False
    return True

places = [tuple(each) for each in json.loads(sys.argv[1])]
with ThreadPoolExecutor(64) as pool:
    print(json.dumps([place for place, found in zip(places, pool.map(is_open, places)) if found]))
"""


def firewall() -> None:
    """From the laptop to the dashboard, the answers back, and nothing else; not to what this process serves either."""
    for order, rule in {
        10: f"iif br1 ipproto tcp to {HEAD} dport {DASHBOARD} lookup main",
        11: f"iif br1 to {FIREWALL} lookup local",  # or it would not tell the laptop its hardware address
        12: "iif br1 prohibit",
        20: f"iif br0 ipproto tcp from {HEAD} sport {DASHBOARD} to {LAPTOP} lookup main",
        21: f"iif br0 to {LAPTOP} prohibit",
        30: "lookup local",  # it comes before all others otherwise
    }.items():
        ip("rule", "add", "pref", str(order), *rule.split())
    ip("rule", "del", "pref", "0")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


class Cluster:
    """A head that computes nothing and two workers, started as one starts Ray on machines of one's own."""

    def __init__(self, folder: Path, s3: S3Server, hidden: Path) -> None:
        self.token = secrets.token_hex(32)
        self.env = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", **s3.env}
        addresses = {"head": HEAD, **{f"worker-{number}": each for number, each in enumerate(WORKERS)}}
        self.machines = [
            Machine(folder, name, address, gateway=STORE, hidden=[hidden]) for name, address in addresses.items()
        ]
        head, *workers = self.machines
        options = ["--head", f"--port={GCS}", f"--dashboard-host={HEAD}", f"--dashboard-port={DASHBOARD}"]
        self._start(head, *options, "--num-cpus=0")
        wait_for("the dashboard", lambda: bool(self.addresses()))
        for each in workers:
            self._start(each, f"--address={HEAD}:{GCS}", "--num-cpus=3")
        wait_for("the workers", lambda: len(self.addresses()) == len(self.machines))

    def addresses(self) -> list[str]:
        """Of Ray's nodes."""
        told = self.asked("/nodes?view=summary")
        nodes = told["data"]["summary"] if told else []
        return sorted(node["raylet"]["nodeManagerAddress"] for node in nodes if node["raylet"].get("state") == "ALIVE")

    def driver(self) -> str:
        """The address of the node that the job's driver ran on."""
        (job,) = self.asked("/api/jobs/")
        return str(httpx.URL(job["driver_agent_http_address"]).host)

    def asked(self, path: str) -> Any:
        """What the dashboard says, asked from within the cluster's network; None before it is there."""
        try:
            answer = httpx.get(f"{URL}{path}", headers={"Authorization": f"Bearer {self.token}"}, timeout=10)
        except httpx.TransportError:
            return None
        return answer.json() if answer.is_success else None

    def listening(self) -> list[tuple[str, int]]:
        """Every port that something listens on, on every machine, but for those on loopback."""
        found = set()
        for machine in self.machines:
            for line in machine.run(["ss", "-ltnH"], {}).stdout.splitlines():
                address, _, port = line.split()[3].rpartition(":")
                if not address.startswith(("127.", "[::1]")):
                    found.add((machine.address, int(port)))
        return sorted(found)

    def _start(self, machine: Machine, *options: str) -> None:
        token = machine.folder / "root/.ray/auth_token"  # where Ray looks by itself
        token.parent.mkdir()
        token.touch(0o600)
        token.write_text(self.token)
        with (machine.folder / "ray.log").open("w") as log:
            machine.start(["ray", "start", "--block", "--disable-usage-stats", *options], self.env, output=log)


def work_folder(folder: Path, s3: S3Server) -> Path:
    """The laptop's: the packages, a recipe, and all that it reads."""
    work = folder / "work"
    work.mkdir()
    for name in ("cluster", "jobs", "configs"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    make_model(work / "model", hidden_size=64, layers=2)
    write_rows(work / "orders.jsonl", list(tasks.rows("orders-json", "train"))[:300])
    write_recipe(work, "./model", ["orders.jsonl"], name="addresses", store=f"s3://{s3.bucket}/addresses")
    return work


def open_to(machine: Machine, places: Iterable[tuple[str, int]]) -> list[list[Any]]:
    """Which of these a machine can connect to."""
    done = machine.run([sys.executable, "-c", PROBE, json.dumps(list(places))], {})
    found: list[list[Any]] = json.loads(done.stdout)
    return found


def submits(laptop: Machine, work: Path, token: str) -> dict[str, Any]:
    """Without a token, with a wrong one, and with the cluster's."""
    # Two CPUs for each rank and one for the driver, on nodes of three: whichever has the driver, each has one rank.
    settings = ["train.workers=2", "cluster.cpus_per_worker=2", "cluster.driver_cpus=1"]
    command = [sys.executable, "-m", "jobs", "submit", "addresses.yaml", *settings, "--address", URL]

    def run(given: str | None) -> "subprocess.CompletedProcess[str]":
        file = laptop.folder / "root/token"
        file.write_text(given or "")
        env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)} if given else {}
        return laptop.run(command, env, work)

    seen: dict[str, Any] = {"no token": told(run(None)), "wrong token": told(run("f" * 64))}
    began = time.monotonic()
    done = run(token)
    lines = done.stdout.splitlines()
    return seen | {
        "trained": told(done),
        "seconds": round(time.monotonic() - began, 1),
        "last": json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None,
        "ranks": dict(re.findall(r"\(ip=([\d.]+), pid=\d+\) world_rank=(\d+)", done.stdout + done.stderr)),
    }


def main(folder: Path) -> dict[str, Any]:
    """All of it; what was seen."""
    bridge("br0", STORE)
    bridge("br1", FIREWALL)
    firewall()
    with ministack(host=STORE) as s3:
        work = work_folder(folder, s3)
        began = time.monotonic()
        cluster = Cluster(folder, s3, hidden=work)
        up_s = round(time.monotonic() - began, 1)
        laptop = Machine(folder, "laptop", LAPTOP, gateway=FIREWALL, bridge="br1")
        places = [*cluster.listening(), (STORE, s3.port)]
        seen: dict[str, Any] = {
            "up_s": up_s,
            "addresses": cluster.addresses(),
            "listening": places,
            "open to a worker": open_to(cluster.machines[1], places),
            "open to the laptop": open_to(laptop, places),
            "seen of the laptop": [os.listdir(work), cluster.machines[1].run(["ls", str(work)], {}).stdout],
            **submits(laptop, work, cluster.token),
            "driver": cluster.driver(),
        }
        os.environ |= s3.env
        store = open_store(f"s3://{s3.bucket}/addresses")
        for run_id in runs.run_ids(store):
            seen["events"] = [event.text for event in runs.read_events(store, run_id)]
            seen["world sizes"] = [step["world_size"] for step in runs.read_steps(store, run_id)]
            seen["adapter"] = registry.resolve(store, "addresses").run_id == run_id
    return seen


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
