"""WHERE a job runs: what `configs/clusters/NAME.yaml` holds."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cluster.config import Config


class ClusterConfig(Config):
    """A Ray cluster, seen from a job: how to reach it, and what one worker gets of it."""

    name: str
    address: str = Field(
        "auto", description="`local` starts a private Ray here; `auto` joins RAY_ADDRESS; or host:port"
    )
    accelerator: Literal["cpu", "gpu"] = Field("cpu", description="what a worker computes on; a gpu worker gets one")
    gpu: str | None = Field(None, description="the GPU's type in configs/hardware/gpus.yaml, for hours and prices")
    cpus_per_worker: PositiveInt = Field(1, description="cores of a worker, and its torch threads")
    memory_gb_per_worker: PositiveFloat = Field(description="memory of one GPU, or of one CPU worker, in GiB")
    autoscales: bool = Field(False, description="more nodes come on demand, so what is there now is no limit")
