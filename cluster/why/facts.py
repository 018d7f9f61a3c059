"""What is known of a cluster at one moment: the ground that the rules reason on. Only shapes; `gather.py` fills them.

Whatever could not be read is empty here and named in `Facts.unread`, so that no rule has to ask whether it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.errors import PlanError
from cluster.records import ENDED, RunState

Resources = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU, memory (bytes), …"""

Labels = Mapping[str, str]
"""Of a node, or what is asked of one: a value, `!value`, `in(a,b)` or `!in(a,b)`."""

WAITS = ("PENDING_CREATION", "RESTARTING", "PENDING_NODE_ASSIGNMENT", "PENDING", "RESCHEDULING")
"""Ray's states of an actor, a task or a placement group that has no place yet."""

GROUPS_UNREAD = "the autoscaler's config"
"""In `Facts.unread` when what could come is not known."""

JOBS, ACTORS, TASKS, PLACEMENT_GROUPS, NODES = "jobs", "actors", "tasks", "placement groups", "nodes"
"""In `Facts.unread` when the list of these did not come: without any one of them nothing can be called well."""

SUPERVISOR = "JobSupervisor"
"""The class of Ray's actor that starts a job's driver, and asks for what the driver asks for."""

OVER = ("SUCCEEDED", "FAILED", "STOPPED")
"""Ray's states of a job that has ended."""


@dataclass(frozen=True)
class Job:
    """A job that was submitted (`id`), and the Ray job of its driver (`ray_id`), once that runs.

    `status` and `error` are Ray's words; `last_line` is the end of its log, read of the job that was asked for.
    """

    id: str
    ray_id: str = ""
    status: str = "RUNNING"
    message: str = ""
    error: str = ""
    last_line: str = ""


@dataclass(frozen=True)
class Work:
    """An actor or a task (`kind`).

    Attributes:
        ray_id: the Ray job that it is part of; of what waits to be a driver the submission id, of a replica its
            application.
        state: Ray's word.
        group: the placement group that it is in.
        is_busy: whether it computes now: a task that runs, an actor of which a method does.
        death: of one that has failed, why: Ray's message, or its type of error.
    """

    kind: Literal["actor", "task"]
    name: str
    state: str
    ray_id: str = ""
    node: str = ""
    group: str = ""
    resources: Resources = field(default_factory=dict)
    selector: Labels = field(default_factory=dict)
    is_busy: bool = False
    death: str = ""

    def __str__(self) -> str:
        """What a person knows it as."""
        return f"the driver of job {self.ray_id}" if self.name == SUPERVISOR else f"{self.kind} {self.name}"

    @property
    def waits(self) -> bool:
        """Whether it has no place yet."""
        return self.state in WAITS

    @property
    def lives(self) -> bool:
        """Whether it has its place."""
        return self.state in ("ALIVE", "RUNNING", "RUNNING_IN_RAY_GET", "RUNNING_IN_RAY_WAIT")


@dataclass(frozen=True)
class PlacementGroup:
    """Resources that are held together, or wait to be: one bundle for each place, on the node at the same index.

    `selector` is what all of its bundles ask of their nodes; `on_one_node` is known only while it waits.
    """

    id: str
    state: str
    name: str = ""
    ray_id: str = ""
    bundles: tuple[Resources, ...] = ()
    nodes: tuple[str, ...] = ()
    selector: Labels = field(default_factory=dict)
    on_one_node: bool = False


@dataclass(frozen=True)
class Node:
    """A Ray node that lives.

    Attributes:
        group: the kind of node that the autoscaler knows it as.
        disk: the part that is used of the disk with its temporary folder, 0 to 1.
        pinned_bytes: what its object store holds because somebody still refers to it.
    """

    id: str
    is_head: bool = False
    group: str = ""
    total: Resources = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)
    disk: float = 0.0
    pinned_bytes: int = 0

    def __str__(self) -> str:
        return self.id[:8]


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind that the autoscaler may start."""

    resources: Resources
    most: int
    labels: Labels = field(default_factory=dict)


@dataclass(frozen=True)
class Autoscaler:
    """Ray's autoscaler, as far as the dashboard shows it.

    Attributes:
        groups: what it may start; empty where that could not be read.
        starting: nodes that have been asked for and are not there yet, by group.
        failed: why the last launch of a group failed, until one succeeds.
        is_alive: whether it still reports; None when that is not known.
        error: what it wrote as its end.
    """

    groups: Mapping[str, NodeGroup] = field(default_factory=dict)
    starting: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    is_alive: bool | None = None
    error: str = ""


@dataclass(frozen=True)
class Application:
    """What Serve runs under one name.

    Attributes:
        status: Serve's word.
        reason: what stopped it, or one of its replicas, at its end the error; empty when nothing did.
        asleep: its deployments that have been scaled to zero.
        missing: why a pinned adapter is not there, by its name.
    """

    name: str
    status: str
    reason: str = ""
    asleep: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run as the store has it: its state, the last thing that was told of it, and the last step it did."""

    id: str
    state: RunState
    told: str = ""
    step: int | None = None

    def __str__(self) -> str:
        """Is running at step 3: the last that was told."""
        at = f" at step {self.step}" if self.step is not None else ""
        return f"{'has' if self.state in ENDED else 'is'} {self.state}{at}: {self.told}"


@dataclass(frozen=True)
class Facts:
    """A cluster at one moment.

    Attributes:
        refused: why the cluster could not be looked at; everything else is empty then.
        asked: the Ray ids and submission ids of the jobs, or the application, that the question is about; None: all.
        unread: what did not answer.
    """

    refused: PlanError | None = None
    asked: frozenset[str] | None = None
    run: Run | None = None
    jobs: tuple[Job, ...] = ()
    works: tuple[Work, ...] = ()
    groups: tuple[PlacementGroup, ...] = ()
    nodes: tuple[Node, ...] = ()
    autoscaler: Autoscaler | None = None
    applications: tuple[Application, ...] = ()
    unread: tuple[str, ...] = ()

    def is_asked(self, *ids: str) -> bool:
        """Whether the question is about what has one of these ids."""
        return self.asked is None or any(each in self.asked for each in ids if each)

    def job_name(self, ray_id: str) -> str:
        """What a person knows the job as."""
        return next((job.id for job in self.jobs if ray_id in (job.ray_id, job.id)), ray_id)
