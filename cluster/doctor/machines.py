"""Rules: whether nodes answer, and have what they say they have: clocks, disk, memory, GPUs."""

from collections.abc import Iterator, Sequence

from cluster.doctor import devices
from cluster.doctor.devices import Gpu
from cluster.doctor.facts import Facts
from cluster.doctor.finding import Check, Finding, Level, Problem, fault, judged, warning
from cluster.doctor.report import Node

CLOCK_WARNING_S = 2.0
CLOCK_FAULT_S = 900.0
"""S3 refuses a request that is further off (RequestTimeTooSkewed)."""

DISK_FULL = 0.95
"""Ray puts nothing on a node above it (local_fs_capacity_threshold)."""

_DISK_WARNING = 0.85
_MEMORY_FULL = 0.95
"""Ray kills workers above it (RAY_memory_usage_threshold)."""

_GIB = 2**30


def nodes(facts: Facts) -> Iterator[Finding]:
    if facts.visit is None:
        fix = "`luthier why` says what a job waits for; a head needs no CPU for this one, and `python` on its PATH"
        yield Finding(Check.NODES, Level.FAULT, f"the job with the probe did not come back: {facts.no_visit}", fix)
    for node in facts.nodes:
        if node.problem:
            fix = "look at it in the dashboard; end it, and let another come, if it does not answer again"
            yield Finding(Check.NODES, Level.FAULT, node.problem, fix, (str(node),))
        if node.report and node.report.failed:
            seen = f"could not be read: {'; '.join(node.report.failed)}"
            yield Finding(Check.NODES, Level.NOT_CHECKED, seen, nodes=(str(node),))
    well = tuple(str(node) for node in facts.nodes if not node.problem)
    if well:
        yield Finding(Check.NODES, Level.OK, "the probe ran, and answered", nodes=well)


def clocks(facts: Facts) -> Iterator[Finding]:
    """Against the driver's, no more than the measurement proves."""

    def judge(node: Node) -> Iterator[Problem]:
        assert node.clock_s is not None
        at_least = abs(node.clock_s) - node.clock_error_s
        seen = f"{abs(node.clock_s):.1f} s {'ahead of' if node.clock_s > 0 else 'behind'} the driver's"
        if at_least > CLOCK_FAULT_S:
            yield fault(f"{seen}; S3 refuses what is 15 minutes off", "run chrony or systemd-timesyncd on the node")
        elif at_least > CLOCK_WARNING_S:
            yield warning(seen, "run chrony or systemd-timesyncd on the node")

    known = [node for node in facts.answered if node.clock_s is not None]
    yield from judged(Check.CLOCKS, known, judge, _within)


def disk(facts: Facts) -> Iterator[Finding]:
    def judge(node: Node) -> Iterator[Problem]:
        for each in node.said.disks:
            used = 1 - each.free / each.total if each.total else 1.0
            seen = f"{each.what}, {each.path}: {used:.0%} full, {each.free / _GIB:.1f} GiB left"
            free = "free space there, or give it a larger disk"
            if used > DISK_FULL:
                yield fault(f"{seen}; Ray puts nothing on a node above {DISK_FULL:.0%}", free)
            elif used > _DISK_WARNING:
                yield warning(seen, free)

    yield from judged(Check.DISK, facts.answered, judge, _left)


def shared_memory(facts: Facts) -> Iterator[Finding]:
    """Ray's object store lies in it, and NCCL's and the data loaders' buffers."""

    def judge(node: Node) -> Iterator[Problem]:
        wanted = node.resources.get("object_store_memory", 0.0)
        if node.said.shared_memory < wanted:
            yield warning(
                f"it has {node.said.shared_memory / _GIB:.2f} GiB, Ray's object store {wanted / _GIB:.2f}, which is "
                "on the disk instead",
                "start the container with a larger --shm-size, or an emptyDir of medium Memory at /dev/shm",
            )

    yield from judged(Check.SHARED_MEMORY, facts.answered, judge, "Ray's object store is in memory")


def memory(facts: Facts) -> Iterator[Finding]:
    def judge(node: Node) -> Iterator[Problem]:
        used = 1 - node.said.memory_free / node.said.memory if node.said.memory else 0.0
        offered = node.resources.get("memory", 0.0)
        if used > _MEMORY_FULL:
            yield fault(
                f"{used:.0%} of {node.said.memory / _GIB:.1f} GiB in use; Ray ends workers above {_MEMORY_FULL:.0%}",
                "end what uses it, or give the node more",
            )
        if node.said.memory and offered > node.said.memory:
            yield fault(
                f"Ray offers {offered / _GIB:.1f} GiB, and there are {node.said.memory / _GIB:.1f}",
                "start Ray without --memory, or with the container's limit",
            )

    yield from judged(
        Check.MEMORY,
        facts.answered,
        judge,
        lambda well: f"{min(node.said.memory_free for node in well) / _GIB:.1f} GiB or more free",
    )


