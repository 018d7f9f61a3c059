"""Rules: from node to node, where a training step waits for the slowest."""

from collections import Counter
from collections.abc import Iterator

from cluster.doctor.facts import Facts
from cluster.doctor.finding import Check, Finding, Level, Problem, fault, judged, warning
from cluster.doctor.report import Interface, Node

_SLOW_BITS = 0.9e9
"""Less than what a network of 1 Gbit/s gives to one stream."""

_FAR_S = 0.005
"""A round trip that no one data centre has."""

_OPEN = "let the cluster's nodes reach each other on all ports: security group, firewall or network policy"


def links(facts: Facts) -> Iterator[Finding]:
    """All pairs for the round trip, a ring for the speed."""
    assert facts.visit is not None
    found = facts.visit.links
    if len(facts.answered) < 2:
        if len(facts.nodes) == 1:
            yield Finding(Check.LINKS, Level.OK, "one node")
        return
    machine = {node.id: node.said.machine for node in facts.answered}
    problems = Counter[Problem]()
    named: dict[Problem, list[str]] = {}
    for link in found:
        way = f"{facts.name(link.source)} → {facts.name(link.target)}"
        is_between_machines = machine[link.source] != machine[link.target]
        problem = None
        if link.error:
            problem = fault("cannot be connected: NCCL, gloo and Ray need any port", _OPEN)
            way = f"{way} at {link.error}"
        elif is_between_machines and link.round_trip_s and link.round_trip_s > _FAR_S:
            near = "put the nodes into one zone or placement group"
            problem = warning(f"the round trip takes more than {_FAR_S * 1000:.0f} ms", near)
            way = f"{way} {link.round_trip_s * 1000:.1f} ms"
        elif is_between_machines and link.bits_per_s is not None and link.bits_per_s < _SLOW_BITS:
            problem = warning("one stream has less than 1 Gbit/s", "faster machines, or ZeRO stage 1 and LoRA")
            way = f"{way} {link.bits_per_s / 1e9:.2f} Gbit/s"
        if problem:
            problems[problem] += 1
            named.setdefault(problem, []).append(way)
    for problem in problems:
        yield Finding(Check.LINKS, problem.level, problem.seen, problem.fix, tuple(named[problem]))
    expected = len(facts.answered) * (len(facts.answered) - 1)
    if len(found) < expected:
        yield Finding(Check.LINKS, Level.NOT_CHECKED, f"{expected - len(found)} of {expected} ways gave no answer")
    if found and not problems:
        trip = max((link.round_trip_s or 0.0 for link in found), default=0.0) * 1000
        speeds = [link.bits_per_s for link in found if link.bits_per_s is not None]
        slowest = f"; slowest of {len(speeds)} streams {min(speeds) / 1e9:.1f} Gbit/s" if speeds else ""
        where = " (one machine)" if facts.is_one_machine else ""
        seen = f"{len(found)} ways, longest round trip {trip:.2f} ms{slowest}{where}"
        yield Finding(Check.LINKS, Level.OK, seen)


def mtu(facts: Facts) -> Iterator[Finding]:
    """Where it differs, small messages come through and large ones hang."""
    known = {str(node): each.mtu for node in facts.answered if (each := _own_interface(node))}
    if len(set(known.values())) > 1:
        usual = Counter(known.values()).most_common(1)[0][0]
        others = tuple(f"{name}: {size}" for name, size in known.items() if size != usual)
        fix = f"set the same on all (`ip link set dev IF mtu {usual}`)"
        yield Finding(Check.MTU, Level.FAULT, f"nodes have different MTUs, most {usual}", fix, others)
    elif known:
        yield Finding(Check.MTU, Level.OK, f"{next(iter(known.values()))} on all nodes")
    unknown = tuple(str(node) for node in facts.answered if not _own_interface(node))
    if unknown:
        yield Finding(Check.MTU, Level.NOT_CHECKED, "no interface has the node's address", nodes=unknown)


