"""Rules about what waits for a place. That which no waiting and no money will mend comes first."""

import shlex
from collections.abc import Mapping

from cluster.why import room
from cluster.why.ended import last
from cluster.why.facts import GROUPS_UNREAD, Facts, NodeGroup, PlacementGroup
from cluster.why.finding import Cause, Finding
from cluster.why.room import Wanted, amounts


def infeasible(facts: Facts) -> Finding | None:
    """No node of any kind would do, so that waiting and more nodes are in vain, whatever else is wrong."""
    groups = _groups(facts)
    for wanted in room.waiting(facts) if _knows_groups(facts) else ():
        for bundle in wanted.bundles:
            one = Wanted(wanted.what, (bundle,), wanted.selector)
            is_here = any(
                room.is_fit(bundle, node.total) and room.matches(wanted.selector, node.labels) for node in facts.nodes
            )
            if not is_here and not room.able(one, groups):
                return Finding(
                    Cause.INFEASIBLE,
                    f"{one}, and no node that is here or could come has it ({_shapes(facts, groups)})",
                    "ask for less at a time, or add a group of nodes that are large enough",
                )
    return None


def autoscaler(facts: Facts) -> Finding | None:
    """Without it no node comes, whatever the cloud has: it explains everything that waits."""
    scaler, wants = facts.autoscaler, room.waiting(facts)
    if scaler is None or not wants or scaler.is_alive:
        return None
    if scaler.is_alive is None and "Traceback" not in scaler.error:
        return None  # too early to know, and what it has written may be a library's warning
    said = f"; its last words: {last(scaler.error)}" if scaler.error else ""
    return Finding(
        Cause.AUTOSCALER,
        f"{wants[0]}, and Ray's autoscaler has stopped{said}",
        "restart the head: nothing else starts its monitor process again; monitor.log and monitor.err there say why",
    )


def held(facts: Facts) -> Finding | None:
    """Before capacity and caps, because what is held for nobody can be had at once and for nothing."""
    unused = room.unused(facts) if room.knows_works(facts) else []
    for wanted in room.waiting(facts) if unused else ():
        if not _may_grow(wanted, facts) and room.fits_without(wanted, unused, facts):
            group = unused[0]
            return Finding(
                Cause.HELD,
                f"{wanted}; placement group {group.name or group.id} of job {facts.job_name(group.ray_id)} holds "
                f"{Wanted('', group.bundles).much}, and nothing runs in it",
                f"if nobody needs it, `{_removal(group)}`",
            )
    return None


def capacity(facts: Facts) -> Finding | None:
    """The cluster could grow, has tried to, and the cloud has refused.

    Another group that would do is no comfort while Ray asks for the refused one again, which it does without end.
    """
    starting = facts.autoscaler.starting if facts.autoscaler else {}
    for wanted in room.waiting(facts):
        sold_out = _sold_out(wanted, facts)
        is_asked_again = any(starting.get(group) for group in sold_out)
        if sold_out and not _is_coming(wanted, facts) and (is_asked_again or not _may_grow(wanted, facts)):
            why = next(iter(sold_out.values()))
            return Finding(
                Cause.CAPACITY,
                f"{wanted}; the cloud gives no node of {', '.join(sold_out)}{f': {last(why)}' if why else ''}",
                "wait, or allow another zone, another type, or on-demand nodes beside spot ones",
            )
    return None


def cap(facts: Facts) -> Finding | None:
    """All nodes that may be are there and in use, or would not be enough."""
    groups, there = _groups(facts), room.counts(facts)
    for wanted in room.waiting(facts) if _knows_groups(facts) else ():
        is_enough = room.fits_at_most(wanted, facts)
        if is_enough and _may_grow(wanted, facts):
            continue
        limits = [
            f"{name} has {there.get(name, 0)} of at most {groups[name].most}" for name in room.able(wanted, groups)
        ]
        nodes = "; ".join(limits) or f"there are {len(facts.nodes)} nodes, and no more to come"
        if not is_enough:
            fix = "raise max_workers of a group, or ask for fewer workers"
            return Finding(Cause.CAP, f"{wanted} at once, more than all nodes that may be: {nodes}", fix)
        users = ", ".join(_users(facts)) or "nobody"
        fix = "wait until one of those jobs ends, end one, or raise max_workers of a group"
        return Finding(Cause.CAP, f"{wanted}; {nodes}; in use by {users}", fix)
    return None


def _removal(group: PlacementGroup) -> str:
    """A command that removes it. By its id: a name is known only in the namespace of the job that gave it."""
    program = (
        "import ray; from ray.util.placement_group import PlacementGroup; ray.init(); "
        f'ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex("{group.id}")))'
    )
    return shlex.join(["ray", "job", "submit", "--", "python", "-c", program])


def _groups(facts: Facts) -> Mapping[str, NodeGroup]:
    return facts.autoscaler.groups if facts.autoscaler else {}


def _knows_groups(facts: Facts) -> bool:
    """Whether all that could come is known: without, nothing can be said to be too large."""
    return GROUPS_UNREAD not in facts.unread and bool(facts.nodes)


def _may_grow(wanted: Wanted, facts: Facts) -> bool:
    """Whether a node that would do is coming, or may be asked for, of a group whose last launch did not fail."""
    sold_out = _sold_out(wanted, facts)
    return _is_coming(wanted, facts) or any(group not in sold_out for group in room.below_most(wanted, facts))


def _is_coming(wanted: Wanted, facts: Facts) -> bool:
    """Whether a node that would do has been asked for, and not refused."""
    scaler = facts.autoscaler
    able = room.able(wanted, _groups(facts))
    return scaler is not None and any(scaler.starting.get(group) and group not in scaler.failed for group in able)


def _sold_out(wanted: Wanted, facts: Facts) -> dict[str, str]:
    """The groups that would do and may grow, but for the cloud; and what it says."""
    failed = facts.autoscaler.failed if facts.autoscaler else {}
    return {group: failed[group] for group in room.below_most(wanted, facts) if group in failed}


def _users(facts: Facts) -> list[str]:
    """The jobs that hold resources."""
    ids = {work.ray_id for work in facts.works if work.lives and work.resources}
    ids |= {group.ray_id for group in facts.groups if group.state == "CREATED"}
    return sorted({facts.job_name(each) for each in ids})


def _shapes(facts: Facts, groups: Mapping[str, NodeGroup]) -> str:
    """What a node of each kind offers."""
    here = {amounts(node.total) for node in facts.nodes if node.group not in groups}
    come = [f"{name} has {amounts(group.resources)}" for name, group in groups.items()]
    return "; ".join([*(f"a node here has {each}" for each in sorted(here)), *come])
