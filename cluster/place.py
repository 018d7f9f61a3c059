"""WHERE a job runs: what `configs/clusters/NAME.yaml` holds.

The first part is what a job sees of a cluster, whoever made it. `provider` is what `luthier cluster up` makes one of.
"""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from cluster.config import Config
from cluster.launch.spec import Kubernetes, NodeGroup, OnPremises, Provider, plain_name


class Prices(Config):
    """What the cluster's owner pays, in US dollars. What is left out is not known, unless `gpu` has a list price."""

    gpu: NonNegativeFloat | None = Field(
        None, description="of a GPU for an hour on demand, with the CPUs and the memory of its worker"
    )
    gpu_spot: NonNegativeFloat | None = Field(None, description="the same on a spot node; `gpu` when left out")
    cpu: NonNegativeFloat | None = Field(None, description="of a core for an hour, of workers and drivers without GPU")


class ClusterConfig(Config):
    """A Ray cluster, seen from a job: how to reach it, and what one worker gets of it; and how it is made."""

    name: str
    address: str = Field(
        "auto", description="`local` starts a private Ray here; `auto` joins RAY_ADDRESS; or host:port"
    )
    accelerator: Literal["cpu", "gpu"] = Field("cpu", description="what a worker computes on; a gpu worker gets one")
    gpu: str | None = Field(None, description="the GPU's type in configs/hardware/gpus.yaml, for hours and prices")
    cpus_per_worker: PositiveInt = Field(1, description="cores of a worker, and its torch threads")
    memory_gb_per_worker: PositiveFloat = Field(description="memory of one GPU, or of one CPU worker, in GiB")
    autoscales: bool = Field(False, description="more nodes come on demand, so what is there now is no limit")
    driver_cpus: NonNegativeFloat = Field(
        0.0,
        description="CPUs that a submitted job's driver asks for; above 0 keeps it off a head that offers none",
    )
    shared: bool = Field(
        False, description="others train on it too: jobs wait for their turn, fairly by user, and start whole"
    )
    prices: Prices = Prices()
    provider: Provider | None = Field(None, description="what `luthier cluster up` makes the cluster of")

    @model_validator(mode="after")
    def _holds_a_worker(self) -> Self:
        """A job that waits for a node that no group can give would wait for ever."""
        if self.provider is None:
            return self
        plain_name(self.name)  # it becomes part of paths and of commands, and the name of Kubernetes' objects
        if isinstance(self.provider, OnPremises):
            return self
        groups = self.provider.groups
        if not any(self._places(group) for group in groups.values()):
            need = f"{self.cpus_per_worker} CPUs" + (" and a GPU" if self.accelerator == "gpu" else "")
            raise ValueError(f"provider.groups: no group has a node for one worker of {need}")
        if not self.autoscales and any(group.min < group.max for group in groups.values()):
            raise ValueError("autoscales: write `true`, because provider.groups come on demand")
        if isinstance(self.provider, Kubernetes) and self.accelerator == "cpu":
            largest = max(group.memory_gb for group in self.provider.groups.values())
            if self.memory_gb_per_worker > largest:
                raise ValueError(f"memory_gb_per_worker: no pod of provider.groups has more than {largest:g} GiB")
        return self

    def _places(self, group: NodeGroup) -> bool:
        gpus = group.gpus >= 1 if self.accelerator == "gpu" else True
        return gpus and group.cpus >= self.cpus_per_worker
