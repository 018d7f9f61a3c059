"""Tokenise once: rows to samples on CPU workers, into the store's dataset cache, before any GPU is taken.

    datasets/<digest>/{shard-00000.arrow, …, dataset.json}      dataset.json last

The digest covers all that decides the samples: the bytes of the data files, the tokenizer and its template, where
generation stops, the length and what is done with longer samples, and FORMAT. Runs that ask for the same thing read the
same dataset.

A shard is an Arrow file with a row per sample: `input_ids` (list of int32) and `supervised` (list of bool, as long).
"""

import fcntl
import gc
import hashlib
import json
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster import keys, records
from cluster.errors import DataError, ModelError, ObjectExists, StoreError
from cluster.models import cache_folder
from cluster.records import DatasetManifest, FileRecord
from cluster.store import Store
from jobs.chat import Overlong, Renderer, Sample
from jobs.config import DataConfig
from jobs.formats import normalise
from jobs.rows import Place, Row, Unusable, locate, read_rows
from jobs.tasks import bounded

Ids = npt.NDArray[np.int64]

FORMAT = 2
"""Raised whenever the same rows would give other samples: old caches are then left alone."""

ROWS_PER_SHARD = 2_000
EXAMPLES_SHOWN = 5
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("supervised", pa.list_(pa.bool_()))])
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",  # at which tokens an answer ends
)


@dataclass(frozen=True)
class Fault:
    """A row that could not be used."""

    place: str
    reason: str
    agreed: bool


@dataclass(frozen=True)
class _ShardResult:
    file: FileRecord | None
    samples: int
    tokens: int
    supervised_tokens: int
    cut: int
    faults: list[Fault]


def locate_all(sources: Sequence[str], store: Store, base: Path) -> list[tuple[str, Path]]:
    """Every data file, under the name that the person gave it, on this machine. Raises DataError."""
    return [(source, locate(source, store, cache_folder() / "data", base)) for source in sources]


def prepare(
    files: Sequence[tuple[str, Path]], data: DataConfig, model_folder: Path, store: Store
) -> tuple[DatasetManifest, list[Fault]]:
    """The tokenised dataset for these files, made by Ray tasks unless the store has it.

    Args:
        files: (name, path) of each data file, on the driver's machine.
        model_folder: holds the tokenizer.

    Returns:
        The manifest, and the rows left out (empty when the dataset was there already).

    Raises:
        DataError: a file is unreadable, or more than `data.max_unusable` of the rows cannot be used.
        ModelError: the tokenizer or its chat template cannot be used.
    """
    digest = dataset_digest(files, data, model_folder)
    if store.exists(keys.dataset_manifest(digest)):
        return records.read(store, keys.dataset_manifest(digest), DatasetManifest), []
    _check_tokenizer(model_folder, data)
    tokenizer = {
        name: (model_folder / name).read_bytes()
        for name in (*TOKENIZER_FILES, "config.json")
        if (model_folder / name).exists()
    }
    shipped = ray.put(tokenizer)
    calls = (
        (_tokenise_remote(shipped, chunk, index, digest, data.sequence_length, data.overlong, store), index)
        for index, chunk in enumerate(_chunks(files))
    )
    results: dict[int, _ShardResult] = {index: result for result, index in bounded(calls)}
    manifest, faults = _summarise([results[index] for index in sorted(results)], digest)
    try:
        _judge(faults, manifest.samples, data)
    except DataError:
        for file in manifest.files:  # shards that no dataset.json will ever name
            store.delete(keys.dataset_prefix(digest) + file.file)
        raise
    with suppress(ObjectExists):  # another job made the same dataset meanwhile
        store.create(keys.dataset_manifest(digest), manifest.to_bytes())
    return manifest, faults


def dataset_digest(files: Sequence[tuple[str, Path]], data: DataConfig, model_folder: Path) -> str:
    """What the samples depend on, as one SHA-256 in hex."""
    described = {
        "format": FORMAT,
        "files": [records.describe_file(path, "").sha256 for _, path in files],
        "tokenizer": [
            (name, records.describe_file(model_folder / name, name).sha256)
            for name in TOKENIZER_FILES
            if (model_folder / name).exists()
        ],
        "stops": _stops(model_folder),
        "sequence_length": data.sequence_length,
        "overlong": data.overlong,
        "max_unusable": data.max_unusable,
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:40]


def _stops(folder: Path) -> object:
    """Where generation stops by config.json, which counts where the folder has no settings for generation."""
    path = folder / "config.json"
    if (folder / "generation_config.json").exists() or not path.exists():
        return None
    config = json.loads(path.read_text())
    return config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))


def _check_tokenizer(model_folder: Path, data: DataConfig) -> None:
    """Raise ModelError here, on the driver, rather than from a worker."""
    from jobs.model import load_tokenizer

    Renderer(load_tokenizer(model_folder), data.sequence_length, data.overlong)


def _chunks(files: Sequence[tuple[str, Path]]) -> Iterator[list[tuple[Place, Row | Unusable]]]:
    rows = (row for name, path in files for row in read_rows(path, name))
    while chunk := list(islice(rows, ROWS_PER_SHARD)):
        yield chunk


def _tokenise_remote(*arguments: object) -> "ray.ObjectRef[_ShardResult]":
    return ray.remote(num_cpus=1, max_retries=3)(tokenise_shard).remote(*arguments)


