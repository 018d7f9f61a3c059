"""What a submitted job takes along: the files of the working directory that Ray would zip, looked at before it does.

Ray zips first and finds out afterwards that the zip is too large, with a traceback; and it ships whatever lies about.
Which files those are is Ray's own decision (its walk over .gitignore and .rayignore), so that we count what it sends.
"""

import fnmatch
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster import records
from cluster.errors import ConfigError, Fault

MAX_BYTES = 100 << 20
"""Ray's limit for what its dashboard takes, after compressing; before it, here, so that nothing has to be zipped."""

_LARGEST = 5  # folders that are named

_KEYS = (
    *(".env", ".env.*", "*.env", "*.pem", "*.p12", "id_rsa", "id_ed25519", "credentials", "*-key.json"),
    *(".netrc", ".npmrc", ".pypirc", "kubeconfig", "kube.config"),
)
"""Names of files that hold nothing but secrets."""

_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:\\n|\r?\n)")
"""How a private key begins in a file of any name; in JSON its lines end in a written `\\n`."""

_LOOKED_AT_BYTES = 64 << 10  # no key is longer, and of large files only the beginning is read


@dataclass(frozen=True)
class Shipment:
    """Files by their path below `root`, with their sizes in bytes."""

    root: Path
    files: dict[Path, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def largest(self) -> list[tuple[str, int]]:
        """The folders at the top, and the files beside them, that weigh most, with their bytes."""
        sizes: Counter[str] = Counter()
        for path, size in self.files.items():
            sizes[f"{path.parts[0]}/" if len(path.parts) > 1 else path.name] += size
        return sizes.most_common(_LARGEST)

    def check(self, needed: Iterable[str] = ()) -> None:
        """Raise ConfigError when it is too large, holds files that are secrets, or lacks what the job reads.

        Args:
            needed: paths; an absolute one is the cluster's own, one with a scheme is somewhere else.
        """
        faults = [
            Fault(
                name, "", f"is not sent along: it is outside of {self.root}, missing or ignored; put it into the store"
            )
            for name in needed
            if not (Path(name).is_absolute() or ":" in name or Path(os.path.normpath(name)) in self.files)
        ]
        if self.bytes > MAX_BYTES:
            named = ", ".join(f"{name} {_mb(size)}" for name, size in self.largest())
            faults.append(
                Fault(
                    str(self.root),
                    "",
                    f"{_mb(self.bytes)} would be sent to the cluster, and {_mb(MAX_BYTES)} is the limit; largest: "
                    f"{named}. Put what the job does not need into .rayignore, and data into the store",
                )
            )
        faults += [
            Fault(str(self.root / path), "", "looks like a secret, and would be sent along; put it into .rayignore")
            for path in self.files
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in _KEYS) or _holds_a_key(self.root / path)
        ]
        if faults:
            raise ConfigError(faults)


def _holds_a_key(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _PRIVATE_KEY.search(file.read(_LOOKED_AT_BYTES)) is not None
    except OSError:
        return False  # Ray says so when it cannot read it


def shipment(root: Path) -> Shipment:
    """What `ray job submit --working-dir ROOT` would send."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    quiet = logging.getLogger("luthier.package")
    quiet.setLevel(logging.WARNING)
    files: dict[Path, int] = {}

    def note(path: Path) -> None:
        found = path.stat() if path.exists() else path.lstat()
        if stat.S_ISREG(found.st_mode):
            files[path.relative_to(root)] = found.st_size

    _dir_travel(root, [_get_excludes(root, _always_left_out())], note, include_gitignore=True, logger=quiet)
    return Shipment(root, files)


def digest(root: Path) -> str:
    """What Ray calls the content of a working directory; the same files give the same."""
    from ray._private.runtime_env.packaging import get_uri_for_directory

    uri: str = get_uri_for_directory(str(root), include_gitignore=True, excludes=_always_left_out())
    return uri


def code_digest(root: Path) -> str:
    """SHA-256 of the program that trains: every Python file of `cluster` and `jobs` below `root`.

    A working directory that was sent to a cluster has no .git to name a commit, and a checkout may have been changed
    since its last one.
    """
    files = [path for package in ("cluster", "jobs") for path in sorted((root / package).rglob("*.py"))]
    return records.digest_of(records.describe_file(path, path.relative_to(root).as_posix()) for path in files)


def _always_left_out() -> list[str]:
    from ray._private.ray_constants import get_runtime_env_default_excludes

    names: list[str] = get_runtime_env_default_excludes()
    return names


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
