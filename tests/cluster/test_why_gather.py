"""What is read of a dashboard: one that answers, answers with errors or slowly, or is none at all."""

import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cluster import keys, records
from cluster.errors import InputError
from cluster.records import Heartbeat, RunEvent, RunState
from cluster.store import open_store
from cluster.why import explain
from cluster.why.facts import ACTORS, JOBS, NODES
from cluster.why.finding import Cause
from cluster.why.gather import gather

HEAD = {"node_id": "head", "is_head_node": True, "labels": {}, "resources_total": {}}
NODE = {"node_id": "node", "is_head_node": False, "labels": {}, "resources_total": {"CPU": 2.0}}
DRIVER = {"submission_id": "train", "job_id": "01", "status": "RUNNING", "start_time": 1}
ACTOR = {"class_name": "Worker", "actor_id": "a", "state": "ALIVE", "job_id": "01", "node_id": "node"}
BROKEN = 500


def rows(*found: Any) -> Any:
    return {"data": {"result": {"result": found}}}


PATHS = {
    **{name: f"/api/v0/{name}" for name in ("cluster_metadata", "actors", "tasks", "placement_groups", "nodes")},
    "version": "/api/version",
    "jobs": "/api/jobs/",
    "summary": "/nodes",
    "status": "/api/cluster_status",
    "serve": "/api/serve/applications/",
    "log": "/api/v0/logs/file",
    "job_log": "/api/jobs/train/logs",
}
ANSWERS: dict[str, Any] = {
    PATHS["version"]: {"ray_version": version("ray")},
    PATHS["cluster_metadata"]: {"data": {"pythonVersion": platform.python_version()}},
    PATHS["jobs"]: [DRIVER],
    PATHS["actors"]: rows({**ACTOR, "required_resources": {"CPU": 1.0}}),
    PATHS["tasks"]: rows(),
    PATHS["placement_groups"]: rows(),
    PATHS["nodes"]: rows(HEAD, NODE),
    PATHS["summary"]: {"data": {"summary": []}},
    PATHS["status"]: {"data": {"clusterStatus": ""}},
    PATHS["serve"]: {},
    PATHS["log"]: "",
    PATHS["job_log"]: {"logs": "one\n\x1b[36mtwo\x1b[0m\n"},
}


