"""A model into the store: located, inspected, judged by its licence, mirrored file by file, committed by its record.

Killed anywhere, the same command goes on: a file that is there with its size and SHA-256 is not sent again, and nothing
is a model of the store before `model.json` is written, which is last.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cluster import keys, models, records
from cluster.catalogue.convert import convert
from cluster.catalogue.inspection import Inspection, inspect
from cluster.catalogue.source import Located, Say, Wanted, locate
from cluster.catalogue.weights import dtype_to_hold
from cluster.config import load
from cluster.errors import ConfigError, Fault, LicenceRefused, ModelError
from cluster.licences.chain import Judgement
from cluster.licences.gate import Gate, check
from cluster.models import ModelConfig, read_shape
from cluster.records import Artefact, ModelManifest
from cluster.store import Store


@dataclass(frozen=True)
class Added:
    """A model that the store holds now. `config` is what a recipe names, as YAML."""

    name: str
    revision: str
    licence: str
    config: str
    inspection: Inspection
    judgements: tuple[Judgement, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "revision": self.revision,
            "licence": self.licence,
            "config": self.config,
            "uses": {each.use: each.to_dict() for each in self.judgements},
            "findings": [each.to_dict() for each in self.inspection.findings],
        }


def add(wanted: Wanted, store: Store, gate: Gate, say: Say, config_out: Path | None = None) -> Added:
    """Bring a model into the store. Raises ModelError, ConfigError, LicenceRefused, StoreError.

    Args:
        say: is told what happens.
        config_out: where the config for recipes is written, and then read back as a recipe would.
    """
    if config_out is not None and config_out.exists():
        message = f"{config_out} exists; name another file, or remove it"
        raise ConfigError([Fault("command line", "--config-out", message)])
    located = locate(wanted, gate.facts, say)
    if not wanted.convert:
        return _add(located, located.folder, wanted, store, gate, say, config_out)
    with _room(located.model.name) as room:
        done = convert(located.folder, room, say)
        changed: dict[str, object] = {"revision": None}  # a commit has other bytes
        if not wanted.source.endswith((".yaml", ".yml")):  # a config says it
            changed["dtype"] = dtype_to_hold(room)
        located = replace(located, model=located.model.model_copy(update=changed))
        for wall in dict.fromkeys(wall for each in done for wall in each.open_walls):
            say(f"warning: the kernel did not let the converting process close its {wall}")
        return _add(located, room, wanted, store, gate, say, config_out)


@contextmanager
def _room(name: str) -> Iterator[Path]:
    """An empty folder in the cache for one conversion of a model at a time; what a killed one has left goes first."""
    room = models.cache_folder() / "converting" / name
    room.parent.mkdir(parents=True, exist_ok=True)
    with room.with_name(f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        try:
            yield room
        finally:
            shutil.rmtree(room)


def _add(
    located: Located, folder: Path, wanted: Wanted, store: Store, gate: Gate, say: Say, config_out: Path | None
) -> Added:
    inspection = inspect(folder, gate.facts)
    for finding in inspection.findings:
        if finding not in inspection.stops:
            say(str(finding))
    if inspection.stops:
        raise ModelError("\n  ".join([f"{located.origin} is not added:", *map(str, inspection.stops)]))
    model = located.model
    made_from = located.made_from or gate.of_model(model, folder)
    judgements = gate.judge_all(made_from, model.name)
    if not any(each.passes for each in judgements):
        check(judgements, located.origin)
    for each in judgements:
        say(f"{each.use}: {each.level}, by {', '.join(each.licences) or 'nothing'}")
    for note in dict.fromkeys(note for each in judgements for note in each.notes):
        say(f"note: {note}")
    pinned = _pin(located, folder, wanted)
    origin = f"{located.origin}, converted from pickles" if wanted.convert else located.origin
    revision = models.mirror(model, folder, store, origin, made_from, pinned, say)
    kept = models.read_manifest(store, records.BaseModelRef(name=model.name, revision=revision, licence=model.licence))
    _agrees(kept, model, made_from, store)
    text = _config(model, folder, revision, store, wanted.convert)
    _validate(text, config_out)
    say(f"{keys.model_manifest(model.name, revision)}: committed, {len(kept.files)} files")
    return Added(model.name, revision, model.licence, text, inspection, judgements)


def _agrees(kept: ModelManifest, model: ModelConfig, judged: tuple[Artefact, ...], store: Store) -> None:
    """Raises LicenceRefused where the store's record is of another judgement: what was said here would hold nowhere."""
    now = _stated([*judged, *(kept.made.artefacts if kept.made else ())])
    if kept.licence != model.licence:
        differs = f"under {kept.licence} and not {model.licence}"
    elif apart := now ^ _stated(kept.chain):
        what = sorted(f"{each.kind} {each.name} ({each.licence or 'not stated'})" for each in apart)
        differs = f"and only one of its record and this source names {', '.join(what)}"
    else:
        return
    raise LicenceRefused(
        f"{store.url} has {model.name} at {kept.revision} already, {differs}; a record does not change: add it under "
        "another --name"
    )


def _stated(artefacts: Iterable[Artefact]) -> set[Artefact]:
    """For comparing: an older record does not say of what reads text alone that it does."""
    return {each if each.is_multimodal else each.model_copy(update={"is_multimodal": None}) for each in artefacts}


def _pin(located: Located, folder: Path, wanted: Wanted) -> str | None:
    """A commit, or another store's revision; None for the digest of the files, which mirroring reckons.

    Raises ModelError for a folder that is not the one that was asked for.
    """
    if wanted.convert or not located.model.is_folder:
        return None if wanted.convert else located.revision
    if wanted.revision is not None:
        paths = models.wanted_files(folder)
        digest = models.digest_revision(records.describe_file(path, path.name) for path in paths)
        if digest != wanted.revision:
            raise ModelError(f"{located.origin} has the digest {digest}, and --revision asks for {wanted.revision}")
    return None


def _config(model: ModelConfig, folder: Path, revision: str, store: Store, is_converted: bool) -> str:
    """What `configs/models/NAME.yaml` holds: the Hub's pin where the Hub has these bytes, else the store's."""
    source = model.source if model.is_hub and not is_converted else "store"
    said: dict[str, Any] = {"name": model.name, "source": source, "revision": revision, "licence": model.licence}
    if model.made_from:
        said["made_from"] = [each.model_dump(exclude_none=True) for each in model.made_from]
    said |= {"dtype": model.dtype, "shape": read_shape(folder).model_dump()}
    return f"# luthier cluster models inspect {model.name} --store {store.url}\n{yaml.safe_dump(said, sort_keys=False)}"


def _validate(text: str, config_out: Path | None) -> None:
    """Write the config where it is wanted, and read it as a recipe would, so that a wrong one is found here."""
    with tempfile.TemporaryDirectory() as temporary:
        path = config_out or Path(temporary) / "model.yaml"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise ConfigError([Fault("command line", "--config-out", f"{path}: {error.strerror}")]) from None
        load(path, ModelConfig)
