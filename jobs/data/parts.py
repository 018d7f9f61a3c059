"""Files to parts of rows, on the driver: read as they are needed, so that only a few parts are in memory at a time.

Where a file has an object a line, a part holds the lines and a worker parses them; the driver then reads as fast as
the disk. Arrays and Parquet are parsed here, an array as a whole: large sets are better kept as lines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.data.request import Source
from jobs.rows import Place, Row, Unusable, read_raw

MAX_BYTES = 8 << 20
"""Lines of one part: few long rows must not make a large part."""


@dataclass(frozen=True)
class Part:
    """Rows of one file, in order; `source` counts the request's sources, `bytes_before` what was read up to its end."""

    index: int
    source: int
    places: list[Place]
    rows: list[Row | Unusable | bytes]
    bytes_before: int


def read_parts(sources: Sequence[Source], paths: Sequence[Path], rows_per_part: int) -> Iterator[Part]:
    """All parts, counted from 0. The same files always give the same parts. Raises DataError as `read_raw` does."""
    index = done = 0
    for number, (source, path) in enumerate(zip(sources, paths, strict=True)):
        places: list[Place] = []
        rows: list[Row | Unusable | bytes] = []
        size = read = 0
        for place, row in read_raw(path, source.name):
            length = len(row) if isinstance(row, bytes) else 0
            if rows and (len(rows) == rows_per_part or size + length > MAX_BYTES):
                yield Part(index, number, places, rows, done + read)
                index, places, rows, size = index + 1, [], [], 0
            places.append(place)
            rows.append(row)
            size, read = size + length, read + length
        done += source.size
        yield Part(index, number, places, rows, done)
        index += 1
