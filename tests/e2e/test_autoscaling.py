"""A cluster that is nothing but a head without CPUs, until somebody submits a job: Ray's own autoscaler, real nodes."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.job_submission import JobSubmissionClient

from cluster import ledger, registry, spot
from cluster.launch.spec import MARKET
from cluster.market import FIRST_S
from cluster.nodes import Group, LocalCluster
from cluster.store import open_store
from cluster.submit import ENDED
from jobs import runs
from tests.conftest import TinyModels
from tests.e2e.submit import DEADLINE_S, luthier, train, write_recipe
from tests.servers import S3Server

SPOT, ON_DEMAND = Group("spot", {"CPU": 1}, most=3, spot=True), Group("on-demand", {"CPU": 1}, most=3)


class Metadata:
    """Amazon's metadata service, for each node below its own id."""

    def __init__(self) -> None:
        self.taken: dict[str, datetime] = {}
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self._answer(200 if self.path.endswith("/latest/api/token") else 404, "a-token")

            def do_GET(self) -> None:
                node, _, rest = self.path.strip("/").partition("/")
                if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                    self._answer(401, "")
                elif rest == "latest/meta-data/spot/instance-action" and node in service.taken:
                    self._answer(200, f'{{"action": "terminate", "time": "{service.taken[node]:%Y-%m-%dT%H:%M:%SZ}"}}')
                else:
                    self._answer(404, "")

            def _answer(self, code: int, text: str) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *parts: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def metadata() -> Iterator[Metadata]:
    service = Metadata()
    yield service
    service.close()


