"""What the dashboard's lists hold, as facts. Pure: `gather.py` asks for the lists."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cluster.why.facts import WAITS, Job, Node, PlacementGroup, Work

_SUPERVISOR = "_ray_internal_job_actor_"
_REPLICA_CLASS = "ServeReplica:"  # application:deployment
_REPLICA_NAME = "SERVE_REPLICA::"  # application#deployment#id, of its placement group too
_GROUP_LABEL = "ray.io/node-group"


def rows(answer: Any) -> list[dict[str, Any]]:
    """What a list of the state API holds."""
    return answer["data"]["result"]["result"] if answer else []


def jobs(answer: list[dict[str, Any]]) -> tuple[Job, ...]:
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


def newest(tasks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each task its last attempt: what failed, and went well when it was tried again, is no trouble."""
    found: dict[str, dict[str, Any]] = {}
    for task in sorted(tasks, key=lambda task: int(task["attempt_number"])):
        found[task["task_id"]] = task
    return list(found.values())


def tasks(tasks: list[dict[str, Any]]) -> Iterator[Work]:
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


def actors(actors: list[dict[str, Any]], tasks: list[dict[str, Any]], status: str) -> Iterator[Work]:
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


def placement_group(group: dict[str, Any], strict: Sequence[list[dict[str, float]]]) -> PlacementGroup:
    """`strict` has the bundles of those that must be on one node."""
    bundles = group.get("bundles") or []
    shape = sorted(sorted(bundle["unit_resources"].items()) for bundle in bundles)
    selectors = [set((bundle.get("label_selector") or {}).items()) for bundle in bundles]
    return PlacementGroup(
        id=group["placement_group_id"],
        state=group["state"],
        name=group.get("name") or "",
        ray_id=_application(group.get("name") or "", _REPLICA_NAME, "#") or group.get("creator_job_id") or "",
        bundles=tuple(bundle["unit_resources"] for bundle in bundles),
        nodes=tuple(bundle.get("node_id") or "" for bundle in bundles),
        selector=dict(set.intersection(*selectors)) if selectors else {},
        on_one_node=shape in [sorted(sorted(bundle.items()) for bundle in each) for each in strict],
    )


def nodes(nodes: list[dict[str, Any]], disks: Any) -> tuple[Node, ...]:
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


def _death(cause: Mapping[str, Any]) -> str:
    """An actor's death as one text: Ray names its kind by the only key, and has the words below."""
    return "\n".join(
        f"{kind}: {more.get('error_message', '')}" for kind, more in cause.items() if isinstance(more, dict)
    )


def _application(name: str, prefix: str, sign: str) -> str:
    """The Serve application that a replica is part of; empty when it is no replica's name."""
    return name.removeprefix(prefix).partition(sign)[0] if name.startswith(prefix) else ""


def _disk(disks: Mapping[str, Mapping[str, float]]) -> float:
    """Of the temporary folder's disk, since Ray writes there alone. It is told beside that of /, unless in a pod."""
    of_folder = [disk["percent"] for path, disk in disks.items() if path != "/"] or [
        disk["percent"] for disk in disks.values()
    ]
    return max(of_folder, default=0.0) / 100
