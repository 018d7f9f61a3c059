"""Where a model comes from: a config, a folder, another store or the Hub; its folder here, its pin and its licence.

configs/models/NAME.yaml      as the file says
./folder                      pinned by the digest of its files
s3://… or file:///…           a model of that name in another store, pinned by its revision there
owner/name                    the Hub's, pinned by a commit: the given one, or the newest, which is told
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import hub, keys, models
from cluster.catalogue import links, weights
from cluster.config import load
from cluster.errors import ConfigError, Fault, ModelError
from cluster.licences.card import CARD, read_card
from cluster.licences.facts import Facts
from cluster.models import ModelConfig
from cluster.records import Artefact, BaseModelRef
from cluster.store import Store, open_existing

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a person asked for. None: not said."""

    source: str
    name: str | None = None
    revision: str | None = None
    licence: str | None = None
    convert: bool = False


@dataclass(frozen=True)
class Located:
    """A model's folder on this machine.

    `model` is how a recipe would name its source; `made_from` is what another store's record knows, or None.
    """

    model: ModelConfig
    folder: Path
    origin: str
    revision: str | None
    made_from: tuple[Artefact, ...] | None = None


def locate(wanted: Wanted, facts: Facts, say: Say) -> Located:
    """Find the model and bring it here. Raises ModelError, ConfigError, StoreError."""
    source = wanted.source
    if source.endswith((".yaml", ".yml")):
        return _of_config(wanted, facts, say)
    if re.match(r"(s3|file)://", source):
        return _of_store(wanted, open_existing(source))
    if source.startswith(("/", "./", "../", "~")) or Path(source).is_dir():
        return _of_folder(wanted, facts)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        message = f"{source!r} is no folder here; write ./folder, owner/name, s3://… or file:///…"
        raise ConfigError([Fault("command line", "SOURCE", message)])
    return _of_hub(wanted, facts, say)


def name_for(wanted: Wanted, default: str) -> str:
    """The name in the store: as given, or made from the source's own. Raises ConfigError."""
    name = wanted.name or re.sub(r"[^a-z0-9._-]+", "-", default.lower()).strip("._-")
    if not keys.is_name(name):
        raise ConfigError([Fault("command line", "--name", f"{name!r}: use lower case letters, digits, '.', '_', '-'")])
    return name


def _of_config(wanted: Wanted, facts: Facts, say: Say) -> Located:
    model = load(Path(wanted.source), ModelConfig)
    if wanted.name or wanted.revision or wanted.licence:
        message = f"{wanted.source} says the name, revision and licence; correct it there"
        raise ConfigError([Fault("command line", "--name, --revision, --licence", message)])
    if model.source == "store":
        raise ModelError(f"{wanted.source}: source is `store`: it is made there, or added from where it comes from")
    given = Wanted(model.source, model.name, model.revision, model.licence, wanted.convert)
    found = _of_folder(given, facts) if model.is_folder else _of_hub(given, facts, say)
    return Located(model, found.folder, found.origin, found.revision)


def _of_folder(wanted: Wanted, facts: Facts) -> Located:
    folder = Path(wanted.source).expanduser().resolve()
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give a model's folder")
    links.refuse(folder)
    if wanted.convert and wanted.revision:
        message = "a folder's is the digest of its files, and --convert makes others; leave it out"
        raise ConfigError([Fault("command line", "--revision", message)])
    model = ModelConfig(
        name=name_for(wanted, folder.name),
        source=str(folder),
        revision=None,
        licence=_licence(wanted, folder, facts),
        dtype=weights.dtype_to_hold(folder),
        shape=None,
    )
    return Located(model, folder, str(folder), wanted.revision)


def _of_store(wanted: Wanted, other: Store) -> Located:
    there = models.mirrored(other)
    name = wanted.name or (there[0].name if len({each.name for each in there}) == 1 else None)
    found = [each for each in there if each.name == name and wanted.revision in (None, each.revision)]
    if not found or name is None:
        have = ", ".join(sorted(f"{each.name} ({each.revision})" for each in there)) or "none"
        raise ModelError(f"{other.url} holds no model {name or '(give --name)'}; its models: {have}")
    manifest = max(found, key=lambda each: (each.created_at, each.revision))
    model = ModelConfig(name=name, source="store", revision=manifest.revision, licence=manifest.licence, shape=None)
    base = BaseModelRef(name=name, revision=manifest.revision, licence=manifest.licence)
    folder = models.fetch(model, base, other)
    model = model.model_copy(update={"dtype": weights.dtype_to_hold(folder)})
    return Located(model, folder, manifest.source, manifest.revision, manifest.chain)


def _of_hub(wanted: Wanted, facts: Facts, say: Say) -> Located:
    revision = wanted.revision or hub.newest(wanted.source)
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        message = f"{revision!r} moves; pin the commit, 40 hex digits"
        raise ConfigError([Fault("command line", "--revision", message)])
    say(f"{wanted.source} at commit {revision}")
    more = ("pytorch_model*.bin", "pytorch_model.bin.index.json") if wanted.convert else ()
    folder = hub.fetch(wanted.source, revision, (*models.WANTED_FILES, *more))
    if not wanted.convert and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{wanted.source} has no *.safetensors at commit {revision}; if it has pytorch_model*.bin, add it with "
            "--convert: a sandboxed process makes safetensors of them"
        )
    say(f"{hub.verify(wanted.source, revision, folder)} large files are those of the Hub, by their SHA-256")
    model = ModelConfig(
        name=name_for(wanted, wanted.source.partition("/")[2]),
        source=wanted.source,
        revision=revision,
        licence=_licence(wanted, folder, facts),
        dtype=weights.dtype_to_hold(folder),
        shape=None,
    )
    return Located(model, folder, f"{wanted.source}@{revision}", revision)


def _licence(wanted: Wanted, folder: Path, facts: Facts) -> str:
    """As given, or the card's. Raises ModelError."""
    if wanted.licence:
        return wanted.licence
    said = read_card(folder, wanted.source, facts)[0].licence if (folder / CARD).is_file() else None
    if said is None:
        raise ModelError(f"{wanted.source} has no card that names its licence; give it by --licence (SPDX or Hub id)")
    return said
