"""Reading Facts: by the dashboard's REST alone, since a laptop reaches nothing else; and from a run's store.

What does not answer is left out and named: a cluster in trouble is what this is for. Whoever asks waits for a minute
at most.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx

from cluster import keys, records
from cluster.errors import ClusterSilent, InputError, TokenRefused, VersionMismatch
from cluster.logs import error_in, missing_pinned
from cluster.records import RunEvent
from cluster.store import Store
from cluster.submit import Cluster
from cluster.why import autoscaler
from cluster.why.ended import last
from cluster.why.facts import (
    ACTORS,
    GROUPS_UNREAD,
    JOBS,
    NODES,
    OVER,
    PLACEMENT_GROUPS,
    TASKS,
    WAITS,
    Application,
    Autoscaler,
    Facts,
    Job,
    Node,
    PlacementGroup,
    Run,
    Work,
)

_ROUTES = {
    JOBS: "/api/jobs/",
    ACTORS: "/api/v0/actors?detail=1&limit=10000",
    TASKS: "/api/v0/tasks?detail=1&limit=10000&filter_keys=state&filter_predicates=%21%3D&filter_values=FINISHED",
    PLACEMENT_GROUPS: "/api/v0/placement_groups?detail=1&limit=10000",
    NODES: "/api/v0/nodes?detail=1&limit=10000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE",
    "disks": "/nodes?view=summary",
    "status": "/api/cluster_status?format=1",
    "Serve": "/api/serve/applications/",
}
_SUPERVISOR = "_ray_internal_job_actor_"
_REPLICA_CLASS = "ServeReplica:"  # application:deployment
_REPLICA_NAME = "SERVE_REPLICA::"  # application#deployment#id, of its placement group too
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_GROUP_LABEL = "ray.io/node-group"
_TAIL_LINES = 1000
_GCS_LINES = 3000
"""Its notes of what it has counted have about 250 lines, once a minute."""

_BEGINNING_BYTES = 2**20
"""Of the autoscaler's log, which begins with its config and grows for as long as the cluster lives."""

_LOGS_READ = 20
"""So many jobs' logs are looked through for a run's id."""

_PATIENCE_S = 30.0
"""After so long nothing more is asked."""


def gather(address: str, run: str | None, store: Store | None) -> Facts:
    """What can be known about a cluster now, and of `run` in it: a run, a job's submission id, or an application.

    Raises InputError when there is no such thing, or the address is none of a dashboard.
    """
    told = _run(store, run) if store and run else None
    try:
        cluster = Cluster(address)
    except (ClusterSilent, TokenRefused, VersionMismatch) as error:
        return Facts(refused=error, run=told)
    reader = _Reader(cluster)
    with ThreadPoolExecutor(len(_ROUTES)) as pool:
        read = dict(zip(_ROUTES, pool.map(reader.json, _ROUTES, _ROUTES.values()), strict=True))
    nodes = _nodes(_rows(read[NODES]), read["disks"])
    head = next((node.id for node in nodes if node.is_head), None)
    status: str = read["status"]["data"]["clusterStatus"] if read["status"] else ""
    jobs = _jobs(read[JOBS] or [])
    applications = tuple(_applications(read["Serve"] or {}, reader))
    ended = {job.ray_id for job in jobs if job.status in OVER}
    # Ray goes on to list what a job that has ended was waiting for; what has failed there may be why it ended.
    tasks = _newest(task for task in _rows(read[TASKS]) if task["job_id"] not in ended or task["state"] == "FAILED")
    asked = None
    if run:
        job, asked = _asked(run, jobs, applications, reader, told)
        jobs = tuple(job if job and each.id == job.id else each for each in jobs)
    return Facts(
        asked=asked,
        run=told,
        jobs=jobs,
        works=(*_actors(_rows(read[ACTORS]), tasks, status), *_tasks(tasks)),
        groups=tuple(map(_group, _rows(read[PLACEMENT_GROUPS]))),
        nodes=nodes,
        autoscaler=_autoscaler(reader, head, status) if head else None,
        applications=applications,
        unread=tuple(dict.fromkeys(reader.unread)),
    )


class _Reader:
    """Asks the dashboard, and remembers what did not answer."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._until = time.monotonic() + _PATIENCE_S
        self.unread: list[str] = []

    def json(self, name: str, path: str) -> Any:
        """None when it does not answer, or with something else: a proxy's page."""
        text = self.text(name, path)
        try:
            return json.loads(text) if text else None
        except ValueError:
            self.unread.append(name)
            return None

    def text(self, name: str, path: str, most_bytes: int | None = None) -> str:
        """What is there; empty when it does not answer."""
        if time.monotonic() > self._until:
            self.unread.append(name)
            return ""
        try:
            return self._cluster.read(path, most_bytes)
        except httpx.HTTPError:
            self.unread.append(name)
            return ""

    def log(self, node: str, file: str, lines: int = _TAIL_LINES) -> str:
        """The end of one of Ray's logs on a node."""
        return self.text(file, f"/api/v0/logs/file?node_id={node}&filename={file}&lines={lines}")

    def beginning(self, node: str, file: str) -> str:
        return self.text(file, f"/api/v0/logs/file?node_id={node}&filename={file}&lines=-1", _BEGINNING_BYTES)


