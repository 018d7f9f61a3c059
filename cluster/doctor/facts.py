"""What is known of a cluster at one moment: the ground that the rules reason on. `gather.py` fills it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.doctor.report import Node, TokenFile, Visit
from cluster.errors import PlanError
from cluster.place import ClusterConfig


@dataclass(frozen=True)
class Here:
    """This machine, and the checkout that luthier runs from.

    Attributes:
        python: major.minor.
        locked: the version of each package in requirements.lock.
        ranges: what pyproject.toml takes of it, as pip writes it.
        token_file: what this machine speaks to the cluster with; None where that is no file.
        machine: as `Report.machine`.
    """

    ray: str
    python: str
    luthier: str
    locked: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, str] = field(default_factory=dict)
    token_file: TokenFile | None = None
    user: int = 0
    machine: str = ""


@dataclass(frozen=True)
class Facts:
    """A cluster at one moment.

    Attributes:
        address: of the dashboard, as it is reached from here.
        refused: why the cluster could not be asked; everything else is empty then.
        without_token: the status of a request for the list of jobs that has no token; None: no answer.
        with_wrong_token: the same with a token that nobody gave out.
        ray: the cluster's version.
        visit: what the job found; None where it could not be done, for the reason in `no_visit`.
        reached: ports of a node's address that take a connection from here, without the tunnel; by address.
        place: what configs/clusters/NAME.yaml says, where a name was given.
        store: its address; None where it was not asked about.
    """

    address: str
    here: Here
    refused: PlanError | None = None
    without_token: int | None = None
    with_wrong_token: int | None = None
    ray: str = ""
    python: str = ""
    visit: Visit | None = None
    no_visit: str = ""
    reached: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    place: ClusterConfig | None = None
    store: str | None = None

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that live."""
        return self.visit.nodes if self.visit else ()

    @property
    def answered(self) -> list[Node]:
        """Those that have a report."""
        return [node for node in self.nodes if node.report]

    @property
    def head(self) -> Node | None:
        return next((node for node in self.answered if node.is_head), None)

    @property
    def is_one_machine(self) -> bool:
        """Whether all nodes run on one, as they do in a cluster that one tries things with."""
        return len({node.said.machine for node in self.answered}) == 1

    def name(self, node: str) -> str:
        """What a person knows a node as, by its id."""
        return next((str(each) for each in self.nodes if each.id == node), node[:8])
