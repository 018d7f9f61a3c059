"""What the answer may be: one cause, what shows it, and what to do."""

from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """What may be wrong; one rule each names it."""

    NOTHING = "nothing is wrong"
    SILENT = "no answer"
    TOKEN = "token mismatch"
    VERSION = "version mismatch"
    DISK = "disk full"
    ENVIRONMENT = "failing environment"
    FAILED = "failed by itself"
    LOST = "driver lost"
    REPLICA = "replica cannot start"
    INFEASIBLE = "infeasible shape"
    AUTOSCALER = "dead autoscaler"
    HELD = "held placement group"
    CAPACITY = "no capacity"
    CAP = "cap reached"
    FORGOTTEN = "forgotten resource request"
    ADAPTER = "adapter missing"
    PINNED = "idle node pinned"


@dataclass(frozen=True)
class Finding:
    """The answer. `fix` is empty when nothing is wrong."""

    cause: Cause
    evidence: str
    fix: str = ""
