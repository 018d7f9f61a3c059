"""The `provider` section of `configs/clusters/NAME.yaml`: what `luthier cluster up` makes the cluster of.

    provider:
      kind: aws
      image: registry.example/luthier@sha256:…
      groups:
        h100-spot: {type: p5.48xlarge, market: spot, max: 2, cpus: 192, gpus: 8, gpu: H100}

What is dangerous when it is guessed has no default: networks, identities, images. Nothing here opens an address
range, and no field holds a secret.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.config import Config

MARKET = "ray.io/market-type"
"""Ray's own label for it; a job that accepts spot nodes says `label_selector={"ray.io/market-type": "spot"}`."""

ACCELERATOR = "ray.io/accelerator-type"
"""Ray's own label for the type of a node's GPUs, by the names of `ray.util.accelerators`."""

_LABEL = re.compile(r"(?:[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_DIGEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]*@sha256:[0-9a-f]{64}")


def _pinned(image: str) -> str:
    if not _DIGEST.fullmatch(image):
        raise ValueError(
            f"{image!r} is not pinned; a tag can move under a running cluster: write NAME@sha256:DIGEST "
            "(docker inspect --format '{{index .RepoDigests 0}}' IMAGE shows it)"
        )
    return image


def plain_name(name: str) -> str:
    """The name, when it can be one of a cluster or a group. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r}: use at most 40 small letters, digits and dashes, beginning with a letter")
    return name


def _group_name(name: str) -> str:
    if name in ("head", "headgroup"):
        raise ValueError(f"{name!r} is what Ray and KubeRay call the head; give the group another name")
    return plain_name(name)


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not _LABEL.fullmatch(key) or not _LABEL.fullmatch(value) or "/" in value:
            raise ValueError(f"{key}: {value} is not a Kubernetes label")
    return labels


def _own_labels(labels: dict[str, str]) -> dict[str, str]:
    for key in labels:
        if key.startswith("ray.io/"):
            raise ValueError(f"{key}: labels under ray.io/ are set from market and gpu")
    return labels


# What becomes part of a path or a command is held to plain characters.
Image = Annotated[str, AfterValidator(_pinned)]
Name = Annotated[str, AfterValidator(plain_name)]
GroupName = Annotated[str, AfterValidator(_group_name)]
Labels = Annotated[dict[str, str], AfterValidator(_labels)]
NodeLabels = Annotated[Labels, AfterValidator(_own_labels)]
Way = Annotated[str, Field(pattern=r"^(cloud|direct|[A-Za-z0-9_][A-Za-z0-9_.-]*@[A-Za-z0-9][A-Za-z0-9.:-]*)$")]
Plain = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:-]*$")]


class NodeGroup(Config):
    """Worker nodes of one shape, from `min` to `max` of them."""

    min: NonNegativeInt = Field(0, description="nodes kept even when idle")
    max: PositiveInt = Field(description="nodes at most")
    market: Literal["on-demand", "spot"] = Field("on-demand", description="spot nodes cost less and may be taken away")
    cpus: PositiveInt = Field(description="CPUs that a node offers to Ray")
    gpus: NonNegativeInt = Field(0, description="GPUs of a node")
    gpu: str | None = Field(None, description="their type, as Ray names it: H100, A100, L4, …")
    labels: NodeLabels = Field({}, description="further node labels, for a job's label selectors")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        if bool(self.gpus) != bool(self.gpu):
            raise ValueError("gpus and gpu go together: how many a node has, and of which type")
        return self

    @property
    def node_labels(self) -> Labels:
        """What a job's label selector can ask for."""
        accelerator = {ACCELERATOR: self.gpu} if self.gpu else {}
        return {MARKET: self.market, **accelerator, **self.labels}

    @property
    def priority(self) -> int:
        """Where a job takes either, spot nodes come first."""
        return 1 if self.market == "spot" else 0


class MachineGroup(NodeGroup):
    """Worker machines of one type of a cloud."""

    type: str = Field(description="the cloud's name of the machine type")
    disk_gb: PositiveInt = Field(200, description="size of the root disk, which is encrypted; models are cached on it")


class Head(Config):
    """The head's machine. It runs no work, so that no job can take it down."""

    type: str
    disk_gb: PositiveInt = 100


class Access(Config):
    """How the machines are reached over SSH. None needs a public address."""

    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]*$")] = "ubuntu"
    private_key: str = Field(description="file of the private key on this machine")
    via: Way = Field(
        "cloud",
        description="`cloud`: the cloud's own tunnel (AWS Session Manager, Google's IAP); `direct`: this machine is in "
        "the network; or user@host: a jump host",
    )


_ENVIRONMENT_FILE = Field(
    None, description="file of NAME=value lines that Ray is started with on every node; it travels as a file"
)


class _Provider(Config):
    """What every provider has."""

    usage_stats: bool = Field(False, description="let Ray send usage statistics to its makers")


class _InContainers(_Provider):
    """Nodes that come and go, and all run one image."""

    image: Image = Field(description="what every node runs; made with the container file")
    base_image: Image | None = Field(
        None, description="what the container file starts from: a Python image for Debian, of your own Python version"
    )
    idle_minutes: PositiveFloat = Field(5.0, description="an idle worker is removed after it")