def _rows(answer: Any) -> list[dict[str, Any]]:
    """What a list of the state API holds."""
    return answer["data"]["result"]["result"] if answer else []


def _jobs(answer: list[dict[str, Any]]) -> tuple[Job, ...]:
    """The newest first."""
    ordered = sorted(answer, key=lambda job: job.get("start_time") or 0, reverse=True)
    return tuple(
        Job(
            id=job.get("submission_id") or job.get("job_id") or "",
            ray_id=job.get("job_id") or "",
            status=job["status"],
            message=job.get("message") or "",
            error=job.get("error_type") or "",
        )
        for job in ordered
    )


def _actors(actors: list[dict[str, Any]], tasks: list[dict[str, Any]], status: str) -> Iterator[Work]:
    """An actor that names no resources is placed with 1 CPU and holds none afterwards; the status alone shows that.

    What a driver asks for is all named.
    """
    least = {"CPU": 1.0} if "{'CPU': 1.0}: " in status else {}
    busy = {task.get("actor_id") for task in tasks if task["type"] == "ACTOR_TASK" and task["state"].startswith("RUN")}
    for actor in actors:
        name = actor.get("name") or ""
        supervises = name.removeprefix(_SUPERVISOR) if name.startswith(_SUPERVISOR) else None
        yield Work(
            kind="actor",
            name=actor["class_name"],
            state=actor["state"],
            ray_id=supervises or _application(actor["class_name"], _REPLICA_CLASS, ":") or actor["job_id"],
            node=actor.get("node_id") or "",
            group=actor.get("placement_group_id") or "",
            resources=actor.get("required_resources")
            or (least if actor["state"] in WAITS and supervises is None else {}),
            selector=actor.get("label_selector") or {},
            is_busy=actor["actor_id"] in busy,
            death=_death(actor.get("death_cause") or {}),
        )


def _death(cause: Mapping[str, Any]) -> str:
    """An actor's death as one text: Ray names its kind by the only key, and has the words below."""
    return "\n".join(
        f"{kind}: {more.get('error_message', '')}" for kind, more in cause.items() if isinstance(more, dict)
    )


def _application(name: str, prefix: str, sign: str) -> str:
    """The Serve application that a replica is part of; empty when it is no replica's name."""
    return name.removeprefix(prefix).partition(sign)[0] if name.startswith(prefix) else ""


