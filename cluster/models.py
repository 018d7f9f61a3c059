"""Base models: which one, pinned to a revision, brought to a node, and its shape read without torch.

A model is named by a config in `configs/models/`. Its source is a Hub id (pinned by a commit hash),
a folder, or the store. A folder is mirrored into the store under the digest of its files when a job
first uses it, so that every node of a cluster, and serving later, reads the same bytes; a Hub model
may be mirrored for clusters without a hub, and the mirror is then preferred.

    models/<name>/<revision>/{config.json, model.safetensors, …, model.json}      model.json last
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster import env, hub, keys, made, records
from cluster.catalogue import links, remote_code
from cluster.config import Config
from cluster.errors import ModelError, ObjectExists, ObjectNotFound
from cluster.records import Artefact, ArtefactKind, BaseModelRef, FileRecord, ModelManifest
from cluster.store import Store

WANTED_FILES = (
    *("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"),
)
"""What is fetched and mirrored of a model, with its card, by which its licence is judged.

Code and pickled weights (`*.bin`, `*.pt`) never are: loading runs them.
"""


Size = Annotated[int, Field(ge=1, lt=2**31)]
"""A size that a model states: a stranger's number, and products of these are reckoned and printed."""
Count = Annotated[int, Field(ge=1, le=10_000)]
"""Of layers or heads, which are walked one by one; the largest models have some hundred."""


class Shape(Config):
    """The sizes that decide memory and work, under the names that `config.json` uses."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Size
    tie_word_embeddings: bool
    max_position_embeddings: Size
    model_type: str = Field("llama", description="the family: what lies between the matrices of a layer")

    @property
    def query_size(self) -> int:
        """Elements of a token's queries, over all heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Elements of a token's keys, or of its values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of a gated-MLP decoder (Llama, Qwen, Mistral, Gemma): matrices, without norms (under 0.01 %)."""
        query = self.hidden_size * self.num_attention_heads * self.head_dim
        key_value = 2 * self.hidden_size * self.num_key_value_heads * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * (2 * query + key_value + mlp) + embeddings


class Origin(Config):
    """Something that a model was made from, where its card does not say so."""

    name: str = Field(description="a Hub id `owner/name`")
    kind: ArtefactKind = Field("base", description="its weights, its rows, or its outputs (teacher)")
    licence: str | None = Field(None, description="where configs/policy/licences.yaml does not know it by its name")


class ModelConfig(Config):
    """A base model: what `configs/models/NAME.yaml` holds."""

    name: str = Field(description="its name in the store and in the API")
    source: str = Field(description="a Hub id `owner/name`, a folder (`/…`, `./…`), or `store`")
    revision: str | None = Field(
        None, description="a commit hash for a Hub id; for `store` a mirrored revision, left out: the newest there"
    )
    licence: str = Field(description="SPDX or Hub licence id; goes into the record of everything made from it")
    made_from: tuple[Origin, ...] = Field((), description="other models and data sets that it was made from")
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="precision in which weights are held")
    shape: Shape | None = Field(None, description="sizes, so that a Hub model can be planned without a network")

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if not keys.is_name(self.name):
            raise ValueError(f"name {self.name!r}: use lower case letters, digits, '.', '_' and '-'")
        if self.is_hub and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(f"{self.source} is a Hub id: pin it with revision: <40 hex digits of a commit>")
        if self.is_folder and self.revision:
            raise ValueError("a folder has no revision of its own; leave it out (its digest is used)")
        return self

    @property
    def is_folder(self) -> bool:
        return self.source.startswith(("/", "./", "../", "~"))

    @property
    def is_hub(self) -> bool:
        return not self.is_folder and self.source != "store"


def read_shape(folder: Path) -> Shape:
    """The shape that a model folder's `config.json` states. Raises ModelError."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a model folder: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    config = config.get("text_config", config) if isinstance(config, dict) else {}
    missing = [
        name for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if name not in config
    ]
    if missing:
        raise ModelError(f"{path} does not describe a decoder: no {', '.join(missing)}")
    try:
        return _shape(config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} has sizes that are none: {reason}") from None


def _shape(config: dict[str, Any]) -> Shape:
    heads = config["num_attention_heads"]
    return Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config.get("intermediate_size", 4 * config["hidden_size"]),
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        model_type=config.get("model_type", "llama"),
    )


def pin(model: ModelConfig, store: Store, made_from: tuple[Artefact, ...] = ()) -> BaseModelRef:
    """Decide the revision, once for a run or a deployment; a folder is mirrored first. Raises ModelError.

    Args:
        made_from: what the model was made from, for the manifest of a folder that is mirrored.
    """
    if model.is_folder:
        revision = mirror(model, Path(model.source).expanduser(), store, made_from=made_from)
    elif model.is_hub:
        revision = model.revision or ""
    else:
        revision = _in_store(model, store)
    return BaseModelRef(name=model.name, revision=revision, licence=model.licence)


