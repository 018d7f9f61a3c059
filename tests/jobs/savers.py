"""Checkpoints of made-up state: the real saver and the real board, without training around them."""

from dataclasses import dataclass

import torch

from cluster.store import Store
from jobs import runs
from jobs.checkpoint import Restored, Retention
from jobs.progress import Board
from jobs.saver import Position, Saver
from jobs.zero import PARTS, Fragment

EVERYTHING = Retention(last=1_000)


@dataclass
class Share:
    """One rank's half (or all) of a parameter `w`, every element of which is `value`."""

    rank: int
    world_size: int
    count: int
    value: float

    def fragments(self) -> list[Fragment]:
        mine = self.count // self.world_size
        return [Fragment("w", self.rank * mine, {part: torch.full((mine,), self.value) for part in PARTS})]


def save(
    store: Store,
    run_id: str,
    step: int,
    value: float,
    *,
    world_size: int = 1,
    count: int = 64,
    retention: Retention = EVERYTHING,
) -> None:
    """One checkpoint in an attempt of its own, by all its ranks. Raises what a rank's saver raises."""
    attempt = runs.begin_attempt(store, run_id, step, world_size, 1)
    board = Board()
    savers = [
        Saver(Share(rank, world_size, count, value), store, run_id, attempt, rank, board, retention)
        for rank in range(world_size)
    ]
    for saver in savers:
        saver.begin(Position(step, updates=step, samples_seen=step, metric=value))
    for saver in savers:
        saver.close()


def value_of(restored: Restored, count: int = 64) -> float:
    """What all elements of a checkpoint made by `save` are; fails when they are not alike."""
    found = {float(each) for part in PARTS for each in set(restored.read(part, "w", 0, count).tolist())}
    (value,) = found
    return value
