"""What is written under the keys: small JSON records, each immutable once it is there.

Training writes them and serving reads them; they are all that the two share. A record says which
files belong to it with their sizes and SHA-256, so it is written last and is the commit.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from mmap import mmap
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster import keys
from cluster.errors import ObjectDamaged, ObjectNotFound
from cluster.store import Store


class Record(BaseModel):
    """Base of all records. Unknown keys are kept out, so a typo in a writer fails its tests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read(store: Store, key: str, kind: type[AnyRecord]) -> AnyRecord:
    """The record under `key`. Raises ObjectNotFound; ObjectDamaged when it is not such a record."""
    data = store.get(key)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ObjectDamaged(f"{store.url}/{key} is not a {kind.__name__}: {where}{first['msg']}") from error


def now() -> str:
    """The time in UTC, to the second, as records hold it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class FileRecord(Record):
    """One file of a record: its name below the record's prefix, size in bytes, SHA-256 in hex."""

    file: str
    size: int
    sha256: str


def describe_file(path: Path, file: str) -> FileRecord:
    """Size and SHA-256 of a local file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(file=file, size=path.stat().st_size, sha256=digest)


def describe_memory(data: mmap, file: str) -> FileRecord:
    """Size and SHA-256 of what is in memory and will be uploaded as `file`. Other threads run meanwhile."""
    with memoryview(data) as view:  # released at once: an mmap that a view looks into cannot be closed
        digest = hashlib.sha256(view).hexdigest()
    return FileRecord(file=file, size=len(data), sha256=digest)


def digest_of(files: Iterable[FileRecord]) -> str:
    """One SHA-256 over a set of files, whatever their order: the identity of an adapter or a model folder."""
    lines = sorted(f"{file.sha256}  {file.file}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_of_value(value: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fetch_files(store: Store, prefix: str, files: Iterable[FileRecord], folder: Path) -> None:
    """Download a record's files into `folder` and check each. Raises ObjectNotFound, ObjectDamaged."""

    def fetch(file: FileRecord) -> None:
        path = folder / file.file
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = store.download(prefix + file.file, path)
        if FileRecord(file=file.file, size=path.stat().st_size, sha256=digest) != file:
            raise ObjectDamaged(f"{store.url}/{prefix}{file.file}: size or SHA-256 differs from its record")

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(fetch, files):
            pass


ArtefactKind = Literal["base", "data", "teacher"]
"""What a thing was to that which was made from it: its weights, its rows, or whose outputs those are."""


class Artefact(Record):
    """One thing with a licence of its own that a model was made from.

    `licence` is as declared (an SPDX expression or a Hub id); None where nobody said. `of` is the name of what was made
    from it, where that is not the model itself. `is_multimodal` is None where it is not known.
    """

    kind: ArtefactKind
    name: str
    licence: str | None
    of: str | None = None
    is_multimodal: bool | None = None


def distinct(artefacts: Iterable[Artefact]) -> tuple[Artefact, ...]:
    """Each thing once, in order: one of which it is not known whether it is multimodal is the same as where it is."""
    found: dict[Artefact, list[Artefact]] = {}
    for artefact in artefacts:
        known = found.setdefault(artefact.model_copy(update={"is_multimodal": None}), [])
        if artefact.is_multimodal is not None and artefact not in known:
            known.append(artefact)
    return tuple(each for unknown, known in found.items() for each in known or [unknown])


class LicenceRecord(Record):
    """How a run was judged before anything was spent: from what, by whose policy, for which uses.

    `verdicts` has a verdict for each use; `duties` are sentences; `notice` is the text for the NOTICE of what is made.
    `facts` is the SHA-256 of the table of licences.
    """

    artefacts: tuple[Artefact, ...]
    organisation: dict[str, Any]
    facts: str
    on: str
    verdicts: dict[str, str]
    duties: tuple[str, ...]
    notice: str


class BaseModelRef(Record):
    """Which base an adapter belongs to: nothing else may serve it."""

    name: str
    revision: str
    licence: str


class CheckpointRef(Record):
    """A committed checkpoint of a run."""

    run_id: str
    step: int


class SourceFile(Record):
    """A data file that a run read, under the name that its recipe has for it. `licence` is as declared, or `own`."""

    use: Literal["train", "evaluation"]
    name: str
    size: int
    sha256: str
    licence: str | None = None