@pytest.fixture(scope="module")
def elastic(cache: Path, metadata: Metadata, s3: S3Server) -> Iterator[LocalCluster]:
    """It knows where the store is, and not the credentials."""
    known = {name: value for name, value in s3.env.items() if "KEY" not in name}
    variables = {"LUTHIER_CACHE": str(cache), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", **known}
    with LocalCluster(groups=[SPOT, ON_DEMAND], variables=variables, idle_s=3, metadata=metadata.address) as cluster:
        yield cluster
        assert not cluster.autoscaler_errors()


@pytest.fixture(scope="module")
def recipe(tiny_models: TinyModels, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    return write_recipe(folder, tiny_models["qwen3"], [rows], name="elastic", store=f"file://{folder}/store")


KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
STEPS = 200  # of nine times the usual batch: longer than it takes to hear of a notice
TWO = ("train.workers=2", "cluster.autoscales=true")


@dataclass(frozen=True)
class Look:
    """How many nodes each group had at a moment."""

    at: float
    groups: dict[str, int]


@contextmanager
def counted(cluster: LocalCluster) -> Iterator[list[Look]]:
    """The nodes that there are, look after look, until the block ends."""
    seen: list[Look] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            seen.append(Look(time.monotonic(), {group: len(nodes) for group, nodes in cluster.nodes().items()}))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        ended.set()
        looking.join()


def most(seen: list[Look], group: str) -> int:
    """The most nodes that a group had at any time."""
    return max(each.groups.get(group, 0) for each in seen)


def is_open(cluster: LocalCluster, group: str) -> bool:
    """Whether the autoscaler may start nodes of a group, as its own file says."""
    kinds = json.loads((cluster.folder / "autoscaler.yaml").read_text())["available_node_types"]
    return bool(kinds[group]["max_workers"])


def labels_by_node(cluster: LocalCluster) -> dict[str, dict[str, str]]:
    """The labels of Ray's nodes, by id."""
    nodes = json.loads(asked(cluster, "/nodes?view=summary"))["data"]["summary"]
    return {node["raylet"]["nodeId"]: node["raylet"].get("labels", {}) for node in nodes if "nodeId" in node["raylet"]}


def submitted(cluster: LocalCluster, text: str) -> dict[str, Any]:
    """The job whose entry point has that text, as Ray's dashboard knows it."""
    jobs: list[dict[str, Any]] = json.loads(asked(cluster, "/api/jobs/"))
    return next(each for each in jobs if text in each["entrypoint"])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wait_until_gone(cluster: LocalCluster, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while cluster.nodes():
        assert time.monotonic() < deadline, cluster.nodes()
        time.sleep(0.2)


def asked(cluster: LocalCluster, route: str) -> bytes:
    """What the dashboard answers."""
    token = Path(cluster.environment()["RAY_AUTH_TOKEN_PATH"]).read_text()
    answer = httpx.get(f"{cluster.dashboard_url}{route}", headers={"Authorization": f"Bearer {token}"}, timeout=30)
    assert answer.is_success, (route, answer.text)
    return answer.content


def test_nodes_come_for_a_job_and_go_after_it_and_no_secret_is_seen(
    elastic: LocalCluster, s3: S3Server, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's credentials are known by name alone: each process of the job reads them where it runs."""
    url = f"s3://{s3.bucket}/elastic"
    for name in KEYS:
        assert name not in elastic.environment()
        (tmp_path / name).write_text(s3.env[name])
    named = [f"secrets.{name}=secret://file{tmp_path}/{name}" for name in KEYS]
    with counted(elastic) as seen:
        done = train(elastic, recipe, *TWO, f"store={url}", *named)
    assert done.result["state"] == "succeeded"
    assert done.result["adapter"] == "elastic@1"
    assert max(sum(each.groups.values()) for each in seen) == 2
    assert all("on-demand" not in each.groups for each in seen)  # spot is to be had, so nothing else is asked for
    canary = s3.env["AWS_SECRET_ACCESS_KEY"].encode()
    assert canary not in done.output.encode()
    for path in elastic.folder.rglob("*"):
        if path.is_file():
            assert canary not in path.read_bytes(), path
    for route in ("/api/jobs/", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1", "/api/v0/runtime_envs?detail=1",
                  "/api/v0/workers?detail=1", "/api/v0/cluster_events", "/api/serve/applications/"):  # fmt: skip
        assert canary not in asked(elastic, route), route
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            command = process.read_bytes()
            assert canary not in command or b"ceph-rgw" in command, command
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    store = open_store(url)
    found = list(store.list(""))
    assert found
    assert all(canary not in store.get(each.key) for each in found)
    spent = ledger.by_market(ledger.read_all(store))
    assert spent.keys() == {"spot"}, "the ledger knows the market of the nodes that came"
    assert spent["spot"].cpu_ms == 2 * spent["spot"].held_ms
    wait_until_gone(elastic, 60)


@pytest.mark.long
def test_a_spot_node_that_is_taken_costs_no_step(elastic: LocalCluster, metadata: Metadata, recipe: Path) -> None:
    store = open_store(f"file://{recipe.parent}/store")
    before = set(runs.run_ids(store))
    steps = (f"train.steps={STEPS}", "train.global_batch=36", "checkpoint.every_steps=1000", "train.max_failures=0")
    results = []
    driver = threading.Thread(target=lambda: results.append(train(elastic, recipe, *TWO, *steps)))
    driver.start()
    deadline = time.monotonic() + DEADLINE_S
    while not any(True for run in set(runs.run_ids(store)) - before for _ in runs.read_steps(store, run)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (run_id,) = set(runs.run_ids(store)) - before
    taken = elastic.nodes()["spot"][0]
    metadata.taken[taken] = datetime.now(UTC) + timedelta(seconds=30)
    driver.join()
    assert results[0].result["state"] == "succeeded"
    assert taken not in elastic.nodes().get("spot", ())
    moved = [event for event in runs.read_events(store, run_id) if event.text.startswith("moved")]
    assert len(moved) == 1
    first = [attempt.first_step for attempt in runs.attempts(store, run_id)]
    done = [int(step["step"]) for step in runs.read_steps(store, run_id)]
    assert done == list(range(STEPS))
    assert len(first) == 2
    assert 0 < first[1] < STEPS


@pytest.mark.long
def test_what_a_pod_runs_before_its_end_drains_its_node_and_waits_until_it_is_empty(elastic: LocalCluster) -> None:
    token = Path(elastic.environment()["RAY_AUTH_TOKEN_PATH"]).read_text()
    client = JobSubmissionClient(elastic.dashboard_url, headers={"Authorization": f"Bearer {token}"})
    job = client.submit_job(entrypoint="python -c 'import time; time.sleep(1000)'", entrypoint_num_cpus=1)
    wait_until(lambda: client.get_job_status(job).value == "RUNNING")
    (node,) = (node for nodes in elastic.nodes().values() for node in nodes)
    hook = subprocess.Popen(
        [sys.executable, "-m", "cluster.spot", spot.POD, "--gcs", elastic.address],
        env={**elastic.environment(), "RAY_CLOUD_INSTANCE_ID": node},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert hook.stdout
    assert "drains" in hook.stdout.readline()
    assert hook.poll() is None, "the node has work, so the hook waits"
    client.stop_job(job)
    hook.communicate(timeout=DEADLINE_S)
    assert hook.returncode == 0
    wait_until(lambda: not elastic.nodes())


@pytest.mark.long
def test_without_spot_capacity_it_is_on_demand_within_a_minute_and_spot_again_when_there_is_some(
    elastic: LocalCluster, recipe: Path
) -> None:
    wait_until_gone(elastic, 60)
    elastic.sell_out("spot")
    began = time.monotonic()
    with counted(elastic) as seen:
        result = train(elastic, recipe, *TWO).result
    assert result["state"] == "succeeded"
    assert most(seen, "on-demand") == 2
    assert most(seen, "spot") == 0
    first = min(each.at for each in seen if each.groups.get("on-demand"))
    assert first - began < 60
    elastic.sell_out()
    wait_until_gone(elastic, 60)
    while not is_open(elastic, "spot"):
        assert time.monotonic() - began < FIRST_S + 60
        time.sleep(0.2)
    opened = time.monotonic()
    with counted(elastic) as seen:
        result = train(elastic, recipe, *TWO).result
    assert result["state"] == "succeeded"
    assert (most(seen, "spot"), most(seen, "on-demand")) == (2, 0)
    again = min(each.at for each in seen if each.groups.get("spot"))
    told = (f"on-demand {first - began:.1f} s", f"open again {opened - began:.1f} s", f"spot {again - began:.1f} s")
    print("since the first submit:", *told)
    wait_until_gone(elastic, 60)


@pytest.mark.long
def test_a_submitted_jobs_driver_is_neither_on_the_head_nor_on_spot(elastic: LocalCluster, recipe: Path) -> None:
    """Its exit code is told even when the log has gone with the driver's node."""
    (head,) = elastic.alive()
    command = ("submit", str(recipe), *TWO, "cluster.driver_cpus=1", "publish.name=off-head")
    labels: dict[str, dict[str, str]] = {}
    with counted(elastic) as seen:
        process = luthier(elastic, *command, "--detach")
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        while (job := submitted(elastic, "driver_cpus=1"))["status"] not in ENDED:
            labels |= labels_by_node(elastic)
            time.sleep(0.5)
    assert job["status"] == "SUCCEEDED"
    assert registry.resolve(open_store(f"file://{recipe.parent}/store"), "off-head").version == 1
    assert (most(seen, "spot"), most(seen, "on-demand")) == (2, 1)
    assert job["driver_node_id"] != head
    assert labels[job["driver_node_id"]][MARKET] == "on-demand"
    wait_until_gone(elastic, 60)
    process = luthier(elastic, *command)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert "was submitted before" in out
    assert "the node that has it may be gone" in err
