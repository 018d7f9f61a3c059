"""Near duplicates and near leakage of a whole set: signatures in a file, and in memory only what is looked at.

A signature is 512 bytes, so that those of a million rows would be half a gigabyte. They are written to a file as they
come from the store, and only those of candidates are read again. Mapped into memory, a few of them in every 64 KiB
would bring in the whole file: a driver of a million rows then had 991 MiB.
"""

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import numpy as np
import numpy.typing as npt

from cluster import keys
from cluster.store import Store
from jobs.data import near, stage
from jobs.data.examine import KEPT
from jobs.data.table import Table
from jobs.data.whole import Pairs


def pairs(table: Table, digest: str, threshold: float, store: Store) -> Pairs:
    """Each row that stays and is nearly an earlier one, with that one and their estimated similarity."""
    rows = np.flatnonzero(table.why == KEPT)
    if len(rows) < 2:
        return []
    size = near.PERMUTATIONS // near.band_size(near.PERMUTATIONS, threshold)
    with tempfile.TemporaryDirectory() as folder:
        signatures_file, bands_file = Path(folder) / "signatures", Path(folder) / "bands"
        bands = np.memmap(bands_file, np.uint64, "w+", shape=(size, len(rows))).T  # a band's column lies in one piece
        done = 0
        with signatures_file.open("wb") as file:  # written, not mapped: what is mapped and written counts as resident
            for part, (start, end) in enumerate(zip(table.starts[:-1], table.starts[1:], strict=True)):
                _, columns = stage.read_part(store.get(keys.prepared_part(digest, part)))
                some = stage.signatures_in(columns)[table.why[start:end] == KEPT]
                file.write(some.tobytes())
                bands[done : done + len(some)] = near.bands(some, threshold)
                done += len(some)
        with _Signatures(signatures_file, len(rows)) as signatures:
            found = near.groups(bands, cast("near.UInt32", signatures), threshold)
    return [(int(rows[of]), int(rows[index]), similarity) for of, index, similarity in found]


class _Signatures:
    """What `near.groups` needs of an array [rows, permutations] of signatures, read from a file row by row."""

    def __init__(self, path: Path, rows: int) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._rows = rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        os.close(self._file)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        size = 4 * near.PERMUTATIONS
        read = b"".join([os.pread(self._file, size, size * row) for row in rows.tolist()])
        return np.frombuffer(read, np.uint32).reshape(len(rows), near.PERMUTATIONS)
