"""The Ray tasks: a part examined, its rows and findings in the store; later, the rows of it that stay.

    parts/00012.jsonl.zst   the rows that a row's own checks left, put right, one a line
    parts/00012.arrow       a line for each row that was read (SCHEMA); written last, and says that the part is done
    rows-00012.jsonl        in the end: those that stay

A task that is run again writes the same bytes.
"""

import io
import json
import tempfile
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster import keys, records
from cluster.errors import ObjectExists
from cluster.records import FileRecord, Record
from cluster.store import Store
from jobs.data import near
from jobs.data.examine import Check, Examined, Finding, Outcome, examiner
from jobs.data.parts import Part
from jobs.data.request import Request
from jobs.data.sensitive import excerpt, excerpt_of_change

EXCERPTED = frozenset({"language", "template"})
EXAMPLES = 3
"""Rows named for each check and outcome of a part."""

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # the row's line, or row, in its file
        ("why", pa.uint8()),  # examine.KEPT, or the check that took it out
        ("digest", pa.binary(16)),
        ("characters_before", pa.uint32()),
        ("characters", pa.uint32()),
        ("tokens", pa.uint32()),
        ("language", pa.string()),
        ("group", pa.string()),
        ("synthetic", pa.bool_()),
    ]
)


class RowExample(Record):
    """A row that shows what a check finds."""

    place: str
    note: str
    excerpt: str = ""

    def __str__(self) -> str:
        return f"{self.note}: “{self.excerpt}”" if self.excerpt else self.note


class PartReport(Record):
    """What a part's rows were found to be: by check and outcome or detail; and which models wrote some."""

    source: int
    unit: str
    rows: int
    teachers: tuple[str, ...] = ()
    counts: dict[Check, dict[Outcome, int]]
    details: dict[Check, dict[str, int]]
    examples: dict[Check, dict[Outcome, tuple[RowExample, ...]]]


def examine_part(request: Request, part: Part, store: Store) -> int:
    """Examine a part and write what it gives; returns how many rows it had."""
    check = examiner(request)
    examined = [check.examine(row) for row in part.rows]
    kept = pa.BufferOutputStream()
    with pa.CompressedOutputStream(kept, "zstd") as lines:
        for row in examined:
            if row.row is not None:
                lines.write(json.dumps(row.row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    store.put(keys.prepared_part_rows(request.digest, part.index), kept.getvalue().to_pybytes())
    with suppress(ObjectExists):  # this task was run twice, with the same result
        store.create(keys.prepared_part(request.digest, part.index), _table(part, examined, request))
    return len(part.rows)


def _table(part: Part, examined: list[Examined], request: Request) -> bytes:
    columns: dict[str, object] = {name: [getattr(row, name) for row in examined] for name in SCHEMA.names[1:]}
    table = pa.table({"number": [place.number for place in part.places], **columns}, SCHEMA)
    if _wants_signatures(request):
        table = table.append_column("signature", _signatures(examined))
    table = table.replace_schema_metadata({"report": report_of(part, examined).model_dump_json()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _wants_signatures(request: Request) -> bool:
    return request.rules.duplicates.near != "off" or request.rules.leakage.near != "off"


def _signatures(examined: list[Examined]) -> pa.Array:
    signatures = near.signatures([row.text for row in examined])
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(signatures.itemsize * signatures.shape[1]),
        len(examined),
        [None, pa.py_buffer(np.ascontiguousarray(signatures))],
    )


def signatures_in(table: pa.Table) -> near.UInt32:
    """[rows, permutations] of what `examine_part` wrote."""
    column = table["signature"].combine_chunks()
    flat = np.frombuffer(column.buffers()[1], np.uint32, len(table) * near.PERMUTATIONS)
    return flat.reshape(len(table), near.PERMUTATIONS)


def report_of(part: Part, examined: list[Examined]) -> PartReport:
    """Counts, and the first few examples of each."""
    counts: dict[Check, Counter[Outcome]] = defaultdict(Counter)
    details: dict[Check, Counter[str]] = defaultdict(Counter)
    examples: dict[Check, dict[Outcome, list[RowExample]]] = defaultdict(lambda: defaultdict(list))
    for place, row in zip(part.places, examined, strict=True):
        for found in row.findings:
            counts[found.check][found.outcome] += 1
            details[found.check][found.detail] += 1
            shown = examples[found.check][found.outcome]
            if len(shown) < EXAMPLES:
                shown.append(_example(str(place), row, found))
    return PartReport(
        source=part.source,
        unit=part.places[0].unit,
        rows=len(examined),
        teachers=tuple(sorted({row.teacher for row in examined if row.teacher})),
        counts={check: dict(found) for check, found in counts.items()},
        details={check: dict(found) for check, found in details.items()},
        examples={check: {name: tuple(rows) for name, rows in found.items()} for check, found in examples.items()},
    )


def _example(place: str, row: Examined, found: Finding) -> RowExample:
    shown = ""
    if found.now:
        shown = excerpt_of_change(*found.now)
    elif found.check in EXCERPTED:
        shown = excerpt(row.text)
    return RowExample(place=place, note=found.note, excerpt=shown)


def read_part(data: bytes) -> tuple[PartReport, pa.Table]:
    """What `examine_part` wrote."""
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    return PartReport.model_validate_json(table.schema.metadata[b"report"]), table


def write_rows(
    digest: str, index: int, split: str, copies: npt.NDArray[np.uint16], store: Store
) -> tuple[FileRecord, int] | None:
    """The rows of a part that stay, each as often as `copies` says of it, as a file of the prepared set.

    Args:
        copies: [rows that the part's own checks left].

    Returns:
        The file and its rows; None where no row stays.
    """
    if not copies.any():
        return None
    source = pa.CompressedInputStream(pa.BufferReader(store.get(keys.prepared_part_rows(digest, index))), "zstd")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("wb") as file:
            for line, times in zip(io.BufferedReader(source), copies, strict=True):
                file.write(line * int(times))
        key = keys.prepared_rows(digest, split, index)
        store.upload(path, key)
        return records.describe_file(path, key.removeprefix(keys.prepared_prefix(digest))), int(copies.sum())
