"""The rows of a data file, each with its place: from a recipe's address of a file to dictionaries.

locate      recipe's address of a file  ->  a local path
read_rows   a local path                ->  (place, row), or (place, why it cannot be used)
read_raw    the same, with lines of JSON left as bytes, for whoever parses them elsewhere: parse_line
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from cluster.errors import DataError, ObjectNotFound
from cluster.store import Store

Row = dict[str, object]


@dataclass(frozen=True)
class Place:
    """Where a row stands: a file as the person named it, and a line (in Parquet: a row), from 1."""

    file: str
    number: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}: row {self.number}"


@dataclass(frozen=True)
class Unusable:
    """Why a row cannot be used. `agreed`: the recipe asked for it to be left out (data.overlong: drop),
    so that it is reported but does not count towards the share of bad rows that stops a run."""

    reason: str
    agreed: bool = False


def locate(source: str, store: Store | None, cache: Path, base: Path) -> Path:
    """The local file behind a recipe's `source`, fetched if it lies elsewhere.

    `path` (relative to `base`), `file:///path`, `hf://datasets/owner/name[@revision]/file` (kept in the hub's own
    cache), `store:KEY` in the run's store, `s3://bucket/key` in any bucket. Objects of a store are fetched anew each
    time, since one could have been replaced. Raises DataError when nothing is there, StoreError from the store.
    """
    if source.startswith("hf://"):
        return _from_hub(source)
    if source.startswith(("store:", "s3://")):
        return _from_store(source, store, cache)
    path = Path(unquote(urlsplit(source).path)) if source.startswith("file://") else base / Path(source).expanduser()
    if path.is_file():
        return path
    found = "that is a folder: name one file in it" if path.is_dir() else "there is no such file"
    raise DataError(
        f"data file {source}: looked at {path}, {found}. Paths count from {base}; "
        "files elsewhere are hf://datasets/owner/name/file, store:KEY or s3://bucket/key"
    )


def read_rows(path: Path, name: str) -> Iterator[tuple[Place, Row | Unusable]]:
    """The rows of a .json, .jsonl, .ndjson or .parquet file, in order; `name` is what places call the file.

    JSON is an array of objects, {"data": [...]}, or one object a line whatever the ending says. A line that is not
    JSON is Unusable; inside an array a fault hides everything behind it, so that the whole file is refused.
    Raises DataError for a file that cannot be read as any of these, or that holds no row.
    """
    empty = True
    for place, row in _reader(path, name)(path, name):
        empty = False
        yield place, row if isinstance(row, dict | Unusable) else Unusable(f"a row is an object, not {kind_of(row)}")
    if empty:
        raise DataError(f"{name}: no rows in the file")


def read_raw(path: Path, name: str) -> Iterator[tuple[Place, Row | Unusable | bytes]]:
    """As `read_rows`, but of a file with an object a line the lines themselves, which `parse_line` reads.

    Raises DataError as `read_rows` does, except that a file whose every line is faulty is not refused as a whole.
    """
    if _reader(path, name) is not _read_lines:
        yield from read_rows(path, name)
        return
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and line != codecs.BOM_UTF8:
                empty = False
                yield Place(name, number), line
    if empty:
        raise DataError(f"{name}: no rows in the file")


def parse_line(line: bytes) -> Row | Unusable:
    """The row in a line of JSON, or why there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Unusable(f"byte {error.start + 1} of the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Unusable(_fault(error))
    return row if isinstance(row, dict) else Unusable(f"a row is an object, not {kind_of(row)}")


# The start and the end of an array of rows, bare or as {"data": [...]}.
_ARRAY = re.compile(r'\s*(\{\s*"data"\s*:\s*)?\[\s*')
_ARRAY_END = {False: re.compile(r"\s*\Z"), True: re.compile(r"\s*\}\s*\Z")}
_AFTER_ROW = re.compile(r"\s*([,\]]?)\s*")


def _reader(path: Path, name: str) -> Callable[[Path, str], Iterator[tuple[Place, object]]]:
    """How to read a file. A `.json` file's first letters decide, since many hold one object a line."""
    match path.suffix.lower():
        case ".parquet":
            return _read_parquet
        case ".jsonl" | ".ndjson":
            return _read_lines
        case ".json":
            with path.open("rb") as file:
                head = file.read(4096).decode("utf-8-sig", errors="replace")
            return _read_array if _ARRAY.match(head) else _read_lines
        case suffix:
            raise DataError(f"{name}: ending '{suffix}': data files end in .json, .jsonl, .ndjson or .parquet")


def _read_array(path: Path, name: str) -> Iterator[tuple[Place, object]]:
    """Walk an array row by row, so that each row's place is the line it starts on."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start + 1:,} is not UTF-8: save the file as UTF-8") from error
    start = _ARRAY.match(text)
    assert start is not None  # _reader has matched it
    position, line, counted = start.end(), 1, 0
    ended = text.startswith("]", position)
    if ended:
        position += 1
    decoder = json.JSONDecoder()
    while not ended:
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"{name}:{at}: {_fault(error)}; nothing behind it can be read") from error
        yield Place(name, line), row
        after = _AFTER_ROW.match(text, position)
        if after is None or not after[1]:
            raise DataError(f"{name}:{line}: ',' or ']' is missing after the row that starts here")
        ended, position = after[1] == "]", after.end()
    if not _ARRAY_END[start[1] is not None].match(text, position):
        line += text.count("\n", counted, position)
        raise DataError(f"{name}:{line}: more text follows the array's end: make it one array, or one object a line")


def _read_lines(path: Path, name: str) -> Iterator[tuple[Place, object]]:
    """One JSON value a line; blank lines hold none."""
    first_fault, any_object = "", False
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row: object
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                row = Unusable(f"byte {error.start + 1} of the line is not UTF-8")
            except (ValueError, RecursionError) as error:
                row = Unusable(_fault(error))
            any_object = any_object or isinstance(row, dict)
            if isinstance(row, Unusable):
                first_fault = first_fault or f"{name}:{number}: {row.reason}"
            yield Place(name, number), row
    if first_fault and not any_object:
        raise DataError(f"{name}: neither an array of rows nor one JSON object a line; the first fault: {first_fault}")


def _read_parquet(path: Path, name: str) -> Iterator[tuple[Place, object]]:
    import pyarrow as arrow  # here, because it takes a fifth of a second and most runs read JSON
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield Place(name, number, "row"), _without_nulls(row)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not readable as Parquet after row {number}: {error}") from error


def _without_nulls(value: object) -> object:
    """Arrow gives every struct of a column the same fields, so that one tool's arguments would show up in all
    others as nulls, and be learned. A null field is therefore an absent one."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at column {error.colno}: {error.msg}"
    return f"not readable JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"


def _from_hub(source: str) -> Path:
    from huggingface_hub import errors, hf_hub_download  # here: slow to import, and only this function needs it

    address = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", source)
    if address is None:
        raise DataError(f"data file {source}: write hf://datasets/owner/name/file or …/name@revision/file")
    repo, revision, file = address.groups()
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    except (errors.HFValidationError, OSError) as error:  # all that the hub answers, and the network's own
        match error:
            case errors.GatedRepoError():
                fault = f"{repo} is gated: accept its terms on the hub, then set HF_TOKEN"
            case errors.RepositoryNotFoundError():
                fault = f"no data set {repo}: correct the name, or set HF_TOKEN if it is private"
            case errors.RevisionNotFoundError():
                fault = f"{repo} has no revision {revision}: name a branch, tag or commit"
            case errors.RemoteEntryNotFoundError():
                fault = f"{repo} has no file {file}: name one that its page lists"
            case _:
                fault = f"{error} On a cluster without a hub, give the file as store:KEY"
        raise DataError(f"data file {source}: {fault}") from error


def _from_store(source: str, store: Store | None, cache: Path) -> Path:
    if source.startswith("store:"):
        if store is None:
            raise DataError(f"data file {source}: no store is set: set `store`, or give a path")
        owner, key = store, source.removeprefix("store:").strip("/")
    else:
        from cluster.s3 import S3Store  # not open_store, whose probe would need the right to write there

        parts = urlsplit(source)
        key = parts.path.strip("/")
        owner = S3Store(parts.netloc, "")
    if not key:
        raise DataError(f"data file {source}: names no object: write store:KEY or s3://bucket/key")
    # The digest keeps equal file names apart; the ending stays, because it says how to read the file.
    target = cache / hashlib.sha256(f"{owner.url}\n{key}".encode()).hexdigest()[:16] / Path(key).name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        owner.download(key, target)
    except ObjectNotFound as error:
        raise DataError(
            f"data file {source}: no object {key!r} in {owner.url}: upload it, or correct the key"
        ) from error
    return target


def kind_of(value: object) -> str:
    """What a JSON value is, in words for a message."""
    if value is None:
        return "nothing"
    if value is True or value is False:
        return "true or false"
    for type_, words in ((str, "string"), (list, "list"), (dict, "object"), ((int, float), "number")):
        if isinstance(value, type_):
            return f"an empty {words}" if value in ("", [], {}) else f"{'an' if words == 'object' else 'a'} {words}"
    return type(value).__name__