class Digests(Record):
    """What a run, and all that came of it, was made of: hex digests; None where there is no such thing.

    `config` is of the resolved recipe, `code` of the program's files, `base` of the base's files (of one that the store
    does not hold, its commit), `data` and `evaluation` name tokenised datasets, `sources` is of the data files' names
    and contents, `prepared` of the set of checked rows, `licences` of how the run was judged, `checks` of
    what the checks of the rows counted and left out, `parent` of the manifest of the checkpoint that it began from.
    """

    config: str
    code: str
    base: str
    data: str
    evaluation: str | None = None
    sources: str | None = None
    prepared: str | None = None
    licences: str | None = None
    checks: str | None = None
    parent: str | None = None


class AdapterRef(Record):
    """One version of an adapter, and the digest of its weights."""

    name: str
    version: int
    digest: str


class Made(Record):
    """How the weights in a folder came to be; `luthier.json` in what is exported, and in the manifest of such a model.

    `kind` is what they are: an adapter, one merged into its base, or a model that was trained in full.
    """

    kind: Literal["adapter", "merged", "model"]
    run_id: str
    step: int | None = None
    base: BaseModelRef
    adapter: AdapterRef | None = None
    digests: Digests | None = None
    artefacts: tuple[Artefact, ...] = ()


class ModelManifest(Record):
    """A base model mirrored in the store. `artefacts` is what it was made from, as far as that is known.

    `made` says how, of one that runs here have made.
    """

    name: str
    revision: str
    source: str
    licence: str
    files: tuple[FileRecord, ...]
    created_at: str
    artefacts: tuple[Artefact, ...] = ()
    made: Made | None = None

    @property
    def chain(self) -> tuple[Artefact, ...]:
        """What it was made from; of an older record itself alone."""
        return self.artefacts or (Artefact(kind="base", name=self.name, licence=self.licence),)


class DatasetManifest(Record):
    """A tokenised dataset. `skipped` counts rows that could not be used, by reason; `cut` samples lost their end to
    the length that they may have, as the recipe asked."""

    digest: str
    files: tuple[FileRecord, ...]
    samples: int
    tokens: int
    supervised_tokens: int
    cut: int = 0
    skipped: dict[str, int]
    created_at: str


Suite = Literal["loss", "answers", "regression", "safety"]
"""What a version is measured by before an alias may point at it."""


class SuiteFile(Record):
    """A file of prompts that is in the store under its SHA-256; `source` is what the recipe called it."""

    suite: Suite
    source: str
    sha256: str

    @property
    def key(self) -> str:
        return keys.suite_file(self.sha256, Path(self.source).suffix.lower())


