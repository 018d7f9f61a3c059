"""What a check may say, and how what holds for many nodes is said once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.doctor.report import Node


class Level(StrEnum):
    """How bad it is. A fault breaks jobs, or a promise of safety; a warning may."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"
    NOT_CHECKED = "not checked"


class Check(StrEnum):
    """What is looked at, as `group: check`."""

    ANSWER = "closed: dashboard answers"
    TOKEN = "closed: token asked for"
    TOKEN_FILE = "closed: token files"
    DASHBOARD = "closed: dashboard on loopback"
    PORTS = "closed: open ports"
    RIGHTS = "closed: rights"
    HEAD = "closed: head without work"
    USAGE = "closed: usage statistics"
    RAY = "versions: Ray and Python"
    PACKAGES = "versions: packages"
    IMAGE = "versions: image"
    NODES = "machines: nodes answer"
    CLOCKS = "machines: clocks"
    DISK = "machines: disk"
    SHARED_MEMORY = "machines: shared memory"
    MEMORY = "machines: memory"
    GPUS = "machines: GPUs"
    STORE = "store: create, read, list, delete"
    SHARED = "store: one for all nodes"
    LINKS = "fabric: node to node"
    MTU = "fabric: MTU"
    NCCL = "fabric: NCCL's settings"
    RDMA = "fabric: InfiniBand and EFA"
    FILE = "file: nodes as described"

    @property
    def group(self) -> str:
        return self.partition(": ")[0]

    @property
    def subject(self) -> str:
        return self.partition(": ")[2]


@dataclass(frozen=True)
class Finding:
    """One answer. `nodes` are those it holds for, as people name them; `fix` is empty where nothing is to be done."""

    check: Check
    level: Level
    seen: str
    fix: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What a rule has against a node."""

    level: Level
    seen: str
    fix: str


def fault(seen: str, fix: str) -> Problem:
    return Problem(Level.FAULT, seen, fix)


def warning(seen: str, fix: str) -> Problem:
    return Problem(Level.WARNING, seen, fix)


def judged(
    check: Check,
    nodes: Sequence[Node],
    judge: Callable[[Node], Iterable[Problem]],
    fine: str | Callable[[Sequence[Node]], str],
) -> Iterator[Finding]:
    """A finding for each different problem, with the nodes that have it; and one for the nodes that have none.

    Args:
        fine: what is said of those that have none.
    """
    found: dict[Problem, list[str]] = {}
    well = []
    for node in nodes:
        problems = list(judge(node))
        for problem in problems:
            found.setdefault(problem, []).append(str(node))
        if not problems:
            well.append(node)
    for problem, names in found.items():
        yield Finding(check, problem.level, problem.seen, problem.fix, tuple(names))
    if well:
        seen = fine if isinstance(fine, str) else fine(well)
        yield Finding(check, Level.OK, seen, nodes=tuple(map(str, well)))
