"""What is known of open models: the table `configs/catalogue.yaml`. Every row says what was read, where and when.

No row has a benchmark's score: those are of other people's prompts, and what is fine-tuned is measured on one's own.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from cluster.config import Config, load
from cluster.licences.facts import Day, table_path

TABLE = Path("configs") / "catalogue.yaml"

Task = Literal["chat", "code", "extract", "reason", "summarise", "tools", "translate", "long-context"]
"""What a model's card names as what it is for. `extract`: structured data out of text; `tools`: function calls."""
ANY = "*"
"""Among languages: its card says that they are over a hundred, and gives no list."""


class Candidate(Config):
    """One open model."""

    name: str = Field(description="as `models add --name` would call it")
    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="its id on the Hub")
    licence: str
    parameters: PositiveInt
    active_parameters: PositiveInt | None = Field(None, description="of a mixture of experts, for one token")
    context_tokens: PositiveInt = Field(description="as its card says, stretched where it says so")
    languages: tuple[str, ...] = Field(
        min_length=1, description="ISO 639-1 codes, and `*` for more that it does not list"
    )
    tasks: tuple[Task, ...] = Field(min_length=1, description="what it is for above all comes first")
    domains: tuple[str, ...] = ()
    strengths: str = Field(description="what its card says it is good at, in our words")
    unfit: str | None = Field(None, description="why Luthier neither trains nor serves it as it is published")
    multimodal: bool = False
    gated: bool = Field(False, description="the Hub wants its terms accepted first")
    released: str = Field(pattern=r"^\d{4}-\d\d$")
    source: str = Field(pattern=r"^https://")
    read_on: Day

    @property
    def speed_parameters(self) -> int:
        """What a token's time goes by."""
        return self.active_parameters or self.parameters

    def knows(self, language: str) -> bool:
        """Whether its card lists a language, or lists none and says that they are many."""
        return language in self.languages or ANY in self.languages


class Table(Config):
    """What `configs/catalogue.yaml` holds."""

    models: tuple[Candidate, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _no_name_twice(self) -> "Table":
        names = [each.name for each in self.models] + [each.hub for each in self.models]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} stands twice")
        return self

    @property
    def read_on(self) -> str:
        """The day of the oldest row: what is newer than that may be missing."""
        return min(each.read_on for each in self.models)


def load_table() -> Table:
    """The table of the current folder if it has one, else this checkout's. Raises ConfigError."""
    return load(table_path(TABLE), Table)
