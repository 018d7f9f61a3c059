"""WHERE a job runs: what `configs/clusters/NAME.yaml` holds."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cluster.config import Config


class ClusterConfig(Config):
    """A Ray cluster, seen from a job: how to reach it, and what one worker gets of it."""

    name: str
    address: str = Field(
        "auto", description="`local` starts a private Ray here; `auto` joins RAY_ADDRESS; or host:port"
    )
    accelerator: Literal["cpu", "gpu"] = Field("cpu", description="what a worker computes on; a gpu worker gets one")
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
