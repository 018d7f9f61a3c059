"""Pickled weights of a folder, converted into safetensors beside its other files, one sandboxed process a file.

    pytorch_model.bin                                    model.safetensors
    pytorch_model-00001-of-00002.bin, …, .bin.index.json   model-00001-of-00002.safetensors, …, .safetensors.index.json

The same input gives the same bytes, so the revision of a converted folder is as good a pin as a commit's. What is
pickled and no weights (training_args.bin, optimizer.pt) is left behind.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.catalogue import links
from cluster.catalogue.weights import read_header, read_index
from cluster.errors import ModelError

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
INDEX = "pytorch_model.bin.index.json"
_WEIGHTS = re.compile(r"pytorch_model(-(\d{5})-of-(\d{5}))?\.bin")
_TIMEOUT_S = 3600.0
_ROOT = Path(__file__).resolve().parents[2]
_CHILD = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from cluster.catalogue.sandbox import main; main()"


@dataclass(frozen=True)
class Converted:
    """One file that was converted. `open_walls` names what the sandbox could not close, and why."""

    source: str
    target: str
    tensors: int
    open_walls: tuple[str, ...]


def pickled_weights(folder: Path) -> list[Path]:
    """The pickled weights of a folder, all shards or the one file. Raises ModelError when shards are missing."""
    found = {path.name: path for path in sorted(folder.glob("pytorch_model*.bin")) if _WEIGHTS.fullmatch(path.name)}
    index = folder / INDEX
    if index.is_file():
        wanted = set(read_index(index).values())
        if missing := sorted(wanted - set(found)):
            raise ModelError(f"{index} names {missing[0]}, which is not there; fetch the whole folder again")
        return [found[name] for name in sorted(wanted)]
    counts = {match[3] for name in found if (match := _WEIGHTS.fullmatch(name)) and match[3]}
    if counts and len(found) != int(max(counts)):
        raise ModelError(f"{folder} has {len(found)} of {int(max(counts))} shards; fetch the whole folder again")
    return list(found.values())


def convert(folder: Path, target: Path, say: Callable[[str], None]) -> list[Converted]:
    """Fill `target` with what `folder` has, weights as safetensors. Raises ModelError, having left no weights there.

    Args:
        folder: a model's folder whose weights are pickled.
        target: an empty folder.
        say: is told what is being done.
    """
    links.refuse(folder)
    weights = pickled_weights(folder)
    if not weights:
        raise ModelError(f"{folder} has no pytorch_model*.bin to convert; other names are not known to be weights")
    done = []
    weight_map: dict[str, str] = {}
    total = 0
    for path in weights:
        name = path.name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
        say(f"converting {path.name} to {name}")
        done.append(_convert(path, target / name))
        header = read_header(target / name)
        weight_map |= dict.fromkeys(header.tensors, name)
        total += sum(tensor.nbytes for tensor in header.tensors.values())
    if (folder / INDEX).is_file() and (missing := sorted(set(read_index(folder / INDEX)) - set(weight_map))):
        raise ModelError(f"{folder / INDEX} names the tensor {missing[0]}, which no shard has")
    if len(weights) > 1:
        made = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (target / "model.safetensors.index.json").write_text(json.dumps(made, indent=2) + "\n")
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in PICKLES and path.name != INDEX and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
    return done


def _convert(path: Path, target: Path) -> Converted:
    room = target.parent / ".empty"
    room.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    try:
        with path.open("rb") as source, partial.open("wb") as writing:
            said = _run(path, source.fileno(), writing.fileno(), room)
        if "refused" in said:
            raise ModelError(f"{path} is not converted: {said['refused']}")
        header = read_header(partial)
        if {name: each.nbytes for name, each in header.tensors.items()} != said["tensors"]:
            raise ModelError(f"{path} is not converted: what came out is not what was read; report this file")
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
        room.rmdir()
    walls = tuple(f"{wall}: {why}" for wall, why in said["walls"].items() if why)
    return Converted(path.name, target.name, len(header.tensors), walls)


def _run(path: Path, source: int, target: int, room: Path) -> dict[str, Any]:
    """The sandboxed process's answer. It gets two open files, an empty folder and no environment."""
    command = [sys.executable, "-I", "-S", "-B", "-c", _CHILD, str(source), str(target)]
    try:
        done = subprocess.run(
            command,
            env={},
            cwd=room,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=(source, target),
            timeout=_TIMEOUT_S,
            check=False,
        )
        said = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{path} is not converted: it took more than {_TIMEOUT_S / 60:.0f} minutes") from None
    except ValueError:
        end = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ModelError(f"{path} is not converted: the process that read it ended: {end[0]}") from None
    assert isinstance(said, dict)
    return said
