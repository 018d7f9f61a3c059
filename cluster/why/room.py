"""What waits for room in a cluster, what room there is, and what room could come. Pure, on `facts.py`."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.queue import Ticket, fits
from cluster.why.facts import ACTORS, TASKS, WAITS, Facts, Labels, NodeGroup, PlacementGroup, Resources

_DETECTED = ("memory", "object_store_memory")
"""What a node finds out itself. On premises a group states nothing at all."""


@dataclass(frozen=True)
class Wanted:
    """Something that waits for a place: one for each of its bundles, all at once."""

    what: str
    bundles: tuple[Resources, ...]
    selector: Labels = field(default_factory=dict)

    @property
    def much(self) -> str:
        """3 times 1 CPU."""
        kinds = {amounts(bundle): 0 for bundle in self.bundles}
        for bundle in self.bundles:
            kinds[amounts(bundle)] += 1
        return " and ".join(f"{count} times {each}" if count > 1 else each for each, count in kinds.items())

    def __str__(self) -> str:
        where = "".join(f", on a node with {name}={value}" for name, value in self.selector.items())
        return f"{self.what} asks for {self.much}{where}"


def amounts(resources: Resources) -> str:
    """2 CPU, 1 GPU: what a person would ask for."""
    shown = {name: value for name, value in resources.items() if not name.startswith(("node:", "object_store_memory"))}
    return ", ".join(f"{_amount(name, value)} {name}" for name, value in sorted(shown.items())) or "nothing"


def waiting(facts: Facts) -> list[Wanted]:
    """What the question is about and has no place, though what is free now would not do."""
    free = free_by_node(facts)
    return [wanted for wanted in _waiting(facts) if wanted.bundles and not _fits_now(wanted, facts, free)]


def placed_soon(facts: Facts) -> list[Wanted]:
    """What has no place yet, and needs no more than what is free: it is on its way."""
    free = free_by_node(facts)
    return [wanted for wanted in _waiting(facts) if not wanted.bundles or _fits_now(wanted, facts, free)]


def free_by_node(facts: Facts) -> dict[str, dict[str, float]]:
    """What each node has left, by its id."""
    free = {node.id: dict(node.total) for node in facts.nodes}
    for node, resources in holdings(facts):
        for name, amount in resources.items():
            if node in free:
                free[node][name] = free[node].get(name, 0.0) - amount
    return free


def holdings(facts: Facts) -> Iterator[tuple[str, Resources]]:
    """Who holds what, as (node, resources); what runs in a placement group holds nothing beside it."""
    for work in facts.works:
        if work.lives and not work.group:
            yield work.node, work.resources
    for group in facts.groups:
        if group.state == "CREATED":
            yield from zip(group.nodes, group.bundles, strict=False)


def is_fit(resources: Resources, place: Resources) -> bool:
    """Whether a place, when it is empty, takes what is asked for."""
    return all(place.get(name, 0.0) >= amount for name, amount in resources.items())


def matches(selector: Labels, labels: Labels) -> bool:
    """Ray's label selectors: `value`, `!value`, `in(a,b)`, `!in(a,b)`."""
    return all(_matches(wanted, labels.get(name)) for name, wanted in selector.items())


def able(wanted: Wanted, groups: Mapping[str, NodeGroup]) -> list[str]:
    """The groups of which a node takes each of its bundles."""
    return [
        name
        for name, group in groups.items()
        if group.most > 0
        and matches(wanted.selector, group.labels)
        and all(is_fit(bundle, _offered(group, bundle)) for bundle in wanted.bundles)
    ]


def counts(facts: Facts) -> dict[str, int]:
    """Nodes of each group: those that are there and those that have been asked for, and not refused."""
    scaler = facts.autoscaler
    found = {group: many for group, many in scaler.starting.items() if group not in scaler.failed} if scaler else {}
    for node in facts.nodes:
        if not node.is_head:
            found[node.group] = found.get(node.group, 0) + 1
    return found


def below_most(wanted: Wanted, facts: Facts) -> list[str]:
    """The groups that would do, and of which there may be more."""
    if facts.autoscaler is None:
        return []
    groups, there = facts.autoscaler.groups, counts(facts)
    return [name for name in able(wanted, groups) if there.get(name, 0) < groups[name].most]


def fits_at_most(wanted: Wanted, facts: Facts) -> bool:
    """Whether it would fit if nothing else ran and every group had all the nodes that it may have."""
    groups = facts.autoscaler.groups if facts.autoscaler else {}
    others = [node.total for node in facts.nodes if node.group not in groups and matches(wanted.selector, node.labels)]
    most = {name for bundle in wanted.bundles for name in bundle}
    more = [
        _offered(group, most)
        for group in groups.values()
        if matches(wanted.selector, group.labels)
        for _ in range(min(group.most, len(wanted.bundles)))
    ]
    return _all_fit(wanted.bundles, [*others, *more])


def knows_works(facts: Facts) -> bool:
    """Whether all actors and tasks are known: without, nothing can be said to hold nothing."""
    return not {ACTORS, TASKS} & set(facts.unread)


def unused(facts: Facts) -> list[PlacementGroup]:
    """Placement groups that hold resources and in which nothing runs or waits to."""
    inside = {work.group for work in facts.works if work.waits or work.lives}
    return [group for group in facts.groups if group.state == "CREATED" and group.id not in inside]


def fits_without(wanted: Wanted, groups: Sequence[PlacementGroup], facts: Facts) -> bool:
    """Whether it would fit now if these placement groups were removed."""
    free = free_by_node(facts)
    for group in groups:
        for node, resources in zip(group.nodes, group.bundles, strict=False):
            for name, amount in resources.items():
                if node in free:
                    free[node][name] = free[node].get(name, 0.0) + amount
    return _fits_now(wanted, facts, free)


def _waiting(facts: Facts) -> Iterator[Wanted]:
    for group in facts.groups:
        if group.state in WAITS and facts.is_asked(group.ray_id):
            bundles = (_sum(group.bundles),) if group.on_one_node else group.bundles
            yield Wanted(f"placement group {group.name or group.id[:8]}", bundles, group.selector)
    for work in facts.works:
        if work.waits and not work.group and facts.is_asked(work.ray_id):
            yield Wanted(str(work), (work.resources,), work.selector)


def _sum(bundles: Iterable[Resources]) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _offered(group: NodeGroup, names: Iterable[str]) -> dict[str, float]:
    """What a node of a group offers; enough of what the config leaves to the node to find out."""
    left = names if not group.resources else set(names) & set(_DETECTED) - set(group.resources)
    return {**dict.fromkeys(left, math.inf), **group.resources}


def _fits_now(wanted: Wanted, facts: Facts, free: Mapping[str, Resources]) -> bool:
    here = [free[node.id] for node in facts.nodes if matches(wanted.selector, node.labels)]
    return _all_fit(wanted.bundles, here)


def _all_fit(bundles: Sequence[Resources], places: Sequence[Resources]) -> bool:
    return fits([Ticket(str(number), "", 1, each) for number, each in enumerate(bundles)], places)


def _matches(wanted: str, has: str | None) -> bool:
    found = re.fullmatch(r"(!?)(?:in\((.*)\)|(.*))", wanted, re.DOTALL)
    assert found, "the last alternative takes anything"
    no, several, one = found.groups()
    values = [value.strip() for value in several.split(",")] if several is not None else [one]
    return (has in values) != bool(no)


def _amount(name: str, value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if name in _DETECTED else f"{value:g}"
