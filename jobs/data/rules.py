"""What is looked for in data, and what is done about it: the schema of `configs/policy/data.yaml`.

off      it is not looked for
warn     it is counted, with examples, and left as it is
mend     the text is put right
mask     personal data becomes its kind: [EMAIL]
replace  personal data becomes another value of its kind, the same one wherever it stands
remove   the row is left out
refuse   nothing is prepared or trained, and the first places are named
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from cluster.config import Config

Share = Annotated[float, Field(ge=0, le=1)]


def _off(value: object) -> object:
    """YAML 1.1 reads `off` as false."""
    return "off" if value is False else value


Row = Annotated[Literal["off", "warn", "remove", "refuse"], BeforeValidator(_off)]
Text = Annotated[Literal["off", "warn", "mend"], BeforeValidator(_off)]
Value = Annotated[Literal["off", "warn", "mask", "replace", "remove", "refuse"], BeforeValidator(_off)]

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "policy" / "data.yaml"
"""What commands go by where nothing else is said."""

SOURCE = "source"
"""What `balance.by` calls the file that a row comes from; anything else is a column."""


class Language(Config):
    """Which languages a row may be in, by its first characters; a text too short or too mixed to tell passes."""

    do: Row = "off"
    allowed: tuple[str, ...] = Field(("en",), description="ISO 639-1 codes")
    characters: PositiveInt = Field(200, description="of a row's text that are looked at")
    shortest: PositiveInt = Field(40, description="characters below which a text is not judged")
    confidence: Share = Field(0.9, description="below which a text is not judged")


class Personal(Config):
    """What says who somebody is. The same value becomes the same mask or value in the whole set, and in any other
    with this seed."""

    do: Value = "off"
    kinds: tuple[Literal["email", "phone", "card", "iban", "national_id", "ip", "name"], ...] = Field(
        ("email", "phone", "card", "iban", "national_id", "ip"), description="`name` needs spaCy and a model of it"
    )
    languages: tuple[str, ...] = Field(("en", "zh"), description="in which names are looked for")
    regions: tuple[str, ...] | None = Field(None, description="whose telephone numbers count without a country code")
    seed: NonNegativeInt = Field(0, description="of the values that `replace` writes")


class Secrets(Config):
    """Keys, tokens and passwords."""

    do: Value = "off"
    seed: NonNegativeInt = 0


class Words(Config):
    """Words and phrases that give a text away: those of configs/policy/markers.yaml, and `words`."""

    do: Row = "off"
    words: tuple[str, ...] = Field((), description="more of them; a `*` at the end takes all endings")


class Duplicates(Config):
    """Rows that say the same: the first one stays."""

    exact: Row = "remove"
    near: Row = "off"
    similarity: Share = Field(0.8, description="Jaccard similarity from which two rows are near duplicates")


class Leakage(Config):
    """Rows of training that are in the evaluation data too: a loss measured there would say nothing. Near ones are
    as similar as near duplicates are."""

    exact: Row = "remove"
    near: Row = "off"


class Balance(Config):
    """How many rows each group has, and whether that is changed: by taking rows more or less often."""

    by: str = Field(SOURCE, description="`source`, or a column that names a row's group")
    do: Literal["measure", "down", "up", "weights"] = Field(
        "measure", description="cut all groups down to the smallest, repeat up to the largest, or take by `weights`"
    )
    weights: dict[str, NonNegativeFloat] = Field({}, description="how often a row of a group is taken, on average")
    seed: NonNegativeInt = 0
    warn_above: PositiveFloat = Field(10.0, description="largest group ÷ smallest from which the card warns")

    @model_validator(mode="after")
    def _weights_are_used(self) -> "Balance":
        if (self.do == "weights") != bool(self.weights):
            raise ValueError("balance: give weights together with do: weights")
        return self


class Rules(Config):
    """Everything that is looked for."""

    format: Literal["remove", "refuse"] = Field("refuse", description="rows of no known format, lines that are no JSON")
    template: Row = Field("refuse", description="rows that the model's template cannot teach, or that are too long")
    whitespace: Text = "mend"
    unicode: Text = "mend"
    html: Text = "off"
    language: Language = Language()
    personal: Personal = Personal()
    secrets: Secrets = Secrets()
    toxicity: Words = Words()
    injection: Words = Words()
    duplicates: Duplicates = Duplicates()
    leakage: Leakage = Leakage()
    balance: Balance = Balance()
    rows_per_part: PositiveInt = Field(5_000, description="rows of a task, and of a file of the prepared set at most")
