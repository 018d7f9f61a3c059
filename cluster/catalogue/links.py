"""Links of a model's folder: what is read and mirrored of it lies in it, or in the Hub cache that it is part of.

A folder from a stranger may hold `LICENSE -> ~/.aws/credentials`; read through, its target would be in the store, for
all who read that. huggingface_hub links too, and only so: …/snapshots/COMMIT/FILE -> ../../blobs/DIGEST.
"""

import os
from pathlib import Path

from cluster.errors import ModelError


def leading_out(folder: Path) -> tuple[str, ...]:
    """The files of a folder that are links to somewhere else, as `name -> target`, by name."""
    root = Path(os.path.realpath(folder))
    allowed = {root}
    if root.parent.name == "snapshots":
        allowed.add(root.parent.parent / "blobs")
    found = []
    for path in sorted(folder.iterdir()):
        target = Path(os.path.realpath(path))  # through all links; a circle of them ends at one
        if path.is_symlink() and not target.is_dir() and target.parent not in allowed:  # no folder is read into
            found.append(f"{path.name} -> {target}")
    return tuple(found)


def refuse(folder: Path) -> None:
    """Raises ModelError for a folder with a link that leads out of it."""
    if folder.is_dir() and (found := leading_out(folder)):
        raise ModelError(
            f"{folder}: {found[0]} is a link out of the folder, and what it leads to is no part of the model; put a "
            "copy there if it is, else remove it"
        )
