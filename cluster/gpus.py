"""GPU types: memory, speed and dated prices, from the one table `configs/hardware/gpus.yaml`.

A cluster's file names its type (`gpu: h100-80gb`); nothing is asked of a network.
"""

import difflib
from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat

from cluster.config import Config, load
from cluster.errors import PlanError

TABLE = Path("configs") / "hardware" / "gpus.yaml"


class Price(Config):
    """What one GPU costs an hour on demand, where, and when that was read."""

    usd_per_hour: NonNegativeFloat
    offer: str = Field(min_length=1, description="whose, and of what")
    read_on: str = Field(pattern=r"^\d{4}-\d\d-\d\d$", description="the day that the source said so")
    source: str = Field(pattern=r"^https://")


class GpuType(Config):
    """One type of GPU."""

    memory_gb: PositiveFloat = Field(description="what a process can have of it, in GiB")
    bf16_tflops: PositiveFloat = Field(description="peak of dense bf16 products with fp32 sums, 1e12 a second")
    bandwidth_tb_s: PositiveFloat = Field(description="of its memory, 1e12 bytes a second")
    specification: str = Field(pattern=r"^https://", description="where the maker says so")
    prices: tuple[Price, ...] = Field(description="may be empty: then a plan has hours and no money")


class GpuTable(Config):
    """What `configs/hardware/gpus.yaml` holds."""

    gpus: dict[str, GpuType]


def find_gpu(name: str) -> GpuType:
    """A type by its name in the table: of the current folder if it has one, else of this checkout. Raises PlanError."""
    path = TABLE if TABLE.exists() else Path(__file__).resolve().parent.parent / TABLE
    known = load(path, GpuTable).gpus
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known)}"
    raise PlanError(f"cluster.gpu: {path} has no GPU type {name!r}; {advice}")
