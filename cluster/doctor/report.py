"""What the nodes say, as the job brings it back: the greater part of Facts.

It comes as JSON from `probe.py`; no value of a secret is ever in it. Standard library alone, because
nodes import it. Bytes and seconds throughout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Literal

MARK = "LUTHIER-DOCTOR "
"""What the line of the job's log begins with that holds a Visit."""


@dataclass(frozen=True)
class Socket:
    """A port that one of Ray's own processes listens on.

    Attributes:
        process: gcs, raylet, dashboard, agent, environment agent, client server, monitor.
        answers: what it says to somebody without a token. `metrics`: Prometheus' text, which Ray gives to anybody.
    """

    process: str
    address: str
    port: int
    answers: Literal["refuses", "open", "metrics", "unknown"]

    @property
    def is_loopback(self) -> bool:
        return ip_address(self.address).is_loopback

    def __str__(self) -> str:
        return f"{self.process} on {self.address}:{self.port}"


@dataclass(frozen=True)
class TokenFile:
    """The file that RAY_AUTH_TOKEN_PATH names, or Ray's own. `mode` is None when it is not there."""

    path: str
    mode: int | None = None
    owner: int | None = None


@dataclass(frozen=True)
class Disk:
    """The file system below a folder that is written to."""

    what: str
    path: str
    total: int
    free: int


@dataclass(frozen=True)
class Interface:
    """A network interface; `address` is its IPv4 address, if it has one."""

    name: str
    mtu: int
    is_up: bool
    address: str = ""


@dataclass(frozen=True)
class RdmaPort:
    """A port below /sys/class/infiniband, with the kernel's words."""

    device: str
    state: str
    rate: str = ""


@dataclass(frozen=True)
class Report:
    """What a node says of itself.

    Attributes:
        machine: the same on all nodes of one machine, and here if this is that machine.
        user: the id of the user that Ray runs as.
        capabilities: the kernel's mask of what it may do beyond others.
        variables: of Ray's environment, those that `probe.VARIABLES` names.
        has_token_variable: whether the token is in the environment, where no file is needed.
        usage_stats: whether Ray reports to its makers; only the head's counts.
        packages: versions of what is installed.
        nvidia_smi: what it printed; None where there is none.
        memory: of the machine or its container; and what of it is free for use.
        locked_memory: what may be pinned for RDMA; None: any amount.
        failed: what could not be read, and why.
    """

    machine: str = ""
    user: int = 0
    capabilities: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)
    has_token_variable: bool = False
    token_file: TokenFile = field(default_factory=lambda: TokenFile(""))
    usage_stats: bool = False
    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    sockets: tuple[Socket, ...] = ()
    disks: tuple[Disk, ...] = ()
    shared_memory: int = 0
    memory: int = 0
    memory_free: int = 0
    nvidia_smi: str | None = None
    interfaces: tuple[Interface, ...] = ()
    rdma: tuple[RdmaPort, ...] = ()
    has_verbs: bool = False
    locked_memory: int | None = None
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreReport:
    """What a node could do in the store.

    Attributes:
        done: the operations that succeeded, with their seconds, in their order.
        error: why the next one did not; empty when all did.
        error_class: its name in cluster/errors.py.
        unseen: the nodes whose object it does not find there.
    """

    done: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    error_class: str = ""
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """A Ray node that lives, and what it said.

    Attributes:
        problem: why it said nothing.
        clock_s: how far its clock is ahead of the driver's, and how wrong that may be.
    """

    id: str
    address: str = ""
    is_head: bool = False
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    report: Report | None = None
    problem: str = ""
    clock_s: float | None = None
    clock_error_s: float = 0.0
    store: StoreReport | None = None

    @property
    def said(self) -> Report:
        """Its report; rules ask it of `Facts.answered` alone."""
        assert self.report is not None
        return self.report

    def __str__(self) -> str:
        return "head" if self.is_head else f"{self.id[:8]} ({self.address})"


@dataclass(frozen=True)
class Link:
    """The way from one node to another, by their ids.

    Attributes:
        round_trip_s: the shortest of some; None when it could not be connected.
        bits_per_s: of one TCP stream, a lower bound; None where it was not measured.
    """

    source: str
    target: str
    round_trip_s: float | None = None
    bits_per_s: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Visit:
    """What the job found on all nodes."""

    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()
