"""Where a text is in the data that a store has: in tokenised datasets, decoded, in the rows of prepared sets, in the
prompts that versions are evaluated by and what was reported of that; and in files of data that are at hand.

Compared are texts without regard to case, to the kind and amount of white space, and to how Unicode writes the same
letter; also as JSON writes it, since templates put tool calls so.
"""

import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster import keys, records
from cluster.errors import DataError, ModelError, ObjectNotFound
from cluster.records import BaseModelRef, DatasetManifest
from cluster.store import Store
from jobs.rows import locate, read_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHOWN = 5
_BATCH = 512
TOKENIZER = "tokenizer.json"

Bases = Iterable[tuple[BaseModelRef, str | None]]


@dataclass(frozen=True)
class Match:
    """A set of data that has the text.

    Attributes:
        kind: `tokenised`, `prepared`, `suite` or `evaluation`.
        digest: the set's; the key of a suite or of a report.
        rows: how many samples, or rows of files, have it.
        places: the first few of them.
        is_trained_on: whether a run on this set learns from it; a row that was taken out is only kept.
    """

    kind: str
    digest: str
    rows: int
    places: tuple[str, ...]
    is_trained_on: bool = True


class Wanted:
    """The texts that are looked for, in every form that data may have them in."""

    def __init__(self, texts: Sequence[str]) -> None:
        forms = [form for text in texts for form in (text, _in_json(text, True), _in_json(text, False))]
        self._forms = tuple(dict.fromkeys(_plain(form) for form in forms))
        assert all(self._forms), "a blank text is in everything"

    def is_in(self, text: str) -> bool:
        """Whether any of them is."""
        plain = _plain(text)
        return any(form in plain for form in self._forms)


def _in_json(text: str, ascii_only: bool) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def in_tokenised(store: Store, digest: str, bases: Bases, wanted: Wanted) -> Match | None:
    """The samples of a tokenised dataset that have it.

    Args:
        bases: those whose tokenizer made it, and where each is from.

    Raises:
        ModelError: there is no tokenizer to read it by.
    """
    try:
        manifest = records.read(store, keys.dataset_manifest(digest), DatasetManifest)
    except ObjectNotFound:
        return None  # of a job that has not finished, or never did; nothing was trained on it
    tokenizer = _tokenizer(store, bases)
    places: list[str] = []
    first = 0
    for file in manifest.files:
        with TemporaryDirectory() as folder:  # a shard at a time, and nothing of it stays on this machine
            records.fetch_files(store, keys.dataset_prefix(digest), [file], Path(folder))
            with pa.OSFile(str(Path(folder) / file.file)) as opened:
                ids = pa.ipc.open_file(opened).read_all()["input_ids"].to_pylist()
        for start in range(0, len(ids), _BATCH):
            texts = tokenizer.decode_batch(ids[start : start + _BATCH], skip_special_tokens=False)
            places += [f"sample {first + start + at}" for at, text in enumerate(texts) if wanted.is_in(text)]
        first += len(ids)
    return Match("tokenised", digest, len(places), tuple(places[:_SHOWN])) if places else None


def _tokenizer(store: Store, bases: Bases) -> "Tokenizer":
    from tokenizers import Tokenizer

    reason = "no run or adapter here says which model's tokenizer made it"
    for base, source in bases:
        key = f"{keys.model_prefix(base.name, base.revision)}{TOKENIZER}"
        try:
            return Tokenizer.from_buffer(store.get(key))
        except ObjectNotFound:
            reason = f"{store.url}/{key} is not there"
        if source and "/" in source and not source.startswith((".", "/", "~")):
            from huggingface_hub import hf_hub_download

            try:
                return Tokenizer.from_file(hf_hub_download(source, TOKENIZER, revision=base.revision))
            except OSError as error:  # all that the Hub's client raises
                reason = f"the tokenizer of {source} cannot be had: {str(error).splitlines()[0]}"
    raise ModelError(reason)


def in_prepared(store: Store, digest: str, wanted: Wanted) -> Iterator[Match]:
    """Rows that stayed are trained on; those of the parts, and examples in cards, are copies that the store keeps."""
    prefix = keys.prepared_prefix(digest)
    stayed: list[str] = []
    kept: list[str] = []
    for item in store.list(prefix):
        name = item.key.removeprefix(prefix)
        if not name.endswith((".jsonl", ".jsonl.zst", ".json")):
            continue
        places = [f"{name}:{number}" for number, text in _lines(store, item.key) if wanted.is_in(text)]
        if name.startswith("rows-"):
            stayed += places
        else:
            kept += places
    for places, is_trained_on in ((stayed, True), (kept, False)):
        if places:
            yield Match("prepared", digest, len(places), tuple(places[:_SHOWN]), is_trained_on)


def in_evaluation(store: Store, wanted: Wanted) -> Iterator[Match]:
    """Files of prompts, and reports, which quote them. Nobody learns from either.

    Raises DataError for prompts that cannot be read."""
    for item in list(store.list(keys.suites_prefix())):
        name = item.key.removeprefix(keys.suites_prefix())
        with TemporaryDirectory() as folder:
            path = Path(folder) / name
            store.download(item.key, path)
            places = _in_file(path, name, wanted)
        if places:
            yield Match("suite", item.key, len(places), tuple(places[:_SHOWN]), is_trained_on=False)
    for item in list(store.list(keys.adapters_prefix())):
        if "/evaluations/" not in item.key or not item.key.endswith(".json"):
            continue
        if any(wanted.is_in(text) for _, text in _lines(store, item.key)):
            yield Match("evaluation", item.key, 1, (item.key.rpartition("/")[2],), is_trained_on=False)


def in_source(store: Store, name: str, sha256: str, wanted: Wanted) -> list[str] | str:
    """The places of a run's data file that have it; or why that cannot be said. Nothing is fetched from elsewhere.

    Args:
        name: as the recipe names the file.
        sha256: of what was trained on.
    """
    if name.startswith(("hf://", "s3://")):
        return "it is not looked into from here"
    with TemporaryDirectory() as folder:
        try:
            path = locate(name, store, Path(folder), Path.cwd())
            places = _in_file(path, name, wanted)
            changed = records.describe_file(path, name).sha256 != sha256
        except (DataError, ObjectNotFound, OSError):
            return "it cannot be read from here"
    if changed and not places:
        return "it is not what was trained on, and does not have it now"
    return places


def _in_file(path: Path, name: str, wanted: Wanted) -> list[str]:
    return [
        str(place)
        for place, row in read_rows(path, name)
        if isinstance(row, dict) and wanted.is_in("\n".join(_texts(row)))
    ]


def _lines(store: Store, key: str) -> Iterator[tuple[int, str]]:
    """Each line's number and all the texts in it; a card is one line."""
    data = store.get(key)
    if key.endswith(".zst"):
        data = pa.CompressedInputStream(io.BytesIO(data), "zstd").read()
    lines = [data] if key.endswith(".json") else data.splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, "\n".join(_texts(json.loads(line)))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
