"""Who we are, as far as a licence asks: `configs/policy/organisation.yaml`, with what was signed off.

The file is found by its place and is no key of a recipe: a recipe that could name its own policy, or override it on the
command line, would be a way around the gate.
"""

from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from cluster.config import Config, load
from cluster.licences.facts import Day, normal, table_path

POLICY = Path("configs") / "policy" / "organisation.yaml"

Use = Literal["train", "serve", "distribute"]
"""To train from it; to answer requests with it; to give the weights to others."""
USES: tuple[Use, ...] = ("train", "serve", "distribute")


class SignOff(Config):
    """Somebody has read the terms and answers for a use of them."""

    subject: str = Field(min_length=1, description="as the verdict names it: a licence, a model or data set, or a pair")
    uses: tuple[Use, ...] = Field(min_length=1)
    by: str = Field(min_length=1, description="name of a person")
    signed_on: Day  # not `on`, which YAML reads as true
    until: Day | None = Field(None, description="the last day on which it holds")
    why: str = Field(min_length=1)

    @model_validator(mode="after")
    def _real_days(self) -> "SignOff":
        if date.fromisoformat(self.until or self.signed_on) < date.fromisoformat(self.signed_on):
            raise ValueError(f"until {self.until} is before signed_on {self.signed_on}")
        return self

    def covers(self, subjects: tuple[str, ...], use: Use, today: date) -> bool:
        """Whether it is for one of these subjects, this use and this day."""
        is_time = date.fromisoformat(self.signed_on) <= today and (
            self.until is None or today <= date.fromisoformat(self.until)
        )
        return is_time and use in self.uses and normal(self.subject) in map(normal, subjects)


class Organisation(Config):
    """What `configs/policy/organisation.yaml` holds. What is left out is not known: a review, where it matters."""

    commercial: bool = Field(description="whether what is made is used for business")
    hosts: Literal["nobody", "internal", "external"] = Field(
        description="who sends requests to what is served: nobody, people of ours, or others too"
    )
    distributes: bool = Field(description="whether weights are given to others")
    monthly_users: NonNegativeInt | None = Field(None, description="of all products and affiliates together")
    annual_revenue_usd: NonNegativeInt | None = None
    regions: tuple[str, ...] = Field((), description="where we are and where it is used: EU, UK, US, KR …")
    fields: tuple[str, ...] = Field((), description="fields of use that licences exclude and we are in: military …")
    signoffs: tuple[SignOff, ...] = ()

    @property
    def uses(self) -> tuple[Use, ...]:
        """What is meant to be done with what is trained here."""
        return (
            "train",
            *(("serve",) if self.hosts != "nobody" else ()),
            *(("distribute",) if self.distributes else ()),
        )


def load_organisation() -> Organisation:
    """The policy of the current folder if it has one, else the shipped one. Raises ConfigError."""
    return load(table_path(POLICY), Organisation)
