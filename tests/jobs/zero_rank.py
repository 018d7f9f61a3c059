"""One rank of test_zero.py: trains a tiny model at every ZeRO stage, with and without a break in the middle.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python -m tests.jobs.zero_rank MODEL OUT.pt '[["fp32", "lora", 0], …]'
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.attempts import prepare_environment

prepare_environment("cpu")

import torch
import torch.distributed as dist

from jobs.config import FullConfig, LoraConfig, OptimizerConfig
from jobs.kernels import summed_cross_entropy
from jobs.lora import prepare
from jobs.model import load_model
from jobs.objectives import PackedRow, supervised_logits
from jobs.zero import PARTS, SavedState, ZeroEngine, join_process_group, put_weights, sharded_loading

STEPS, BREAK_AT, PACKS = 5, 3, 6
LENGTHS = [7, 9, 16, 12]
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)


def rows(step: int) -> Iterator[PackedRow]:
    """The packs of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(PACKS):
        tokens = torch.randint(0, 200, (sum(LENGTHS),), generator=generator)
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        predicts = torch.arange(0, sum(LENGTHS) - 1, 3)
        yield PackedRow(tokens[None], positions[None], LENGTHS, predicts, tokens[predicts + 1], 0, 1.0)


def make(folder: Path, dtype: str, kind: str, stage: int, saved: SavedState | None = None) -> ZeroEngine:
    method = FullConfig(kind="full") if kind == "full" else LoraConfig(kind="lora", rank=4, dora=kind == "dora")
    model = prepare(load_model(folder, dtype, sharded_loading(stage, dtype)), method, seed=0, fused=stage < 3)
    if saved:
        put_weights(model, saved, stage)
    return ZeroEngine(model, OPTIMIZER, stage, dtype)


class Held:
    """The state of an engine, put together from what each rank keeps."""

    def __init__(self, engine: ZeroEngine) -> None:
        mine = [(f.name, f.start, {part: f.parts[part].cpu().clone() for part in PARTS}) for f in engine.fragments()]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        pieces = sorted((piece for each in everyone for piece in each), key=lambda piece: piece[:2])
        self._whole: dict[tuple[str, str], torch.Tensor] = {}
        for name, start, parts in pieces:
            for part, tensor in parts.items():
                before = self._whole.get((part, name), torch.empty(0))
                assert len(before) == start, "fragments neither overlap nor leave gaps"
                self._whole[part, name] = torch.cat([before, tensor])

    def read(self, part: str, name: str, start: int, count: int) -> torch.Tensor:
        return self._whole[part, name][start : start + count]


def train(engine: ZeroEngine, first: int, last: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    engine.module.train()
    history = []
    for step in range(first, last):
        mine = list(rows(step))[dist.get_rank() :: dist.get_world_size()]
        total = torch.zeros(())
        for index, row in enumerate(mine):
            loss = summed_cross_entropy(supervised_logits(engine.engine, row), row.targets) / (PACKS * len(row.targets))
            engine.accumulate(loss, last=index == len(mine) - 1)
            total += loss.detach()
        norm = engine.step(1e-2)
        dist.all_reduce(total)
        history.append((total.item(), norm))
    return history


def poison(engine: ZeroEngine) -> None:
    """A step whose loss is not a number on one rank: it must change nothing on any."""
    row = next(rows(0))
    loss = summed_cross_entropy(supervised_logits(engine.engine, row), row.targets)
    engine.accumulate(loss * (float("nan") if dist.get_rank() == 0 else 1.0), last=True)
    assert not math.isfinite(engine.step(1e-2))


def broken(folder: Path, dtype: str, kind: str, stage: int) -> list[tuple[float, float]]:
    """The same run with a step that is not finite, its state taken out in the middle and put into a new engine."""
    engine = make(folder, dtype, kind, stage)
    history = train(engine, 0, BREAK_AT)
    poison(engine)
    saved = Held(engine)
    updates = engine.updates()
    again = make(folder, dtype, kind, stage, saved)
    again.module.train()
    again.accumulate(supervised_logits(again.engine, next(rows(0))).sum() * 0.0, last=True)
    again.step(0.0)
    again.restore_moments(saved, updates)
    return history + train(again, BREAK_AT, STEPS)


def main() -> None:
    folder, out = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    join_process_group()
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for dtype, kind, stage in json.loads(sys.argv[3]):
        engine = make(folder, dtype, kind, stage)
        history = train(engine, 0, STEPS)
        weights = {name: engine.weight(parameter) for name, parameter in engine.trained()}
        done = {"history": history, "weights": weights, "broken": broken(folder, dtype, kind, stage)}
        found[dtype, kind, stage] = done
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()


if __name__ == "__main__":
    main()