def tokenise_shard(
    tokenizer_files: dict[str, bytes],
    rows: Iterable[tuple[Place, Row | Unusable]],
    index: int,
    digest: str,
    sequence_length: int,
    overlong: Overlong,
    store: Store,
) -> _ShardResult:
    """One Ray task: render and tokenise a chunk of rows, and write its shard to the store."""
    renderer = _renderer(tuple(sorted(tokenizer_files.items())), sequence_length, overlong)
    shard = _Columns()
    faults: list[Fault] = []
    with _without_collections():
        for place, row in rows:
            example = row if isinstance(row, Unusable) else normalise(row)
            try:
                sample = example if isinstance(example, Unusable) else renderer.render(example)
            except ModelError as error:  # found at the first row that needs the template
                raise ModelError(f"{place}: {error}") from error
            if isinstance(sample, Unusable):
                faults.append(Fault(str(place), sample.reason, sample.agreed))
            else:
                shard.add(sample)
    file_record = None
    if shard.lengths:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "shard.arrow"
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
                writer.write_table(shard.table())
            key = keys.dataset_shard(digest, index)
            store.upload(path, key)
            file_record = records.describe_file(path, key.removeprefix(keys.dataset_prefix(digest)))
    return _ShardResult(file_record, len(shard.lengths), len(shard.ids), sum(shard.marks), shard.cut, faults)


@contextmanager
def _without_collections() -> Iterator[None]:
    """A token's place in the text is a tuple: a few rows of them set off a garbage collection that looks through
    all rows of the shard and finds nothing. That was 8% of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Columns:
    """Samples, end to end. As Python objects they took ten times the memory, and their way into Arrow took longer than
    all the tokenising."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.cut = 0  # samples whose end is missing
        self.ids = array("i")
        self.marks = bytearray()

    def add(self, sample: Sample) -> None:
        self.lengths.append(len(sample.input_ids))
        self.cut += sample.cut > 0
        self.ids.extend(sample.input_ids)
        self.marks += bytes(sample.supervised)

    def table(self) -> pa.Table:
        starts = pa.array(np.cumsum([0, *self.lengths], dtype=np.int32))
        ids = pa.array(np.frombuffer(self.ids, dtype=np.int32))
        marks = pa.array(np.frombuffer(self.marks, dtype=np.bool_))
        columns = [pa.ListArray.from_arrays(starts, values) for values in (ids, marks)]
        return pa.Table.from_arrays(columns, schema=SCHEMA)


@lru_cache(maxsize=1)
def _renderer(files: tuple[tuple[str, bytes], ...], sequence_length: int, overlong: Overlong) -> Renderer:
    """Kept from one shard to the next: a worker does many, loading takes up to a second, and a tokenizer that has seen
    some text has its words at hand."""
    from jobs.model import load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        for file, content in files:
            (Path(name) / file).write_bytes(content)
        return Renderer(load_tokenizer(Path(name)), sequence_length, overlong)


def _summarise(results: list[_ShardResult], digest: str) -> tuple[DatasetManifest, list[Fault]]:
    faults = [fault for result in results for fault in result.faults]
    manifest = DatasetManifest(
        digest=digest,
        files=tuple(result.file for result in results if result.file),
        samples=sum(result.samples for result in results),
        tokens=sum(result.tokens for result in results),
        supervised_tokens=sum(result.supervised_tokens for result in results),
        cut=sum(result.cut for result in results),
        skipped=dict(Counter(fault.reason for fault in faults)),
        created_at=records.now(),
    )
    return manifest, faults


def _judge(faults: list[Fault], samples: int, data: DataConfig) -> None:
    bad = [fault for fault in faults if not fault.agreed]
    total = len(faults) + samples
    if samples and len(bad) <= data.max_unusable * total:
        return
    shown = "".join(f"\n  {fault.place}: {fault.reason}" for fault in (bad or faults)[:EXAMPLES_SHOWN])
    more = f"\n  and {len(bad) - EXAMPLES_SHOWN} more" if len(bad) > EXAMPLES_SHOWN else ""
    advice = "mend them, or raise data.max_unusable" if samples else "nothing is left to train on"
    raise DataError(
        f"{len(bad) or len(faults)} of {total} rows cannot be used, more than data.max_unusable "
        f"{data.max_unusable:g} allows; {advice}:{shown}{more}"
    )


def read_shard(path: Path) -> pa.Table:
    """A shard's rows, read in place."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class Dataset:
    """A tokenised dataset on this node, read in place: samples by index, nothing copied into memory.

    Attributes:
        lengths: [samples] tokens of each; supervised_counts: [samples] how many of them are supervised.
    """

    def __init__(self, manifest: DatasetManifest, folder: Path) -> None:
        table = pa.concat_tables([read_shard(folder / file.file) for file in manifest.files])
        self._ids = table["input_ids"]
        self._supervised = table["supervised"]
        self.lengths: Ids = pc.list_value_length(self._ids).to_numpy().astype(np.int64)
        learned = pc.list_flatten(self._supervised).to_numpy(zero_copy_only=False)
        ends = np.cumsum(self.lengths)
        running = np.concatenate([[0], np.cumsum(learned, dtype=np.int64)])
        self.supervised_counts: Ids = running[ends] - running[ends - self.lengths]

    @classmethod
    def fetch(cls, store: Store, digest: str) -> "Dataset":
        """Open a dataset, downloading it to this node once whatever the number of processes."""
        manifest = records.read(store, keys.dataset_manifest(digest), DatasetManifest)
        folder = cache_folder() / "datasets" / digest
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                partial = Path(tempfile.mkdtemp(dir=folder.parent))
                try:
                    records.fetch_files(store, keys.dataset_prefix(digest), manifest.files, partial)
                except StoreError:
                    shutil.rmtree(partial)
                    raise
                partial.rename(folder)
        return cls(manifest, folder)

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Token ids and the supervised marks of one sample."""
        ids: npt.NDArray[np.int32] = self._ids[index].values.to_numpy(zero_copy_only=False)
        marks: npt.NDArray[np.bool_] = self._supervised[index].values.to_numpy(zero_copy_only=False)
        return ids, marks
