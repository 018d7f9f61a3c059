"""The Ray and Python that every node gets: those of the checkout, so that what you submit finds what it was made on.

Ray refuses a driver of another Ray, and of another Python down to the patch version; jobs that are submitted run in
the cluster's own Python, for which the minor version must be the same.
"""

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cluster.errors import InputError

ROOT = Path(__file__).parents[2]
"""The checkout: what `requirements.lock` and the packages are read from."""


@dataclass(frozen=True)
class Release:
    """Versions, and the file with all others. `python` is major.minor."""

    ray: str
    python: str
    lock: Path

    @classmethod
    def read(cls, root: Path = ROOT) -> Self:
        """From the lock file and the Python that runs. Raises InputError when it is no checkout of Luthier."""
        lock = root / "requirements.lock"
        pinned = re.search(r"^ray==(\S+)$", lock.read_text(), re.MULTILINE) if lock.is_file() else None
        if pinned is None:
            raise InputError(
                f"{lock}: no Ray version in it; run luthier from a checkout, which says what nodes install"
            )
        return cls(pinned[1], ".".join(platform.python_version_tuple()[:2]), lock)

    @property
    def check(self) -> str:
        """A Python statement, without single quotes, that fails on a node with other versions and says which."""
        wanted = f"Ray {self.ray}, Python {self.python}"
        return (
            'import ray, sys; got = "Ray %s, Python %d.%d" % (ray.__version__, *sys.version_info[:2]); '
            f'assert got == "{wanted}", f"this node has {{got}}; it needs {wanted}"'
        )