def nccl(facts: Facts) -> Iterator[Finding]:
    """Variables that name what is not there: NCCL and gloo then hang or fail at their first collective."""

    def judge(node: Node) -> Iterator[Problem]:
        said = node.said
        names = [each.name for each in said.interfaces]
        for variable, is_exact in (("NCCL_SOCKET_IFNAME", False), ("GLOO_SOCKET_IFNAME", True)):
            wanted = said.variables.get(variable)
            if wanted and not _matching(wanted, names, is_exact):
                yield fault(
                    f"{variable}={wanted}, and there is no such interface (there are {', '.join(names)})",
                    f"unset {variable}, or name one of those, where Ray is started",
                )
        adapters = [port.device for port in said.rdma]
        wanted = said.variables.get("NCCL_IB_HCA")
        if wanted and not _matching(wanted, adapters, is_exact=False):
            seen = f"NCCL_IB_HCA={wanted}, and there is no such adapter (there are {', '.join(adapters) or 'none'})"
            yield fault(seen, "unset NCCL_IB_HCA, or name one of those, where Ray is started")
        if said.variables.get("NCCL_IB_DISABLE") == "1" and any(port.state == "ACTIVE" for port in said.rdma):
            yield warning("NCCL_IB_DISABLE=1, and there is InfiniBand that works", "unset NCCL_IB_DISABLE")

    yield from judged(Check.NCCL, facts.answered, judge, "none of its variables names what is not there")


def rdma(facts: Facts) -> Iterator[Finding]:
    with_adapters = [node for node in facts.answered if node.said.rdma]
    if not with_adapters:
        yield Finding(Check.RDMA, Level.OK, "no node has any; collectives go over TCP")
        return

    def judge(node: Node) -> Iterator[Problem]:
        down = [port for port in node.said.rdma if port.state != "ACTIVE"]
        if len(down) == len(node.said.rdma):
            yield fault(
                f"no port is active ({down[0].device} is {down[0].state})", "look at cables, switch and subnet manager"
            )
        elif down:
            names = ", ".join(f"{port.device} is {port.state}" for port in down)
            yield warning(names, "look at its cable and switch, or leave it out by NCCL_IB_HCA")
        if not node.said.has_verbs:
            yield warning(
                "the kernel has adapters, and there is no /dev/infiniband: NCCL goes over TCP",
                "give the container the devices (--device=/dev/infiniband, or the device plugin)",
            )
        elif node.said.locked_memory is not None:
            limit = f"at most {node.said.locked_memory >> 10} KiB may be pinned, and RDMA pins all of its buffers"
            yield warning(limit, "start Ray with `ulimit -l unlimited` (--ulimit memlock=-1 for a container)")

    numbers = {len([port for port in node.said.rdma if port.state == "ACTIVE"]) for node in with_adapters}
    workers = [node for node in facts.answered if node.resources.get("GPU")]
    without = tuple(str(node) for node in workers if not node.said.rdma)
    if without or len(numbers) > 1:
        seen = (
            "some nodes have fewer active adapters than others, so that a ring over all of them takes the slowest way"
        )
        yield Finding(Check.RDMA, Level.WARNING, seen, "one machine type for one training group", without)
    rates = sorted({port.rate for node in with_adapters for port in node.said.rdma if port.state == "ACTIVE"})
    fine = f"{', '.join(map(str, sorted(numbers)))} active port(s) a node, {', '.join(rates)}"
    yield from judged(Check.RDMA, with_adapters, judge, fine)


def _own_interface(node: Node) -> Interface | None:
    return next((each for each in node.said.interfaces if each.address == node.address), None)


def _matching(wanted: str, names: list[str], is_exact: bool) -> list[str]:
    """As NCCL reads it: prefixes, `=` before exact names, `^` before those to leave out; a port behind a colon."""
    leaves_out = wanted.startswith("^")
    wanted = wanted.removeprefix("^")
    exact = is_exact or wanted.startswith("=")
    listed = [each.split(":")[0] for each in wanted.removeprefix("=").split(",") if each]

    def is_named(name: str) -> bool:
        return name in listed if exact else any(name.startswith(each) for each in listed)

    return [name for name in names if is_named(name) != leaves_out]