class Requirement(Record):
    """What a version must show before an alias may point at it: all that decides the figures, and their thresholds.

    `settings` is the recipe's section `evaluation`, `dataset` the digest of the tokenised held-out rows, `scorers` the
    SHA-256 of each scorer's source file; `compares` says whether it is measured against the version in `stable` too.
    `digest` covers the rest: another suite or threshold is another requirement.
    """

    digest: str
    suites: tuple[Suite, ...]
    settings: dict[str, Any]
    compares: bool
    dataset: str | None = None
    files: tuple[SuiteFile, ...] = ()
    scorers: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(
        cls,
        suites: tuple[Suite, ...],
        settings: dict[str, Any],
        compares: bool = False,
        dataset: str | None = None,
        files: tuple[SuiteFile, ...] = (),
        scorers: dict[str, str] | None = None,
    ) -> "Requirement":
        """With its digest."""
        made = cls(
            digest="",
            suites=suites,
            settings=settings,
            compares=compares,
            dataset=dataset,
            files=files,
            scorers=scorers or {},
        )
        described = json.dumps(made.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return made.model_copy(update={"digest": hashlib.sha256(described.encode()).hexdigest()})


class RunRecord(Record):
    """What a run was asked to do; written once, before anything is spent. Enough to go on with it anywhere.

    `dataset` and `evaluation` are digests of tokenised datasets, `prepared` that of the set of checked rows which they
    were made from; `parent` is the checkpoint that its weights began as; `reproduces` the run that it repeats;
    `gate` is what its result must show before an alias moves to it. Older records lack what follows `created_at`.
    """

    run_id: str
    recipe: dict[str, Any]
    dataset: str
    evaluation: str | None
    prepared: str | None = None
    code_revision: str
    versions: dict[str, str]
    base: BaseModelRef
    parent: CheckpointRef | None = None
    licences: LicenceRecord | None = None
    gate: Requirement | None = None  # what its result must show before an alias moves to it
    created_at: str
    by: str | None = None
    sources: tuple[SourceFile, ...] = ()
    digests: Digests | None = None
    reproduces: str | None = None


RunState = Literal["preparing", "running", "saving", "resuming", "succeeded", "failed", "stopped", "lost"]
ENDED: tuple[RunState, ...] = ("succeeded", "failed", "stopped")
LOST_AFTER_S = 60.0
"""A run that has not ended and whose driver has been silent for so long is lost."""

EventKind = Literal["attempt", "failure", "memory", "move", "skipped", "evaluation"]
"""What an event tells of where a reader goes by it: workers that start, a failure, memory that was too small, a move to
other workers, a step that is not finite, a measured evaluation loss."""


class RunEvent(Record):
    """One thing that happened to a run, in a sentence; `state` where it changed the run's state.

    `step` is how many steps were done then; `steps_lost` and `seconds_lost` are what is to be done again because of it.
    """

    at: str
    state: RunState | None = None
    kind: EventKind | None = None
    text: str
    step: int | None = None
    evaluation_loss: float | None = None
    steps_lost: int = 0
    seconds_lost: float = 0.0


def run_state(store: Store, run_id: str, events: Sequence[RunEvent]) -> RunState:
    """The last state that an event gave; `lost` when the driver has gone silent in one that is not an end."""
    state: RunState = next((event.state for event in reversed(events) if event.state), "preparing")
    return state if state in ENDED or _silent_s(store, run_id) <= LOST_AFTER_S else "lost"


def _silent_s(store: Store, run_id: str) -> float:
    """Seconds since the driver's last sign of life; infinite without any."""
    try:
        last = read(store, keys.heartbeat(run_id), Heartbeat)
    except ObjectNotFound:
        return float("inf")
    return (datetime.now(UTC) - datetime.fromisoformat(last.at)).total_seconds()


class AttemptRecord(Record):
    """One start of a run's workers: every step from `first_step` on that an earlier attempt did is done again.

    `world_size` and `micro_batch` are what it was done with, where the recipe leaves a choice or could not be kept to.
    `id` is random, so that two drivers cannot write the same record.
    """

    number: int
    id: str
    first_step: int
    world_size: int
    micro_batch: int
    at: str


class Heartbeat(Record):
    """Written by a run's driver while it lives; `driver` is that process's own random name."""

    at: str
    driver: str


class StopRequest(Record):
    """Somebody asked a run to stop. The first saves before; a second one does not wait for that."""

    by: str
    at: str


class CheckpointManifest(Record):
    """The commit of a checkpoint: every shard with its hash, and where in the run it stands.

    `updates` is how many updates the optimizer has made; `metric` is what the best checkpoints are chosen by (lower is
    better), where there is such a figure.
    """

    run_id: str
    step: int
    attempt: int
    updates: int
    samples_seen: int
    world_size: int
    metric: float | None
    files: tuple[FileRecord, ...]
    created_at: str


class AdapterRecord(Record):
    """The commit of an adapter version. `artefacts` is what it was made from; older records have only their base.

    `parent` is the checkpoint that its weights began as; `gate` is what it must show before an alias may point at it:
    without, every alias may.
    """

    name: str
    version: int
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    files: tuple[FileRecord, ...]
    base: BaseModelRef
    run_id: str
    step: int
    metrics: dict[str, float] = Field(default_factory=dict)
    created_at: str
    artefacts: tuple[Artefact, ...] = ()
    digests: Digests | None = None
    parent: CheckpointRef | None = None
    gate: Requirement | None = None

    @property
    def chain(self) -> tuple[Artefact, ...]:
        """What it was made from; of an older record its base alone is known."""
        return self.artefacts or (Artefact(kind="base", name=self.base.name, licence=self.base.licence),)


class Canary(Record):
    """A version on trial, and the share of the name's traffic that it is meant for."""

    version: int
    percent: int = Field(ge=0, le=100)


class AliasEntry(Record):
    """One entry of an adapter's alias log: the whole state after one change. The highest number holds.

    `overridden` is why the evaluation gate had refused this change, where somebody made it all the same.
    """

    stable: int | None = None
    canary: Canary | None = None
    others: dict[str, int] = Field(default_factory=dict)
    by: str
    why: str
    at: str
    overridden: tuple[str, ...] = ()
