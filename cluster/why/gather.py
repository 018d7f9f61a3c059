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
from cluster.why import autoscaler, lists
from cluster.why.ended import last
from cluster.why.facts import (
    ACTORS,
    GROUPS_UNREAD,
    JOBS,
    NODES,
    OVER,
    PLACEMENT_GROUPS,
    TASKS,
    Application,
    Autoscaler,
    Facts,
    Job,
    Run,
)

_ROUTES = {
    JOBS: "/api/jobs/",
    ACTORS: "/api/v0/actors?detail=1&limit=10000",
    TASKS: "/api/v0/tasks?detail=1&limit=10000",
    PLACEMENT_GROUPS: "/api/v0/placement_groups?detail=1&limit=10000",
    NODES: "/api/v0/nodes?detail=1&limit=10000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE",
    "disks": "/nodes?view=summary",
    "status": "/api/cluster_status?format=1",
    "Serve": "/api/serve/applications/",
}
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
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
    nodes = lists.nodes(lists.rows(read[NODES]), read["disks"])
    head = next((node.id for node in nodes if node.is_head), None)
    status: str = read["status"]["data"]["clusterStatus"] if read["status"] else ""
    jobs = lists.jobs(read[JOBS] or [])
    applications = tuple(_applications(read["Serve"] or {}, reader))
    ended = {job.ray_id for job in jobs if job.status in OVER}
    # Ray goes on to list what a job that has ended was waiting for; what has failed there may be why it ended.
    tasks = lists.newest(
        task for task in lists.rows(read[TASKS]) if task["job_id"] not in ended or task["state"] == "FAILED"
    )
    strict = autoscaler.on_one_node(status)
    asked = None
    if run:
        job, asked = _asked(run, jobs, applications, reader, told)
        jobs = tuple(job if job and each.id == job.id else each for each in jobs)
    return Facts(
        asked=asked,
        run=told,
        jobs=jobs,
        works=(*lists.actors(lists.rows(read[ACTORS]), tasks, status), *lists.tasks(tasks)),
        groups=tuple(lists.placement_group(group, strict) for group in lists.rows(read[PLACEMENT_GROUPS])),
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


def _autoscaler(reader: _Reader, head: str, status: str) -> Autoscaler | None:
    """None where Ray's monitor only looks on, and no node comes by itself."""
    groups = autoscaler.groups(reader.beginning(head, "monitor.log"))
    if groups is None:
        reader.unread.append(GROUPS_UNREAD)
    elif not groups:
        return None
    return Autoscaler(
        groups=groups or {},
        # The head too is shown as one that is coming, for a moment after its start.
        starting={group: many for group, many in autoscaler.starting(status).items() if group in (groups or {})},
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
