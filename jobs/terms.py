"""What a recipe's result is made from, and whether the licences of all that allow what is meant to be done with it.

    recipe ─▸ the base with what it was made from, data sources, their teachers ─▸ cluster/licences ─▸ a verdict a use

Files on this machine and in the store are one's own unless the recipe says otherwise; what comes from the Hub is not.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from cluster.licences.card import origin
from cluster.licences.chain import Judgement
from cluster.licences.facts import OWN
from cluster.licences.gate import Gate, is_own
from cluster.records import Artefact, RunRecord, distinct
from jobs.config import DataConfig, DataLicence, Recipe

_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)")


def artefacts_of(recipe: Recipe, gate: Gate, folder: Path | None = None) -> tuple[Artefact, ...]:
    """All that the recipe's result is made from, as far as it is known without the store and a network.

    Args:
        folder: where the model is, once it is on this machine: its card says more.
    """
    return distinct([*gate.of_model(recipe.model, folder), *_data(recipe, gate)])


def _data(recipe: Recipe, gate: Gate) -> Iterator[Artefact]:
    for source in recipe.data.train:  # what is only measured leaves nothing in the weights
        said = recipe.data.licence_of(source)
        hub = _HUB.match(source)
        name = hub[1] if hub else source
        if hub and not _is_ours(hub[1], said, gate):
            declared = None if said is None or is_own(said.licence) else said.licence
            yield from origin(name, "data", gate.facts, None, declared)
        elif said and said.licence and not is_own(said.licence):
            yield Artefact(kind="data", name=name, licence=said.licence)
        for teacher in said.teachers if said else ():
            yield from origin(teacher, "teacher", gate.facts, name)


def licence_of(data: DataConfig, source: str, gate: Gate) -> DataLicence:
    """What a source is under and which models wrote some of it, as it is judged: `own` for files of one's own that
    nothing is said of, what the table knows for a set on the Hub."""
    said = data.licence_of(source) or DataLicence.model_validate({})
    hub = _HUB.match(source)
    if hub is None or _is_ours(hub[1], said, gate):
        return said if said.licence else said.model_copy(update={"licence": OWN})
    found = origin(hub[1], "data", gate.facts, None, None if is_own(said.licence) else said.licence)
    teachers = dict.fromkeys([*said.teachers, *(artefact.name for artefact in found[1:])])
    return said.model_copy(update={"licence": found[0].licence, "teachers": tuple(teachers)})


def _is_ours(name: str, said: DataLicence | None, gate: Gate) -> bool:
    """Whether a set on the Hub is one's own: it is said to be, and it is nobody else's that we know of."""
    return said is not None and is_own(said.licence) and gate.facts.known_as(name) is None


def judge(recipe: Recipe, gate: Gate) -> tuple[Judgement, ...]:
    """The verdict on each use that is meant."""
    return gate.judge_all(artefacts_of(recipe, gate), published_name(recipe))


def require(
    recipe: Recipe, gate: Gate, more: tuple[Artefact, ...] = (), folder: Path | None = None
) -> tuple[Judgement, ...]:
    """As `judge`, with more that only the store and the model's folder know.

    Raises LicenceRefused unless every use passes.
    """
    artefacts = distinct([*artefacts_of(recipe, gate, folder), *more])
    return gate.require(artefacts, recipe.model.name, published_name(recipe))


def of_parent(record: RunRecord, gate: Gate) -> tuple[Artefact, ...]:
    """What the weights of another run were made from, where these begin."""
    if record.licences:
        return record.licences.artefacts
    return artefacts_of(Recipe.model_validate_json(json.dumps(record.recipe), strict=True), gate)  # an older record


def published_name(recipe: Recipe) -> str | None:
    """What the result will be called."""
    return recipe.publish.name if recipe.publish else None
