"""Portable training state in the store: written at one world size and ZeRO stage, read at any other.

    runs/<run_id>/checkpoints/<step>/{state-<attempt>-<rank>.safetensors, …, manifest.json}      manifest last

A shard holds the fragments that one rank keeps: runs of a parameter's elements (fp32 weight and both moments), each
element in exactly one shard. So ranks write without asking one another, nothing that several ranks hold is written
twice, and frozen weights never are. The attempt in a shard's name keeps what two attempts wrote of one step apart.
"""

import fcntl
import json
import mmap
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster import keys, models, records
from cluster.errors import ObjectDamaged, ObjectNotFound, RunFailed, StoreError
from cluster.records import CheckpointManifest
from cluster.store import Store
from jobs import runs
from jobs.zero import PARTS, Fragment

_ALIGNMENT = 64  # of each tensor in a shard, bytes


class Shard:
    """One rank's share in host memory, in the layout of the safetensors file that it will be.

    The layout follows from the fragments, which stay the same through an attempt; `copy` fills in their values.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        entries: dict[str, Any] = {}
        offset = 0
        for fragment in fragments:
            for part in PARTS:
                size = 4 * fragment.count
                entries[_entry(part, fragment.name, fragment.start)] = {
                    "dtype": "F32",
                    "shape": [fragment.count],
                    "data_offsets": [offset, offset + size],
                }
                offset += size
        header = json.dumps(entries).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        first = 8 + len(header)
        self.memory = mmap.mmap(-1, first + offset)
        self.memory[:first] = len(header).to_bytes(8, "little") + header
        floats = torch.frombuffer(self.memory, dtype=torch.float32, offset=first) if offset else torch.empty(0)
        self._places = list(torch.split(floats, [fragment.count for fragment in fragments for _ in PARTS]))

    def copy(self, fragments: Sequence[Fragment]) -> None:
        """Take the fragments' values as they are now."""
        torch._foreach_copy_(self._places, [fragment.parts[part] for fragment in fragments for part in PARTS])


def _entry(part: str, name: str, start: int) -> str:
    return f"{part}:{start}:{name}"


class Restored:
    """A checkpoint read back and verified: a SavedState, and where in the run it stands.

    Raises ObjectDamaged when its shards do not make up whole parameters.
    """

    def __init__(self, manifest: CheckpointManifest, folder: Path) -> None:
        self.next_step = manifest.step
        self.samples_seen = manifest.samples_seen
        self.updates = manifest.updates
        self._opened = ExitStack()
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}  # start, count, file, its key
        for record in manifest.files:
            try:
                file = self._opened.enter_context(safe_open(folder / record.file, "pt"))
            except (OSError, SafetensorError) as error:
                raise ObjectDamaged(f"checkpoint {manifest.step}: {record.file}: {error}") from error
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                part, start, name = key.split(":", 2)
                count = file.get_slice(key).get_shape()[0]
                self._pieces.setdefault((part, name), []).append((int(start), count, file, key))
        for (part, name), pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            end = 0
            for start, count, _, _ in pieces:
                if start != end:
                    raise ObjectDamaged(f"checkpoint {manifest.step}: {part} of {name} has no element {end}")
                end = start + count

    def elements(self, part: str = "weight") -> dict[str, int]:
        """How many elements of a part each parameter has."""
        return {name: pieces[-1][0] + pieces[-1][1] for (of, name), pieces in self._pieces.items() if of == part}

    def check(self, elements: Mapping[str, int]) -> None:
        """Raise unless it holds these parameters, by name, with so many elements each.

        Raises:
            ObjectDamaged: some are missing from it.
            RunFailed: it holds what the model does not train. No damage adds parameters: other code wrote it, and an
                older checkpoint would be no better.
        """
        for part in PARTS:
            held = self.elements(part)
            wrong = sorted(name for name in held.keys() | elements.keys() if held.get(name) != elements.get(name))
            if not wrong:
                continue
            foreign = [name for name in wrong if held.get(name, 0) > elements.get(name, 0)]
            name = (foreign or wrong)[0]
            differs = (
                f"checkpoint {self.next_step}: {part} of {name} has {held.get(name, 0)} elements, and the model trains "
                f"{elements.get(name, 0)} ({len(wrong)} parameters differ)"
            )
            if foreign:
                raise RunFailed(
                    f"{differs}; it is whole, and of another model, method or release of the model's code: go on "
                    "with those"
                )
            raise ObjectDamaged(differs)

    def read(self, part: str, name: str, start: int, count: int) -> Tensor:
        """`count` elements of a parameter's flattened part (PARTS), from `start` on, fp32 on the host."""
        out = torch.empty(count)
        for first, length, file, key in self._pieces[part, name]:
            low, high = max(start, first), min(start + count, first + length)
            if low < high:
                out[low - start : high - start] = file.get_slice(key)[low - first : high - first]
        return out

    def close(self) -> None:
        """Let go of the files."""
        self._opened.close()
        self._pieces = {}


@dataclass(frozen=True)
class Found:
    """What `load_latest` came to: the state, if there is any, and for each newer checkpoint why it was passed over."""

    restored: Restored | None
    passed_over: list[str]


