"""What an inspection may say of a model's folder."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is. What is refused is unsafe, a fault is missing or broken: neither is added, trained or served."""

    REFUSED = "refused"
    FAULT = "fault"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know, and what to do about it."""

    level: Level
    part: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.part}: {self.text}" + (f"; {self.fix}" if self.fix else "")

    def to_dict(self) -> dict[str, str]:
        return {"level": str(self.level), "part": self.part, "text": self.text, "fix": self.fix}