def gpus(facts: Facts) -> Iterator[Finding]:
    """What Ray promises of GPUs beside what the driver says."""

    def judge(node: Node) -> Iterator[Problem]:
        promised = int(node.resources.get("GPU", 0))
        if node.said.nvidia_smi is None:
            if promised:
                yield fault(
                    f"Ray offers {promised} GPU, and there is no nvidia-smi",
                    "install the driver; in a container NVIDIA_DRIVER_CAPABILITIES=compute,utility and --gpus=all",
                )
            return
        found = devices.parse(node.said.nvidia_smi)
        if found.error:
            if promised or not node.is_head:
                yield fault(f"nvidia-smi: {found.error}", "install the driver anew, or start the machine anew")
            return
        if promised > len(found.gpus) and not any(gpu.is_partitioned for gpu in found.gpus):
            yield fault(
                f"Ray offers {promised} GPU, and nvidia-smi shows {len(found.gpus)}",
                "one has fallen off the bus (`dmesg | grep Xid`) or is hidden: start the node anew, or replace it",
            )
        elif promised < len(found.gpus) and not node.is_head:
            yield warning(
                f"Ray offers {promised} of {len(found.gpus)} GPUs",
                "start it with --num-gpus, and without a CUDA_VISIBLE_DEVICES that hides them",
            )
        for index, gpu in enumerate(found.gpus):
            yield from _of_one(index, gpu)

    with_gpus = [node for node in facts.answered if node.resources.get("GPU") or node.said.nvidia_smi is not None]
    if not with_gpus:
        yield Finding(Check.GPUS, Level.OK, "no node has or offers one")
        return
    yield from judged(Check.GPUS, with_gpus, judge, _kinds)
    drivers = _drivers(with_gpus)
    if len(drivers) > 1:
        seen = f"nodes have the drivers {', '.join(drivers)}"
        yield Finding(Check.GPUS, Level.WARNING, seen, "one image or one driver package for all GPU nodes")


def _kinds(nodes: Sequence[Node]) -> str:
    kinds = sorted({gpu.name for node in nodes for gpu in devices.parse(node.said.nvidia_smi or "").gpus})
    return f"{', '.join(kinds) or 'none'}, driver {', '.join(_drivers(nodes))}"


def _drivers(nodes: Sequence[Node]) -> list[str]:
    return sorted({devices.parse(node.said.nvidia_smi or "").driver for node in nodes} - {""})


def _within(nodes: Sequence[Node]) -> str:
    most = max(abs(node.clock_s or 0.0) + node.clock_error_s for node in nodes)
    return f"within {most * 1000:.0f} ms of the driver's"


def _left(nodes: Sequence[Node]) -> str:
    least = min((each.free for node in nodes for each in node.said.disks), default=0)
    return f"{least / _GIB:.0f} GiB or more left"


def _of_one(index: int, gpu: Gpu) -> Iterator[Problem]:
    which = f"GPU {index} ({gpu.name})"
    replace = (
        "drain the node (`ray drain-node`), reset the GPU or start the machine anew; replace it if that comes back"
    )
    if gpu.uncorrected:
        yield fault(f"{which}: {gpu.uncorrected} uncorrected memory error(s) since the driver was loaded", replace)
    if gpu.remapping_failed:
        yield fault(f"{which}: a broken row of its memory cannot be replaced", "replace the GPU")
    if gpu.needs_reset or gpu.is_remapping:
        yield fault(f"{which}: it waits for a reset", replace)
    if gpu.fabric and not gpu.fabric.startswith("Completed"):
        yield fault(f"{which}: NVSwitch fabric is {gpu.fabric}", "start nvidia-fabricmanager, of the driver's version")
    if gpu.slowed_by:
        yield warning(
            f"{which}: slowed by {', '.join(gpu.slowed_by)}", "look at its cooling and power supply (`nvidia-smi -q`)"
        )
    if not gpu.is_persistent:
        yield warning(f"{which}: persistence mode is off, each start waits for the driver", "nvidia-smi -pm 1")
