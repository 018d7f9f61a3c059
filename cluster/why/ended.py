"""Rules about what cannot be asked, has ended, or cannot start whatever room there is."""

from cluster.errors import TokenRefused, VersionMismatch
from cluster.logs import error_in
from cluster.why import room
from cluster.why.facts import OVER, Facts, Job, Node
from cluster.why.finding import Cause, Finding

DISK_FULL = 0.95
"""The part of a disk above which Ray writes no object to it (its local_fs_capacity_threshold)."""


def refused(facts: Facts) -> Finding | None:
    """Early, because nothing else can be known, but for what the store has of a run."""
    if facts.refused is None:
        return None
    evidence = "; ".join([str(facts.refused), *([f"run {facts.run.id} {facts.run}"] if facts.run else [])])
    match facts.refused:
        case TokenRefused():
            return Finding(Cause.TOKEN, evidence, "fetch the cluster's token anew, and name its file")
        case VersionMismatch():
            return Finding(Cause.VERSION, evidence, "install the cluster's version here, or the one of here there")
    return Finding(Cause.SILENT, evidence, "start the cluster, or open its tunnel, and give --address of its dashboard")


def over(facts: Facts) -> Finding | None:
    """First: what has ended well waits for nothing, whatever the cluster suffers from, and whether it is there."""
    if facts.run and facts.run.state in ("succeeded", "stopped"):
        return Finding(Cause.NOTHING, f"run {facts.run.id} {facts.run}")
    for job in current(facts)[:1] if facts.asked is not None else ():
        if job.status in ("SUCCEEDED", "STOPPED"):
            return Finding(Cause.NOTHING, f"job {job.id} has {job.status.lower()}")
    return None


def disk(facts: Facts) -> Finding | None:
    """Before all that happens on a node: Ray goes on to place work on a full one, where whatever writes fails."""
    for node in facts.nodes:
        if node.disk >= DISK_FULL and _concerns(node, facts):
            return Finding(
                Cause.DISK,
                f"the disk of node {node} is {node.disk:.0%} full; above {DISK_FULL:.0%} Ray spills no object to it, "
                "and what is made, logged or saved there fails",
                "free space below its temporary folder (spilled objects, old sessions), or give it a larger disk",
            )
    jobs = current(facts)
    for work in facts.works:
        if work.death.startswith("OUT_OF_DISK") and any(work.ray_id == job.ray_id for job in jobs):
            return Finding(Cause.DISK, f"{work} has failed: {last(work.death)}", "free space on its node")
    for job in jobs:
        if "No space left on device" in job.message + job.last_line:
            evidence = f"job {job.id}: {last(job.last_line or job.message)}"
            return Finding(Cause.DISK, evidence, "free space on its node, and submit it again")
    return None


def environment(facts: Facts) -> Finding | None:
    """Before the failure that it leads to, and before resources: no node would help."""
    fix = "mend runtime_env (packages and versions, what the nodes can reach, paths), or put it into the image"
    jobs = current(facts)
    for job in jobs:
        if job.error == "RUNTIME_ENV_SETUP_FAILURE":
            return Finding(Cause.ENVIRONMENT, f"job {job.id} cannot set up its environment: {last(job.message)}", fix)
    ids = {job.ray_id for job in jobs if job.ray_id}
    for work in facts.works:
        if work.ray_id in ids and "runtime_env" in work.death.lower().replace(" ", "_"):
            error = error_in(work.death).splitlines()[0]
            evidence = f"{work} cannot set up its environment: {error}"
            return Finding(Cause.ENVIRONMENT, evidence, fix)
    return None


def failed(facts: Facts) -> Finding | None:
    """What was asked for has failed by itself; its own last words are the evidence."""
    if facts.run and facts.run.state == "failed":
        again = f"`luthier jobs resume {facts.run.id} --store …`"
        return Finding(Cause.FAILED, f"run {facts.run.id} {facts.run.told}", again)
    for job in current(facts)[:1] if facts.asked is not None else ():
        if job.status == "FAILED":
            said = f"; it said last: {job.last_line}" if job.last_line else ""
            # Its message ends with its log, and begins with how its process ended.
            how = job.message.strip().partition("\n")[0].partition(", last available logs")[0]
            return Finding(Cause.FAILED, f"job {job.id}: {how}{said}", f"see `ray job logs {job.id}`")
    return None


def lost(facts: Facts) -> Finding | None:
    """A run in the middle whose driver is silent: nobody is left who would ask for anything."""
    if facts.run is None or facts.run.state != "lost":
        return None
    return Finding(
        Cause.LOST,
        f"the driver of run {facts.run.id} gives no sign of life; the last it told: {facts.run.told}",
        f"`luthier jobs resume {facts.run.id} --store …` goes on from its last checkpoint",
    )


def replica(facts: Facts) -> Finding | None:
    """Before places: a replica that raises takes one again and again, and Serve's message holds the error."""
    for application in facts.applications:
        if application.reason and facts.is_asked(application.name):
            return Finding(
                Cause.REPLICA,
                f"application {application.name} is {application.status.lower()}: {application.reason}",
                "mend what the error names, then `luthier serving deploy` again",
            )
    return None


def current(facts: Facts) -> list[Job]:
    """The jobs that the question is about: those asked for; else those that have not ended, and the newest."""
    if facts.asked is not None:
        return [job for job in facts.jobs if facts.is_asked(job.id, job.ray_id)]
    return [job for number, job in enumerate(facts.jobs) if number == 0 or job.status not in OVER]


def _concerns(node: Node, facts: Facts) -> bool:
    """Whether what is asked about is or was on this node, or may get its place there; the head concerns all."""
    if facts.asked is None or node.is_head:
        return True
    works = [work for work in facts.works if facts.is_asked(work.ray_id)]
    return any(work.node == node.id for work in works) or bool(room.placed_soon(facts))


def last(text: str) -> str:
    """The last line that says something: of a traceback, the error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