class _Machines(_InContainers):
    """Machines of a cloud, started by Ray's cluster launcher."""

    head: Head
    groups: dict[GroupName, MachineGroup] = Field(min_length=1)
    access: Access
    environment_file: str | None = _ENVIRONMENT_FILE
    prepare: tuple[str, ...] = Field(
        (), description="commands on each new machine before its image is pulled, for example to log in to a registry"
    )


class Aws(_Machines):
    """Amazon Web Services."""

    kind: Literal["aws"]
    region: Plain
    ami: Annotated[str, Field(pattern=r"^ami-[0-9a-f]{8,17}$")] = Field(description="with Docker and GPU drivers")
    subnets: tuple[str, ...] = Field(min_length=1, description="private ones, with a way out")
    security_groups: tuple[str, ...] = Field(min_length=1, description="that let in nothing but themselves")
    key_name: str = Field(description="EC2's name of access.private_key")
    head_profile: str = Field(description="instance profile of the head, with the rights of iam-head.json")
    worker_profile: str = Field(description="instance profile of the workers: what your jobs may reach")


class Gcp(_Machines):
    """Google Cloud."""

    kind: Literal["gcp"]
    project: Plain
    zone: Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+-[a-z]$")]
    disk_image: Annotated[str, Field(pattern=r"^projects/[^/]+/global/images/[^/]+$")] = Field(
        description="one image with Docker and GPU drivers, not a family, which moves"
    )
    subnetwork: str = Field(description="projects/P/regions/R/subnetworks/S, with a way out (Cloud NAT)")
    public_key: str = Field(description="the line of the public key of access.private_key")
    head_account: str = Field(description="service account of the head, with the rights of gcp-head-role.yaml")
    worker_account: str = Field(description="service account of the workers: what your jobs may reach")


class Azure(_Machines):
    """Microsoft Azure."""

    kind: Literal["azure"]
    subscription: str
    resource_group: str
    location: str
    disk_image: str = Field(description="resource id of one version of an image with Docker and GPU drivers")
    subnet: str = Field(description="resource id of a subnet with a way out")
    network_security_group: str = Field(description="resource id of one that lets in nothing but its subnet")
    identity: str = Field(description="resource id of the managed identity, with the rights of azure-role.json")
    public_key: str = Field(description="the line of the public key of access.private_key")

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.access.via == "cloud":
            raise ValueError("access.via: Azure has no tunnel for ssh's standard input; write `direct` or user@host")
        return self


class OnPremises(_Provider):
    """Machines that are there, reached over SSH, whose Python environment is made (or found) at `venv`.

    All workers stay: idle ones cost no more, and Ray takes no node types here that could come on demand by label.
    """

    kind: Literal["ssh"]
    head: Host = Field(description="address of the head's machine, as the others see it")
    workers: tuple[Host, ...] = Field(min_length=1, description="addresses of the workers' machines")
    access: Access
    venv: Annotated[str, Field(pattern=r"^[~/][A-Za-z0-9/._-]*$")] = Field(
        "~/luthier-env", description="virtual environment on each machine, made when it is not there"
    )
    labels: NodeLabels = Field({}, description="node labels of the workers")
    environment_file: str | None = _ENVIRONMENT_FILE

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.access.via == "cloud":
            raise ValueError("access.via: there is no cloud's tunnel to these machines; write `direct` or user@host")
        if self.head in self.workers or len(set(self.workers)) < len(self.workers):
            raise ValueError("each address stands once: starting a node stops the Ray that runs on its machine")
        return self


class PodGroup(NodeGroup):
    """Worker pods of one shape."""

    memory_gb: PositiveFloat = Field(description="memory of a pod, in GiB")
    node_selector: Labels = Field({}, description="labels of the Kubernetes nodes that it may run on")
    tolerations: tuple[dict[str, str], ...] = Field((), description="taints that it accepts, as Kubernetes writes them")

    @model_validator(mode="after")
    def _where(self) -> Self:
        if self.market == "spot" and not self.node_selector:
            raise ValueError(
                "market: spot needs a node_selector that says which nodes those are, for example "
                "{eks.amazonaws.com/capacityType: SPOT} or {cloud.google.com/gke-spot: 'true'}"
            )
        return self


class HeadPod(Config):
    """The head's pod."""

    cpus: PositiveInt = 2
    memory_gb: PositiveFloat = 8.0


class Kubernetes(_InContainers):
    """A namespace of a Kubernetes cluster on which KubeRay's operator runs."""

    kind: Literal["kubernetes"]
    namespace: Name
    context: str | None = Field(None, description="kubectl's context; not set: the current one")
    operator_namespace: Name = Field("kuberay-system", description="where KubeRay's operator runs")
    head: HeadPod = HeadPod()
    groups: dict[GroupName, PodGroup] = Field(min_length=1)
    worker_account: str | None = Field(None, description="service account of the workers: what your jobs may reach")
    secrets: tuple[str, ...] = Field((), description="Kubernetes secrets whose keys become variables of every pod")
    pull_secrets: tuple[str, ...] = Field((), description="Kubernetes secrets for the image's registry")


Provider = Annotated[Aws | Gcp | Azure | OnPremises | Kubernetes, Field(discriminator="kind")]
