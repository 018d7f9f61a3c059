"""Rules: what configs/clusters/NAME.yaml says, beside what is there."""

from collections import Counter
from collections.abc import Iterator

from cluster.doctor import devices
from cluster.doctor.facts import Facts
from cluster.doctor.finding import Check, Finding, Level, Problem, fault, judged, warning
from cluster.doctor.report import Node
from cluster.launch.spec import NodeGroup, OnPremises
from cluster.place import ClusterConfig

GROUP_LABEL = "ray.io/node-group"
_GIB = 2**30
_ENOUGH = 0.97
"""A GPU gives a process somewhat less than what its name says."""


def nodes(facts: Facts) -> Iterator[Finding]:
    place = facts.place
    if place is None:
        yield Finding(Check.FILE, Level.NOT_CHECKED, "give the NAME of configs/clusters/NAME.yaml to compare it")
        return
    yield from _missing(facts, place)
    workers = [node for node in facts.answered if not node.is_head or node.resources.get("CPU")]
    yield from judged(Check.FILE, workers, lambda node: [*_group(node, place), *_worker(node, place)], "as it says")
    if place.accelerator == "gpu" and not any(node.resources.get("GPU") for node in workers):
        if place.autoscales:
            yield Finding(Check.FILE, Level.NOT_CHECKED, "no node with GPUs is up now; ask again while a job runs")
        else:
            seen = "accelerator: gpu, and no node offers one"
            yield Finding(Check.FILE, Level.FAULT, seen, "start Ray with --num-gpus, or write accelerator: cpu")


def _missing(facts: Facts, place: ClusterConfig) -> Iterator[Finding]:
    """Machines that should always be there, and are not."""
    provider = place.provider
    if isinstance(provider, OnPremises):
        there = {address for node in facts.nodes for address in (node.address, *_addresses(node))}
        gone = tuple(host for host in (provider.head, *provider.workers) if _is_number(host) and host not in there)
        if gone:
            fix = f"luthier cluster up {place.name}, and look at what it says of that machine"
            yield Finding(Check.FILE, Level.FAULT, "machines of the file that are not in the cluster", fix, gone)
        return
    if provider is None:
        return
    counts = Counter(node.labels.get(GROUP_LABEL) for node in facts.nodes)
    for name, group in provider.groups.items():
        if counts[name] < group.min:
            seen = f"group {name} has {counts[name]} nodes, and {group.min} are always wanted"
            yield Finding(Check.FILE, Level.WARNING, seen, "luthier why")
        elif counts[name] > group.max:
            fix = f"luthier cluster up {place.name}"
            yield Finding(Check.FILE, Level.WARNING, f"group {name} has {counts[name]} nodes of {group.max}", fix)


def _group(node: Node, place: ClusterConfig) -> Iterator[Problem]:
    """A node beside the group that it says it is of."""
    if place.provider is None or isinstance(place.provider, OnPremises) or node.is_head:
        return
    groups = place.provider.groups
    name = node.labels.get(GROUP_LABEL, "")
    group: NodeGroup | None = groups.get(name)
    if group is None:
        known = ", ".join(groups)
        seen = f"it is of group {name}, which the file does not have ({known})" if name else "it is of no group"
        yield warning(seen, f"luthier cluster up {place.name}, which makes the cluster what the file says")
        return
    for resource, wanted in (("CPU", group.cpus), ("GPU", group.gpus)):
        if node.resources.get(resource, 0) != wanted:
            seen = f"group {name} has {wanted} {resource} a node, this one {node.resources.get(resource, 0):g}"
            yield fault(seen, f"correct the group's type or its numbers, and luthier cluster up {place.name}")
    for gpu in sorted({gpu.name for gpu in _gpus(node)}):
        if group.gpu and group.gpu.split("-")[0].lower() not in gpu.lower():
            yield fault(f"group {name} is of {group.gpu}, this node has {gpu}", "correct the group's type or its gpu")


def _worker(node: Node, place: ClusterConfig) -> Iterator[Problem]:
    """Whether a worker has there what plans reckon with."""
    wanted = place.memory_gb_per_worker * _GIB
    if place.accelerator == "gpu":
        for gpu in sorted({(gpu.name, gpu.memory) for gpu in _gpus(node)}):
            if gpu[1] < wanted * _ENOUGH:
                yield fault(
                    f"{gpu[0]} has {gpu[1] / _GIB:.0f} GiB, and memory_gb_per_worker is {place.memory_gb_per_worker:g}",
                    "write what there is, so that plans are right",
                )
        if place.gpu:
            model = place.gpu.split("-")[0]
            for name in sorted({gpu.name for gpu in _gpus(node) if model.lower() not in gpu.name.lower()}):
                yield fault(
                    f"gpu: {place.gpu}, and this node has {name}", "name its type of configs/hardware/gpus.yaml"
                )
        return
    workers = int(node.resources.get("CPU", 0) // place.cpus_per_worker)
    if workers and node.said.memory and workers * wanted > node.said.memory:
        yield warning(
            f"it takes {workers} worker(s) of {place.memory_gb_per_worker:g} GiB, and has "
            f"{node.said.memory / _GIB:.0f} GiB",
            "lower memory_gb_per_worker, or raise cpus_per_worker so that fewer go onto one node",
        )


def _gpus(node: Node) -> tuple[devices.Gpu, ...]:
    return devices.parse(node.said.nvidia_smi).gpus if node.said.nvidia_smi else ()


def _addresses(node: Node) -> list[str]:
    return [each.address for each in node.report.interfaces if each.address] if node.report else []


def _is_number(host: str) -> bool:
    """Names are resolved elsewhere than here."""
    return host.replace(".", "").isdecimal() or ":" in host