def _newest(tasks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each task its last attempt: what failed, and went well when it was tried again, is no trouble."""
    found: dict[str, dict[str, Any]] = {}
    for task in sorted(tasks, key=lambda task: int(task["attempt_number"])):
        found[task["task_id"]] = task
    return list(found.values())


def _tasks(tasks: list[dict[str, Any]]) -> Iterator[Work]:
    for task in tasks:
        if task["type"] == "NORMAL_TASK":  # an actor's making and its methods are the actor's
            yield Work(
                kind="task",
                name=task["name"],
                state=task["state"],
                ray_id=task["job_id"],
                node=task.get("node_id") or "",
                group=task.get("placement_group_id") or "",
                resources=task.get("required_resources") or {},
                selector=task.get("label_selector") or {},
                is_busy=task["state"].startswith("RUN"),
                death=f"{task['error_type']}: {task.get('error_message') or ''}" if task.get("error_type") else "",
            )


def _group(group: dict[str, Any]) -> PlacementGroup:
    bundles = group.get("bundles") or []
    selectors = [set((bundle.get("label_selector") or {}).items()) for bundle in bundles]
    return PlacementGroup(
        id=group["placement_group_id"],
        state=group["state"],
        name=group.get("name") or "",
        ray_id=_application(group.get("name") or "", _REPLICA_NAME, "#") or group.get("creator_job_id") or "",
        bundles=tuple(bundle["unit_resources"] for bundle in bundles),
        nodes=tuple(bundle.get("node_id") or "" for bundle in bundles),
        selector=dict(set.intersection(*selectors)) if selectors else {},
    )


def _nodes(nodes: list[dict[str, Any]], disks: Any) -> tuple[Node, ...]:
    summaries = {each["raylet"].get("nodeId"): each for each in disks["data"]["summary"]} if disks else {}
    found = []
    for node in nodes:
        more = summaries.get(node["node_id"], {})
        stats = more.get("raylet", {}).get("storeStats", {})
        found.append(
            Node(
                id=node["node_id"],
                is_head=node["is_head_node"],
                group=node["labels"].get(_GROUP_LABEL, ""),
                total=node["resources_total"],
                labels=node["labels"],
                disk=_disk(more.get("disk") or {}),
                pinned_bytes=int(stats.get("objectStoreBytesPrimaryCopy") or 0),
            )
        )
    return tuple(found)


def _disk(disks: Mapping[str, Mapping[str, float]]) -> float:
    """Of the temporary folder's disk, since Ray writes there alone. It is told beside that of /, unless in a pod."""
    of_folder = [disk["percent"] for path, disk in disks.items() if path != "/"] or [
        disk["percent"] for disk in disks.values()
    ]
    return max(of_folder, default=0.0) / 100


def _autoscaler(reader: _Reader, head: str, status: str) -> Autoscaler | None:
    """None where Ray's monitor only looks on, and no node comes by itself."""
    groups = autoscaler.groups(reader.beginning(head, "monitor.log"))
    if groups is None:
        reader.unread.append(GROUPS_UNREAD)
    elif not groups:
        return None
    return Autoscaler(
        groups=groups or {},
        starting=autoscaler.starting(status),
        failed=autoscaler.failed(reader.log(head, "monitor.log"), status),
        is_alive=autoscaler.is_alive(reader.log(head, "gcs_server.out", _GCS_LINES)),
        error=reader.log(head, "monitor.err"),
    )


def _applications(answer: Mapping[str, Any], reader: _Reader) -> Iterator[Application]:
    for name, application in answer.get("applications", {}).items():
        parts = application.get("deployments", {})
        deployments = parts.values()
        messages = [each["message"] for each in deployments if "failed to start" in each["message"]]
        if application["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):  # at its building, or later
            unhealthy = [each["message"] for each in deployments if each["status"] in ("DEPLOY_FAILED", "UNHEALTHY")]
            messages += [message for message in (*unhealthy, application["message"]) if message]
        replicas = [replica for each in deployments for replica in each.get("replicas", [])]
        yield Application(
            name=name,
            status=application["status"],
            reason=error_in(messages[0]) if messages else "",
            asleep=tuple(part for part, each in parts.items() if each.get("target_num_replicas") == 0),
            missing=_missing(reader, [replica["actor_id"] for replica in replicas if replica.get("actor_id")]),
        )


def _missing(reader: _Reader, actors: Iterable[str]) -> dict[str, str]:
    """The pinned adapters that a replica could not load."""
    logs = (
        reader.text("a log", f"/api/v0/logs/file?actor_id={actor}&suffix=err&lines={_TAIL_LINES}") for actor in actors
    )
    return {adapter: why for log in logs for adapter, why in missing_pinned(log).items()}


def _asked(
    run: str, jobs: tuple[Job, ...], applications: tuple[Application, ...], reader: _Reader, told: Run | None
) -> tuple[Job | None, frozenset[str]]:
    """The job that `run` means, with the end of its log; and all ids that are meant. Raises InputError."""
    if any(application.name == run for application in applications):
        return None, frozenset([run])
    for job in jobs:
        if run in (job.id, job.ray_id):
            return _with_end(job, _log(job, reader)), frozenset([job.id, job.ray_id])
    for job in [job for job in jobs if job.id != job.ray_id][:_LOGS_READ]:  # what was not submitted has no log
        log = _log(job, reader)
        if f"run {run} in " in log:
            return _with_end(job, log), frozenset([run, job.id, job.ray_id])
    if told is None and JOBS not in reader.unread:
        there = ", ".join([job.id for job in jobs[:_LOGS_READ]] + [each.name for each in applications]) or "nothing"
        raise InputError(f"no run, job or application {run!r} in this cluster; there are: {there}; runs need --store")
    return None, frozenset([run])


def _log(job: Job, reader: _Reader) -> str:
    answer = reader.json(f"the log of {job.id}", f"/api/jobs/{job.id}/logs")
    return (answer or {}).get("logs") or ""


def _with_end(job: Job, log: str) -> Job:
    return replace(job, last_line=last(_COLOUR.sub("", log)))


def _run(store: Store, run: str) -> Run | None:
    """A run as the store has it; None when it has none of that id."""
    events = [records.read(store, item.key, RunEvent) for item in store.list(keys.events_prefix(run))]
    if not events:
        return None
    return Run(run, records.run_state(store, run, events), events[-1].text, _last_step(store, run))


def _last_step(store: Store, run: str) -> int | None:
    parts = [item.key for item in store.list(keys.metrics_prefix(run))]
    lines = store.get(parts[-1]).decode().splitlines() if parts else []
    return int(json.loads(lines[-1])["step"]) + 1 if lines else None
