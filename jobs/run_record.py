"""run.json: the recipe, and all that the run was made of: digests, data files with their contents, code, versions."""

import secrets
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from cluster import __version__, keys, records
from cluster.errors import ObjectNotFound
from cluster.licences.facts import OWN
from cluster.package import code_digest
from cluster.records import (
    BaseModelRef,
    CheckpointRef,
    DatasetManifest,
    Digests,
    LicenceRecord,
    ModelManifest,
    Requirement,
    RunRecord,
    SourceFile,
)
from cluster.store import Store
from cluster.who import submitter
from jobs.config import Recipe

LIBRARIES = ("ray", "torch", "deepspeed", "transformers", "tokenizers", "peft")

Files = Sequence[tuple[str, Path]]


def write(
    store: Store,
    recipe: Recipe,
    base: BaseModelRef,
    tokenised: Sequence[str],
    sources: tuple[SourceFile, ...],
    parent: CheckpointRef | None,
    licences: LicenceRecord,
    checked: str | None = None,
    required: Requirement | None = None,
    reproduces: str | None = None,
) -> RunRecord:
    """Write run.json, the record of a new run.

    Args:
        tokenised: digests of what to train on and, perhaps, to evaluate on.
        checked: of the set of checked rows that they were made from.
        required: what its result must show before an alias moves to it.
        reproduces: the run that it repeats.
    """
    record = RunRecord(
        run_id=new_run_id(recipe.name),
        recipe=recipe.model_dump(mode="json", by_alias=True),
        dataset=tokenised[0],
        evaluation=tokenised[1] if len(tokenised) > 1 else None,
        prepared=checked,
        code_revision=code_revision(),
        versions=versions(),
        base=base,
        parent=parent,
        licences=licences,
        gate=required,
        created_at=records.now(),
        by=submitter(),
        sources=sources,
        digests=describe(store, recipe, base, tokenised, sources, parent, licences, checked),
        reproduces=reproduces,
    )
    store.create(keys.run_record(record.run_id), record.to_bytes())
    return record


def new_run_id(name: str) -> str:
    """`<recipe>-<UTC time>-<random>`: sorted by time, unique without asking anybody."""
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def versions() -> dict[str, str]:
    """Of what the losses may depend on."""
    return {"luthier": __version__, "python": python_version()} | {name: version(name) for name in LIBRARIES}


def code() -> str:
    """The digest of the code that runs here."""
    return code_digest(_root())


def code_revision() -> str:
    """The git commit of the code, where it runs from a checkout; a shipped working directory has only its digest."""
    if (_root() / ".git").exists():
        command = ["git", "-C", str(_root()), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if found:
            return str(found)
    return f"sha256:{code()}"


def sources(recipe: Recipe, train: Files, evaluation: Files, licences: LicenceRecord) -> tuple[SourceFile, ...]:
    """Name, size and SHA-256 of each data file, with the licence that the recipe gives it or its name is known for."""
    known = {each.name: each.licence for each in licences.artefacts if each.kind == "data"}

    def described(files: Files, use: str) -> Iterable[SourceFile]:
        for name, path in files:
            said = recipe.data.licence_of(name)
            hub = name.removeprefix("hf://datasets/").split("@")[0]
            licence = (said.licence if said else None) or next(
                (licence for of, licence in known.items() if of in (name, "/".join(hub.split("/")[:2]))), None
            )
            found = records.describe_file(path, name)
            yield SourceFile.model_validate(
                {"use": use, "name": name, "size": found.size, "sha256": found.sha256, "licence": licence or OWN}
            )

    return (*described(train, "train"), *described(evaluation, "evaluation"))


def describe(
    store: Store,
    recipe: Recipe,
    base: BaseModelRef,
    datasets: Sequence[str],
    files: Sequence[SourceFile],
    parent: CheckpointRef | None,
    licences: LicenceRecord,
    checked: str | None = None,
) -> Digests:
    """All digests of a run that is about to begin. `datasets` are those to train on and, perhaps, to evaluate on."""
    return Digests(
        config=records.digest_of_value(recipe.model_dump(mode="json", by_alias=True)),
        code=code(),
        base=_of_base(store, base),
        data=datasets[0],
        evaluation=datasets[1] if len(datasets) > 1 else None,
        sources=records.digest_of_value([[each.use, each.name, each.sha256] for each in files]),
        prepared=checked,
        licences=records.digest_of_value(licences.model_dump(mode="json")),
        checks=records.digest_of_value([_counted(store, each) for each in datasets]),
        parent=_of_checkpoint(store, parent) if parent else None,
    )


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


def _of_base(store: Store, base: BaseModelRef) -> str:
    try:
        manifest = records.read(store, keys.model_manifest(base.name, base.revision), ModelManifest)
    except ObjectNotFound:
        return base.revision  # of the Hub: a commit
    return records.digest_of(manifest.files)


def _counted(store: Store, dataset: str) -> object:
    """What tokenising counted and left out; not when that was."""
    manifest = records.read(store, keys.dataset_manifest(dataset), DatasetManifest)
    return manifest.model_dump(mode="json", exclude={"created_at"})


def _of_checkpoint(store: Store, parent: CheckpointRef) -> str:
    return sha256(store.get(keys.checkpoint_manifest(parent.run_id, parent.step))).hexdigest()
