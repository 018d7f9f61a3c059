"""Rules about what runs and does no good; and what to say when nothing is wrong."""

from cluster.why import room
from cluster.why.ended import current
from cluster.why.facts import (
    ACTORS,
    JOBS,
    NODES,
    OVER,
    PLACEMENT_GROUPS,
    SUPERVISOR,
    TASKS,
    WAITS,
    Application,
    Facts,
    Job,
    Work,
)
from cluster.why.finding import Cause, Finding

_RAYS_OWN = (SUPERVISOR, "ServeController", "ProxyActor", "TrainController", "_StatsActor", "Queue")
"""Actors that hold nothing on purpose: Ray's own, and our queue."""


def forgotten(facts: Facts) -> Finding | None:
    """It runs and holds nothing: Ray neither spreads nor grows for what nobody asks for."""
    for job in current(facts):
        works = [work for work in facts.works if work.ray_id and work.ray_id == job.ray_id]
        ours = [work for work in works if work.lives and work.is_busy and work.name not in _RAYS_OWN]
        asks = any((work.lives or work.waits) and (work.resources or work.group) for work in works)
        asks |= any(group.ray_id == job.ray_id and group.state in WAITS for group in facts.groups)
        if job.status == "RUNNING" and ours and not asks and _is_room_elsewhere(ours, facts):
            names = ", ".join(sorted({str(work) for work in ours}))
            return Finding(
                Cause.FORGOTTEN,
                f"{len(ours)} of job {job.id} ({names}) compute, hold no CPU and no GPU, and share one node: the "
                "cluster sees no demand, and neither spreads nor grows",
                "say what each needs: num_cpus=, num_gpus= or a placement group; in a recipe, cluster.cpus_per_worker",
            )
    return None


def adapter(facts: Facts) -> Finding | None:
    """It serves, but not all that it is meant to."""
    for application in facts.applications:
        for name, why in application.missing.items() if facts.is_asked(application.name) else ():
            return Finding(
                Cause.ADAPTER,
                f"application {application.name} shall hold {name}, and cannot: {why}",
                f"publish {name} there, or take it out of adapters.pinned; it is loaded as soon as it is there",
            )
    return None


def pinned(facts: Facts) -> Finding | None:
    """Late: nothing waits and nothing fails, but a node that does nothing is paid for."""
    groups = facts.autoscaler.groups if facts.autoscaler and room.knows_works(facts) else {}
    used = {node for node, resources in room.holdings(facts) if resources}
    for node in facts.nodes:
        if node.is_head or node.id in used or node.group not in groups:
            continue
        there = [work for work in facts.works if work.node == node.id and work.lives and facts.is_asked(work.ray_id)]
        if there:
            work = there[0]
            by = f"{work} of job {facts.job_name(work.ray_id)} lives there, idle and holding nothing"
            fix = 'end it, or keep it on the head: resources={"node:__internal_head__": 0.001}'
        elif node.pinned_bytes and facts.asked is None:
            by = f"{node.pinned_bytes / 2**20:.1f} MiB of objects lie there that somebody still refers to"
            fix = "let the driver drop its references (`ray memory` lists them), or end the job that holds them"
        else:
            continue
        return Finding(Cause.PINNED, f"node {node} of {node.group} does nothing and cannot go: {by}", fix)
    return None


def unread(facts: Facts) -> Finding | None:
    """Last: nothing is known to be wrong, but too little is known to call it well."""
    lists = [each for each in facts.unread if each in (JOBS, ACTORS, TASKS, PLACEMENT_GROUPS, NODES)]
    if not lists:
        return None
    fix = "ask again; if it stays, see dashboard.log and gcs_server.out on the head, which may be short of memory"
    return Finding(Cause.SILENT, f"the dashboard answers, but does not list: {', '.join(lists)}", fix)


def nothing(facts: Facts) -> Finding:
    """What is being done, as precisely as is known."""
    wants = [*room.waiting(facts), *room.placed_soon(facts)]
    coming = facts.autoscaler.starting if facts.autoscaler and (wants or facts.asked is None) else {}
    said = []
    if facts.run:
        said.append(f"run {facts.run.id} {facts.run}")
    if any(coming.values()):
        said.append(f"nodes are starting: {', '.join(f'{count} of {group}' for group, count in coming.items())}")
    if wants:
        asks = any(any(bundle.values()) for bundle in wants[0].bundles)
        said.append(f"{wants[0]}, and shall have it in a moment" if asks else f"{wants[0].what} is starting")
    said += [f"job {job.id} is {job.status.lower()}{_says(job)}" for job in current(facts) if job.status not in OVER]
    said += [f"application {each.name} is {_serves(each)}" for each in facts.applications if facts.is_asked(each.name)]
    unread = f" (but this did not answer: {', '.join(facts.unread)})" if facts.unread else ""
    return Finding(Cause.NOTHING, ("; ".join(said) or "no job runs or waits") + unread)


def _is_room_elsewhere(works: list[Work], facts: Facts) -> bool:
    """Whether there are nodes, or could be, that these would use if they asked."""
    places = {work.node for work in works}
    grows = any(group.most for group in facts.autoscaler.groups.values()) if facts.autoscaler else False
    others = any(node.id not in places and node.total.get("CPU") for node in facts.nodes)
    return len(places) == 1 and (grows or others)


def _serves(application: Application) -> str:
    asleep = ", ".join(application.asleep)
    rests = f"; {asleep} is scaled to zero, and the next request starts a replica" if asleep else ""
    return f"{application.status.lower()}{rests}"


def _says(job: Job) -> str:
    return f"; it said last: {job.last_line}" if job.last_line else ""
