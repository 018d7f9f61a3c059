"""What a card of the Hub says of licences: the head of a model's or data set's README.md, by huggingface_hub.

A card names its licence by a Hub id, or `other` with `license_name`; a data set may name several, for parts of it, and
all are kept. `base_model` and `datasets` are what it was made from.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import DatasetCard, ModelCard

from cluster.errors import ModelError
from cluster.licences.facts import Facts
from cluster.records import Artefact, ArtefactKind

CARD = "README.md"
_MULTIMODAL = {"image-text-to-text", "any-to-any", "visual-question-answering", "audio-text-to-text", "image-to-text"}
_TEXT_ONLY = {"text-generation", "text2text-generation", "fill-mask", "text-classification", "feature-extraction"}


def read_card(path: Path, name: str, facts: Facts, kind: Literal["base", "data"] = "base") -> tuple[Artefact, ...]:
    """What a card says of itself and of what it was made from; the first is the thing itself.

    Args:
        path: the card, or a folder that has one.

    Raises:
        ModelError: no card, or one that cannot be read.
    """
    file = path / CARD if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read as a card: {error}") from None
    return parse_card(text, name, facts, kind, place=str(file))


def parse_card(
    text: str, name: str, facts: Facts, kind: Literal["base", "data"] = "base", place: str = "the card"
) -> tuple[Artefact, ...]:
    """As `read_card`, from the card's text."""
    try:
        card = (ModelCard if kind == "base" else DatasetCard)(text, ignore_metadata_errors=True)
        said: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ModelError(f"{place}: its head is not metadata of the Hub: {error}") from None
    pipeline = said.get("pipeline_tag")
    is_multimodal = True if pipeline in _MULTIMODAL else False if pipeline in _TEXT_ONLY else None
    itself = Artefact(kind=kind, name=name, licence=_licence(said), is_multimodal=is_multimodal)
    return (itself, *_made_from(said, name, facts, kind))


def origin(name: str, kind: ArtefactKind, facts: Facts, of: str | None, licence: str | None = None) -> list[Artefact]:
    """One thing that something was made from, by its name on the Hub, and whose outputs are in it if that is known."""
    known = facts.known_as(name)
    found = [Artefact(kind=kind, name=name, licence=licence or (known.licence if known else None), of=of)]
    for teacher in known.teachers if known else ():
        found += origin(teacher, "teacher", facts, name)
    return found


def _made_from(said: dict[str, Any], name: str, facts: Facts, kind: Literal["base", "data"]) -> list[Artefact]:
    found: list[Artefact] = []
    known = facts.known_as(name)
    for teacher in known.teachers if known else ():
        found += origin(teacher, "teacher", facts, name)
    if kind == "base":
        for base in _strings(said.get("base_model")):
            found += origin(base, "base", facts, name)
        for data in _strings(said.get("datasets")):
            if facts.known_as(data):  # of the rest nothing is known, and whoever published the model has judged it
                found += origin(data, "data", facts, name)
    return found


def _licence(said: dict[str, Any]) -> str | None:
    tags = _strings(said.get("license"))
    named = said.get("license_name")
    tags = [str(named) if tag == "other" and named else tag for tag in tags]
    if not tags:
        return str(named) if named else None
    return tags[0] if len(tags) == 1 else " AND ".join(tags)


def _strings(value: Any) -> list[str]:
    found = value if isinstance(value, list) else [value]
    return [each for each in found if isinstance(each, str)]
