"""Near duplicates and near leakage of a whole set: signatures in a file, and in memory only what is looked at.

A signature is 512 bytes, so that those of a million rows would be half a gigabyte. They are written to a file as they
come from the store, and mapped: of them only candidates are ever read again.
"""

import tempfile
from pathlib import Path

import numpy as np

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
        signatures = np.memmap(signatures_file, np.uint32, "r", shape=(len(rows), near.PERMUTATIONS))
        found = near.groups(bands, signatures, threshold)
    return [(int(rows[of]), int(rows[index]), similarity) for of, index, similarity in found]