def load_latest(store: Store, run_id: str, elements: Mapping[str, int]) -> Found:
    """The newest checkpoint that is whole, verified byte by byte; damaged ones are named and passed over.

    A collective: rank 0 chooses, so that no two ranks can resume at different steps.

    Args:
        elements: how many each trained parameter has, by name.

    Raises:
        RunFailed: on every rank, as `Restored.check` says.
    """
    if dist.get_rank() == 0:
        try:
            found = newest_whole(store, run_id, elements)
        except RunFailed as refusal:
            dist.broadcast_object_list([refusal])
            raise
        step = found.restored.next_step if found.restored else None
        dist.broadcast_object_list([(step, found.passed_over)])
        return found
    chosen: list[Any] = [None]
    dist.broadcast_object_list(chosen)
    if isinstance(chosen[0], RunFailed):
        raise chosen[0]
    step, passed_over = chosen[0]
    return Found(load(store, run_id, step) if step is not None else None, passed_over)


def newest_whole(store: Store, run_id: str, elements: Mapping[str, int] | None = None) -> Found:
    """As `load_latest`, for one process; without `elements` it may be a checkpoint of any parameters."""
    passed_over: list[str] = []
    for step in reversed(runs.checkpoint_steps(store, run_id)):
        try:
            restored = load(store, run_id, step)
            if elements is not None:
                restored.check(elements)
            return Found(restored, passed_over)
        except (ObjectDamaged, ObjectNotFound) as error:
            passed_over.append(f"checkpoint {step} cannot be used: {error}")
    return Found(None, passed_over)


def load(store: Store, run_id: str, step: int) -> Restored:
    """One checkpoint, its shards fetched and verified once a node. Raises ObjectDamaged, ObjectNotFound."""
    key = keys.checkpoint_manifest(run_id, step)
    manifest = records.read(store, key, CheckpointManifest)
    if (manifest.run_id, manifest.step) != (run_id, step):
        raise ObjectDamaged(f"{store.url}/{key} is of run {manifest.run_id}, step {manifest.step}")
    above = models.cache_folder() / "checkpoints"
    above.mkdir(parents=True, exist_ok=True)
    # Named by its content, because a step that was damaged may be written again.
    folder = above / f"{run_id}-{step}-{sha256(manifest.to_bytes()).hexdigest()[:16]}"
    with (above / f"{run_id}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for old in above.glob(f"{run_id}-*-*"):  # open files stay readable
                shutil.rmtree(old, ignore_errors=True)
            partial = above / f"{run_id}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            records.fetch_files(store, keys.checkpoint_prefix(run_id, step), manifest.files, partial)
            partial.rename(folder)
        return Restored(manifest, folder)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last ones, the best by a metric (lower is better), and every Nth step's."""

    last: int
    best: int = 0
    every: int | None = None


def kept(found: dict[int, float | None], retention: Retention) -> set[int]:
    """Of checkpoints by step, with the metric where there is one, those that stay. Pure."""
    ranked = sorted((metric, step) for step, metric in found.items() if metric is not None)
    last = sorted(found)[-retention.last :]
    best = [step for _, step in ranked[: retention.best]]
    nth = [step for step in found if retention.every and step % retention.every == 0]
    return {*last, *best, *nth}


def collect(store: Store, run_id: str, retention: Retention) -> list[int]:
    """Delete what no committed and kept checkpoint refers to, manifests first. Returns the steps that went.

    A checkpoint of an attempt whose successor began below it is not kept, since that one had to pass it over. What
    lies above the newest commit is left alone otherwise: it may be on its way.
    """
    prefix = keys.checkpoints_prefix(run_id)
    files: dict[int, list[str]] = {}
    for item in store.list(prefix):
        files.setdefault(int(item.key.removeprefix(prefix).split("/")[0]), []).append(item.key)
    attempts = runs.attempts(store, run_id)
    manifests: dict[int, CheckpointManifest] = {}
    for step, names in files.items():
        key = keys.checkpoint_manifest(run_id, step)
        if key not in names:
            continue
        try:
            manifest = records.read(store, key, CheckpointManifest)
        except StoreError:
            if not attempts or attempts[-1].first_step >= step:
                return []  # nothing is deleted on the word of a record that cannot be read
            store.delete(key)
            continue
        if any(each.number > manifest.attempt and each.first_step < step for each in attempts):
            for name in (key, *(keys.checkpoint_prefix(run_id, step) + file.file for file in manifest.files)):
                store.delete(name)
        else:
            manifests[step] = manifest
    stay = kept({step: each.metric for step, each in manifests.items()}, retention)
    newest = max(manifests, default=-1)
    for step in (step for step in files if step < newest and step not in stay):
        manifest_key = keys.checkpoint_manifest(run_id, step)
        for key in sorted(files[step], key=lambda key: key != manifest_key):
            store.delete(key)
    for step in stay:
        named = {keys.checkpoint_prefix(run_id, step) + file.file for file in manifests[step].files}
        for key in set(files[step]) - named - {keys.checkpoint_manifest(run_id, step)}:
            store.delete(key)
    return sorted(set(manifests) - stay)
