"""Portable training state in the store: written at one world size and ZeRO stage, read at any other.

    runs/<run_id>/checkpoints/<step>/{state-00000.safetensors, …, manifest.json}      manifest last

A shard holds whole parameters (fp32 weight and both moments), each parameter in exactly one shard: ranks share the
parameters out by size, so nothing that several ranks hold is written twice, and frozen weights never are.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cluster import keys, records
from cluster.errors import ObjectDamaged, ObjectNotFound
from cluster.logs import say
from cluster.records import CheckpointManifest, FileRecord
from cluster.store import Store
from jobs.zero import State, ZeroEngine


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back: which step comes next, AdamW's update count, and every trained parameter's state."""

    next_step: int
    samples_seen: int
    updates: int
    states: dict[str, State]


def save(engine: ZeroEngine, store: Store, run_id: str, next_step: int, samples_seen: int) -> str:
    """Write the state as it is before step `next_step`. A collective. Returns the manifest's key."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine: dict[str, torch.Tensor] = {}
    loads = [0] * world_size
    for name, parameter in engine.trained():
        state = engine.state(parameter)
        owner = loads.index(min(loads))
        loads[owner] += state["weight"].numel()
        if owner == rank:
            mine |= {f"{part}:{name}": tensor for part, tensor in state.items()}
    file = _write_shard(mine, {"updates": str(engine.updates())}, store, run_id, next_step, rank) if mine else None
    files: list[FileRecord | None] = [None] * world_size
    dist.all_gather_object(files, file)
    key = keys.checkpoint_manifest(run_id, next_step)
    if rank == 0:
        manifest = CheckpointManifest(
            run_id=run_id,
            step=next_step,
            samples_seen=samples_seen,
            world_size=world_size,
            files=tuple(file for file in files if file),
            created_at=records.now(),
        )
        store.put(key, manifest.to_bytes())
    return key


def _write_shard(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], store: Store, run_id: str, step: int, rank: int
) -> FileRecord:
    name = f"state-{rank:05d}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        save_file(tensors, path, metadata)
        store.upload(path, keys.checkpoint_prefix(run_id, step) + name)
        return records.describe_file(path, name)


def steps(store: Store, run_id: str) -> list[int]:
    """The steps that have a committed checkpoint, in order."""
    prefix = keys.checkpoints_prefix(run_id)
    names = (item.key.removeprefix(prefix) for item in store.list(prefix))
    return sorted(int(name.split("/")[0]) for name in names if name.endswith("/manifest.json"))


def load_latest(store: Store, run_id: str) -> Restored | None:
    """The newest checkpoint that is whole, verified byte by byte; damaged ones are named and passed over.

    A collective: rank 0 chooses, so that no two ranks can resume at different steps.
    """
    restored = _newest_whole(store, run_id) if dist.get_rank() == 0 else None
    chosen: list[int | None] = [restored.next_step if restored else None]
    dist.broadcast_object_list(chosen)
    if restored or chosen[0] is None:
        return restored
    return _load(store, run_id, chosen[0])


def _newest_whole(store: Store, run_id: str) -> Restored | None:
    for step in reversed(steps(store, run_id)):
        try:
            return _load(store, run_id, step)
        except (ObjectDamaged, ObjectNotFound) as error:
            say(f"warning: checkpoint {step} of {run_id} cannot be used, trying the one before: {error}")
    return None


def _load(store: Store, run_id: str, step: int) -> Restored:
    manifest = records.read(store, keys.checkpoint_manifest(run_id, step), CheckpointManifest)
    states: dict[str, State] = {}
    updates = 0
    with tempfile.TemporaryDirectory() as folder:
        records.fetch_files(store, keys.checkpoint_prefix(run_id, step), manifest.files, Path(folder))
        for path in (Path(folder) / file.file for file in manifest.files):
            with safe_open(path, "pt") as shard:
                updates = int(shard.metadata()["updates"])
            for part, name, tensor in _entries(load_file(path)):
                states.setdefault(name, {})[part] = tensor
    return Restored(manifest.step, manifest.samples_seen, updates, states)


def _entries(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor]]:
    for key, tensor in tensors.items():
        part, _, name = key.partition(":")
        yield part, name, tensor
