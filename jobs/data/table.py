"""What all rows of a set have in common, in some forty bytes each: enough for what no row alone decides.

A million rows are 50 MB here, and signatures for near duplicates 512 bytes a row besides, which lie in a file that is
mapped into memory and not in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.data.request import Source
from jobs.data.stage import PartReport

Numbers = npt.NDArray[np.int64]


class Names:
    """Texts as numbers, in the order in which they came."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}

    def encode(self, column: pa.ChunkedArray) -> npt.NDArray[np.int32]:
        """[rows] the number of each text of an Arrow column."""
        encoded = pc.dictionary_encode(column).combine_chunks()
        numbers = [self._number(name) for name in encoded.dictionary.to_pylist()]
        codes: npt.NDArray[np.int32] = np.array(numbers, np.int32)[encoded.indices.to_numpy(zero_copy_only=False)]
        return codes

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]


@dataclass
class Table:
    """All rows, in the order of their parts; every array is [rows] but `digests`, which is [rows, 2].

    Attributes:
        starts: [parts + 1] where each part's rows begin.
        why: 0 for a row that stays; a check that takes one out writes itself in here.
    """

    sources: Sequence[Source]
    reports: list[PartReport]
    starts: Numbers
    number: Numbers
    source: npt.NDArray[np.uint16]
    why: npt.NDArray[np.uint8]
    digests: npt.NDArray[np.uint64]
    characters_before: npt.NDArray[np.uint32]
    characters: npt.NDArray[np.uint32]
    tokens: npt.NDArray[np.uint32]
    language: npt.NDArray[np.int32]
    group: npt.NDArray[np.int32]
    synthetic: npt.NDArray[np.bool_]
    languages: list[str]
    groups: list[str]

    @property
    def is_evaluation(self) -> npt.NDArray[np.bool_]:
        flags = np.array([source.split == "evaluation" for source in self.sources])
        found: npt.NDArray[np.bool_] = flags[self.source]
        return found

    def place(self, index: int) -> str:
        """Where a row stands in its file."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        name, number = self.sources[self.source[index]].name, self.number[index]
        return f"{name}:{number}" if self.reports[part].unit == "line" else f"{name}: row {number}"


def gather(parts: Iterator[tuple[PartReport, pa.Table]], sources: Sequence[Source]) -> Table:
    """One table of all parts, which are dropped as they are read."""
    languages, groups = Names(), Names()
    reports: list[PartReport] = []
    columns: dict[str, list[npt.NDArray[np.generic]]] = {}

    def add(name: str, values: npt.NDArray[np.generic]) -> None:
        columns.setdefault(name, []).append(values)

    for report, table in parts:
        reports.append(report)
        for name in ("number", "why", "characters_before", "characters", "tokens", "synthetic"):
            add(name, table[name].to_numpy().copy())
        add("digests", _words(table["digest"]))
        add("language", languages.encode(table["language"]))
        add("group", groups.encode(table["group"]))
        add("source", np.full(len(table), report.source, np.uint16))
    starts = np.cumsum([0, *(report.rows for report in reports)])
    whole = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
    return Table(sources, reports, starts, languages=languages.names, groups=groups.names, **whole)


def _words(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """[rows, 2] of a column of sixteen bytes."""
    array = column.combine_chunks()
    width = array.type.byte_width
    flat = np.frombuffer(array.buffers()[1], np.uint64, len(array) * width // 8, array.offset * width)
    return flat.reshape(len(array), width // 8).copy()