class Dashboard:
    """Answers on a port of its own with what a test has laid there: JSON, a status code, or what a call gives."""

    def __init__(self, answers: dict[str, Any]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = answers.get(self.path.partition("?")[0], 404)
                answer = answer() if callable(answer) else answer
                body = answer if isinstance(answer, str) else json.dumps(answer)
                with suppress(ConnectionError):  # whoever asked has gone
                    self.send_response(answer if isinstance(answer, int) else 200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def dashboard() -> Iterator[Callable[..., str]]:
    """Starts one with some answers of its own; gives its address."""
    started: list[Dashboard] = []

    def start(**answers: Any) -> str:
        named = {PATHS[name]: answer for name, answer in answers.items()}
        started.append(Dashboard({**ANSWERS, **named}))
        return started[-1].url

    yield start
    for each in started:
        each.server.shutdown()
        each.server.server_close()


Start = Callable[..., str]


def test_what_answers_is_read(dashboard: Start) -> None:
    facts = gather(dashboard(), "train", None)
    assert explain(facts).evidence.startswith("job train is running; it said last: two")
    assert facts.unread == ("the autoscaler's config",)


@pytest.mark.parametrize("which", [JOBS, ACTORS, NODES])
def test_without_a_list_nothing_is_called_well(dashboard: Start, which: str) -> None:
    found = explain(gather(dashboard(**{which: BROKEN}), "train", None))
    assert found.cause is Cause.SILENT
    assert which in found.evidence


@pytest.mark.parametrize("answer", [BROKEN, "<html>sign in</html>", {"error": "none"}])
@pytest.mark.parametrize("path", ["version", "cluster_metadata"])
def test_what_is_no_dashboard_of_ray_is_said_to_be_none(dashboard: Start, path: str, answer: Any) -> None:
    found = explain(gather(dashboard(**{path: answer}), None, None))
    assert found.cause is Cause.SILENT
    assert "not as Ray's dashboard does" in found.evidence


def test_a_page_in_the_place_of_a_list_is_no_answer(dashboard: Start) -> None:
    assert JOBS in gather(dashboard(jobs="<html>sign in</html>"), None, None).unread


def test_a_dashboard_that_hangs_is_asked_for_so_long(dashboard: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.submit._TIMEOUT_S", 0.3)
    monkeypatch.setattr("cluster.why.gather._PATIENCE_S", 0.2)
    released = threading.Event()
    asked: list[float] = []

    def hang() -> str:
        asked.append(time.monotonic())
        released.wait()
        return ""

    found = explain(gather(dashboard(actors=hang, log=hang), None, None))
    released.set()
    assert len(asked) == 1  # of its logs none, which would be four in turn
    assert (found.cause, ACTORS in found.evidence) == (Cause.SILENT, True)


def test_an_unknown_run_is_bad_input(dashboard: Start) -> None:
    with pytest.raises(InputError, match=r"no run, job or application 'other'.*train"):
        gather(dashboard(), "other", None)


def test_a_placement_group_that_must_be_on_one_node_is_known(dashboard: Start) -> None:
    def group(name: str, *bundles: dict[str, float]) -> dict[str, Any]:
        parts = [{"unit_resources": bundle} for bundle in bundles]
        return {"placement_group_id": name, "name": name, "state": "PENDING", "bundles": parts}

    status = (
        "Pending Demands:\n {'CPU': 1.0, 'GPU': 0.5} * 2, {'CPU': 2.0} * 1 (STRICT_PACK): 1+ pending placement groups\n"
        " {'CPU': 1.0} * 2 (PACK): 1+ pending placement groups\n {'CPU': 1.0}: 3+ pending tasks/actors"
    )
    half = {"GPU": 0.5, "CPU": 1.0}
    groups = rows(group("tight", {"CPU": 2.0}, half, half), group("loose", {"CPU": 1.0}, {"CPU": 1.0}))
    url = dashboard(placement_groups=groups, status={"data": {"clusterStatus": status}})
    assert {each.id: each.on_one_node for each in gather(url, None, None).groups} == {"tight": True, "loose": False}


@pytest.mark.parametrize(
    ("state", "driver_lives", "cause"),
    [("running", True, Cause.NOTHING), ("running", False, Cause.LOST), ("failed", False, Cause.FAILED)],
)
def test_a_run_that_only_the_store_knows(
    dashboard: Start, tmp_path: Path, state: RunState, driver_lives: bool, cause: Cause
) -> None:
    store = open_store(f"file://{tmp_path}")
    told = RunEvent(at=records.now(), state=state, text="eight steps")
    store.put(keys.event("run-1", 1), told.model_dump_json().encode())
    if driver_lives:
        store.put(keys.heartbeat("run-1"), Heartbeat(at=records.now(), driver="x").model_dump_json().encode())
    found = explain(gather(dashboard(), "run-1", store))
    assert (found.cause, "run-1" in found.evidence, "eight steps" in found.evidence) == (cause, True, True)


def test_a_task_that_went_well_when_it_was_tried_again_is_no_trouble(dashboard: Start) -> None:
    task = {"task_id": "t", "type": "NORMAL_TASK", "name": "work", "job_id": "01"}
    first = {**task, "attempt_number": 0, "state": "FAILED", "error_type": "RUNTIME_ENV_SETUP_FAILED"}
    again = {**task, "attempt_number": 1, "state": "FINISHED"}
    assert explain(gather(dashboard(tasks=rows(first)), None, None)).cause is Cause.ENVIRONMENT
    assert explain(gather(dashboard(tasks=rows(again, first)), None, None)).cause is Cause.NOTHING


def test_the_disk_of_a_node_is_the_one_that_ray_writes_to(dashboard: Start) -> None:
    def disk(**percents: float) -> str:
        disks = {path.replace("root", "/"): {"percent": percent} for path, percent in percents.items()}
        return dashboard(summary={"data": {"summary": [{"raylet": {"nodeId": "head"}, "disk": disks}]}})

    def of_head(url: str) -> float:
        return next(node.disk for node in gather(url, None, None).nodes if node.is_head)

    assert of_head(disk(root=99.0, temp=40.0)) == 0.4
    assert of_head(disk(root=40.0, temp=99.0)) == 0.99
    assert of_head(disk(root=50.0)) == 0.5


SERVED = {"status": "DEPLOYING", "message": "", "deployments": {}}


CONFIG = (
    "2026-11-26 01:41:17,338 INFO 73 -- Using Autoscaling Config: \n"
    "available_node_types: {head: {max_workers: 0}, small: {max_workers: 1, resources: {CPU: 1}}}\n"
    "head_node_type: head\n\n2026-11-26 01:41:17,339 more\n"
)


def test_the_head_is_no_node_that_is_coming(dashboard: Start) -> None:
    status = {"data": {"clusterStatus": "\nPending:\n 10.0.0.1: head, starting ray\n small, 1 launching\n"}}
    scaler = gather(dashboard(status=status, log=CONFIG), None, None).autoscaler
    assert scaler
    assert scaler.starting == {"small": 1}


def test_a_replica_that_waits_is_its_applications(dashboard: Start) -> None:
    replica = {**ACTOR, "class_name": "ServeReplica:served:Engine", "state": "PENDING_CREATION", "node_id": None}
    url = dashboard(
        actors=rows({**replica, "required_resources": {"GPU": 1.0}}),
        log="2026-11-26 01:41:17,338 INFO 73 -- Using Autoscaling Config: \n{}\n\n2026-11-26 01:41:17,339 more\n",
        serve={"applications": {"served": SERVED}},
    )
    found = explain(gather(url, "served", None))
    assert found.cause is Cause.INFEASIBLE
    assert "ServeReplica:served:Engine asks for 1 GPU" in found.evidence


def test_an_application_that_was_never_built_has_its_error_at_its_top(dashboard: Start) -> None:
    failed = {**SERVED, "status": "DEPLOY_FAILED", "message": "Traceback …\n  File x\nImportError: no module y\n"}
    found = explain(gather(dashboard(serve={"applications": {"served": failed}}), None, None))
    assert (found.cause, "no module y" in found.evidence) == (Cause.REPLICA, True)


def test_an_application_that_is_scaled_to_zero_rests(dashboard: Start) -> None:
    asleep = {"status": "HEALTHY", "message": "", "target_num_replicas": 0, "replicas": []}
    running = {**SERVED, "status": "RUNNING", "deployments": {"Engine": asleep}}
    found = explain(gather(dashboard(serve={"applications": {"served": running}}), "served", None))
    assert found.cause is Cause.NOTHING
    assert "application served is running; Engine is scaled to zero" in found.evidence
