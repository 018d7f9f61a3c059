"""What a worker is given; light, so that the driver can make one without torch."""

from dataclasses import dataclass
from typing import Any

from cluster.records import BaseModelRef, CheckpointRef, LicenceRecord, Requirement
from cluster.store import Store
from jobs.config import Recipe


@dataclass(frozen=True)
class Job:
    """What the driver decided, for every worker alike."""

    run_id: str
    recipe: Recipe
    base: BaseModelRef
    zero: int
    dataset: str
    evaluation: str | None
    parent: CheckpointRef | None
    store: Store
    board: Any
    licences: LicenceRecord | None = None  # nothing is published without
    gate: Requirement | None = None  # what the result must show before an alias moves to it