def _in_store(model: ModelConfig, store: Store) -> str:
    """The mirrored revision that the config names, or else the newest."""
    manifests = mirrored(store)
    found = [
        manifest
        for manifest in manifests
        if manifest.name == model.name and model.revision in (None, manifest.revision)
    ]
    if not found:
        have = ", ".join(f"{manifest.name} ({manifest.revision})" for manifest in manifests) or "none"
        wanted = f"{model.name} at revision {model.revision}" if model.revision else model.name
        raise ModelError(f"{store.url} holds no model {wanted}; its models: {have}")
    return max(found, key=lambda manifest: (manifest.created_at, manifest.revision)).revision


def mirror(
    model: ModelConfig,
    folder: Path,
    store: Store,
    origin: str | None = None,
    made_from: tuple[Artefact, ...] = (),
    revision: str | None = None,
    say: Callable[[str], None] | None = None,
) -> str:
    """Copy a model folder into the store; what is there already is not sent again. Returns the revision.

    Args:
        origin: where the weights come from, for the manifest, when that is not the config's source.
        made_from: what the model was made from, with the licences of that.
        revision: what it is kept under; None: the config's, or else the digest of its files.
        say: is told of each file what was done with it.
    """
    links.refuse(folder)
    read_shape(folder)
    check_loadable(folder)
    paths = wanted_files(folder)
    files = tuple(records.describe_file(path, path.name) for path in paths)
    revision = revision or model.revision or digest_revision(files)
    manifest = keys.model_manifest(model.name, revision)
    if store.exists(manifest):
        return revision
    prefix = keys.model_prefix(model.name, revision)
    stored = {item.key: item.size for item in store.list(prefix)}
    for path, file in zip(paths, files, strict=True):
        key = prefix + file.file
        is_there = stored.get(key) == file.size and _sha256(store, key) == file.sha256
        if not is_there:
            store.upload(path, key)
        if say:
            say(f"{file.file}: {'already there' if is_there else 'uploaded'}, {file.size:,} bytes")
    # What was exported or published here says how it was made; a stranger's word for that is not taken.
    how = None if model.is_hub else made.read(folder)
    record = ModelManifest(
        name=model.name,
        revision=revision,
        source=f"run {how.run_id}" if how else origin or model.source,
        licence=model.licence,
        files=files,
        created_at=records.now(),
        artefacts=records.distinct([*made_from, *(how.artefacts if how else ())]),
        made=how,
    )
    with suppress(ObjectExists):  # another job mirrored the same bytes meanwhile
        store.create(manifest, record.to_bytes())
    return revision


def check_loadable(folder: Path) -> None:
    """Raises ModelError for a model that only its own code, or a pickle, would load: neither ever runs here."""
    remote_code.refuse(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no *.safetensors weights; `luthier cluster models inspect {folder}` says what it has, and "
            "`models add --convert` makes them of pickled ones"
        )


def digest_revision(files: Iterable[FileRecord]) -> str:
    """What a folder without a commit is kept under: the digest of its files, but not of the card that is about them."""
    return records.digest_of(file for file in files if file.file != "README.md")[:40]


def wanted_files(folder: Path) -> list[Path]:
    """What of a model's folder is mirrored."""
    return sorted({path for pattern in WANTED_FILES for path in folder.glob(pattern) if path.is_file()})


def _sha256(store: Store, key: str) -> str:
    """Of a stored object, by reading it back: nothing else proves what a killed upload has left."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        return store.download(key, Path(temporary) / "object")


def mirrored(store: Store) -> list[ModelManifest]:
    """The manifest of every model in the store."""
    prefix = keys.models_prefix()
    found = []
    for item in store.list(prefix):
        name, _, rest = item.key.removeprefix(prefix).partition("/")
        revision = rest.partition("/")[0]
        if item.key == keys.model_manifest(name, revision):
            found.append(records.read(store, item.key, ModelManifest))
    return found


def cache_folder() -> Path:
    """Where this node keeps what it downloaded."""
    return Path(os.environ.get(env.LUTHIER_CACHE) or Path.home() / ".cache" / "luthier")


def fetch(model: ModelConfig, base: BaseModelRef, store: Store) -> Path:
    """The model's folder on this node, downloaded once whatever the number of processes.

    The store's mirror is read if there is one, else the Hub. Raises ModelError, StoreError.
    """
    if model.is_hub and not store.exists(keys.model_manifest(base.name, base.revision)):
        folder = hub.fetch(model.source, model.revision or "", WANTED_FILES)
        check_loadable(folder)
        return folder
    folder = cache_folder() / "models" / base.name / base.revision
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{base.revision}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            manifest = read_manifest(store, base)
            records.fetch_files(store, keys.model_prefix(base.name, base.revision), manifest.files, partial)
            partial.rename(folder)
    check_loadable(folder)
    return folder


def artefacts(store: Store, base: BaseModelRef) -> tuple[Artefact, ...]:
    """What a base that the store holds was made from; () for one that it does not hold."""
    try:
        return read_manifest(store, base).chain
    except ModelError:
        return ()


def read_manifest(store: Store, base: BaseModelRef) -> ModelManifest:
    try:
        return records.read(store, keys.model_manifest(base.name, base.revision), ModelManifest)
    except ObjectNotFound:
        raise ModelError(f"{store.url} holds no model {base.name} at revision {base.revision}") from None
