"""Which samples make up which optimizer step: order, packs, and each rank's share. Pure: lengths in, ids out.

    packs    samples put together so that each sequence is nearly full, once for the whole run
    order    how packs follow one another in an epoch: a shuffle that (seed, epoch) alone decides
    batch    the packs of one optimizer step: the next `global_batch` of the epoch
    share    one rank's part of a batch: as many packs as every other rank's, of about as many tokens

No world size enters before `share`, so that a run reads the same samples in the same steps on any number of workers,
and a step's number is all that a checkpoint must keep of the position.

Packs are composed once, not in every epoch anew: each epoch then has the same number of steps, known before the run
(the learning rate schedule needs it), and any step is found without replaying the epochs before it. Two samples that
share a pack share it in every epoch; since attention and positions keep them apart, all that this means is that they
meet in the same step.
"""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

from cluster.errors import DataError

Ids = npt.NDArray[np.int64]

# Packs that are open at a time. Share of each pack that is filled, for 1e6 samples (2 to 3 s on one core):
#                                            16     64     256    1,024
#   log-normal, median 148, packs of 2,048   0.998  0.999  0.999  0.999
#   uniform 1 to 512, packs of 512           0.953  0.981  0.993  0.997
_OPEN_PACKS = 256
# The "epoch" whose shuffle decides which samples meet in packs: one that no run reaches.
_COMPOSING = 2**63


def order(count: int, seed: int, epoch: int) -> Ids:
    """A permutation of range(count) that depends on (seed, epoch) alone.

    numpy keeps a bit generator's raw stream the same in all versions, but not what `shuffle` makes of it (NEP 19); so
    the ids are sorted by raw Philox draws, with a stable sort.
    """
    draws = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(draws, kind="stable")


def packs(lengths: npt.ArrayLike, arrival: Ids, capacity: int, packing: bool) -> list[Ids]:
    """Samples, taken in the order of `arrival`, put into packs of at most `capacity` tokens; each exactly once.

    Best fit among at most 256 open packs: a sample goes where it leaves the least room; when none has room and all are
    open, the fullest closes. Without `packing` every sample is a pack of its own.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and sizes.max() > capacity:
        worst = int(sizes.argmax())
        raise DataError(f"sample {worst} has {sizes[worst]:,} tokens, more than a pack's {capacity:,}")
    if not packing:
        return list(arrival.reshape(-1, 1))
    smallest = int(sizes.min()) if sizes.size else 0
    contents: list[list[int]] = []  # of every pack, in the order of opening
    rooms: list[tuple[int, int]] = []  # (tokens free, pack) of the open ones, sorted
    for sample, size in zip(arrival.tolist(), sizes[arrival].tolist(), strict=True):
        at = bisect_left(rooms, (size, 0))
        if at < len(rooms):
            room, pack = rooms.pop(at)
            contents[pack].append(sample)
        else:
            if len(rooms) == _OPEN_PACKS:
                rooms.pop(0)
            room, pack = capacity, len(contents)
            contents.append([sample])
        if room - size >= smallest:
            insort(rooms, (room - size, pack))
    return [np.array(samples, dtype=np.int64) for samples in contents]


def share(batch: list[Ids], tokens: list[int], rank: int, world_size: int) -> list[Ids]:
    """The packs of a batch that `rank` trains on; `tokens` holds the size of each.

    Packs are dealt in rounds, the largest first, in each round to the ranks with the fewest tokens so far. So every
    rank has the same number (some are empty arrays when the batch does not divide), the totals are close, and the
    packs that ranks work on at the same time, waiting for one another under ZeRO-3, are of like size.
    """
    by_size = sorted(range(len(batch)), key=lambda index: (-tokens[index], index))
    loads = [0] * world_size
    mine: list[Ids] = []
    for first in range(0, len(batch), world_size):
        ranks = sorted(range(world_size), key=lambda other: (loads[other], other))
        dealt = dict(zip(ranks, by_size[first : first + world_size], strict=False))
        for other, index in dealt.items():
            loads[other] += tokens[index]
        mine.append(batch[dealt[rank]] if rank in dealt else np.empty(0, dtype=np.int64))
    return mine


class SampleSchedule:
    """Every step of a run, of any number of epochs, by its number.

    `lengths` are the samples' tokens, `capacity` those of a pack (the sequence length), `global_batch` the packs of a
    step over all ranks. The last step of an epoch has fewer packs when they don't divide: no sample is left out, and
    none comes twice in an epoch. Raises DataError without samples, or when one is longer than a pack.
    """

    def __init__(
        self, lengths: npt.ArrayLike, seed: int, capacity: int, packing: bool = True, global_batch: int = 1
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if not self._lengths.size:
            raise DataError("no samples to train on")
        self._seed = seed
        self._global_batch = global_batch
        arrival = order(len(self._lengths), seed, _COMPOSING) if packing else np.arange(len(self._lengths))
        self.packs = packs(self._lengths, arrival, capacity, packing)
        self.steps_per_epoch = -(-len(self.packs) // global_batch)
        self.fill = float(self._lengths.sum() / (len(self.packs) * capacity))
        self._ordered = 0, order(len(self.packs), seed, 0)  # the epoch last asked for: steps come in sequence

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that a step, from 0, belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[Ids]:
        """The packs of a step, from 0: arrays of sample ids."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self._global_batch
        if self._ordered[0] != epoch:
            self._ordered = epoch, order(len(self.packs), self._seed, epoch)
        return [self.packs[pack] for pack in self._ordered[1][first : first + self._global_batch]]

    def share(self, step: int, rank: int, world_size: int) -> list[Ids]:
        """One rank's packs of a step; see `share`."""
        batch = self.batch(step)
        return share(batch, [self.tokens(pack) for pack in batch], rank, world_size)

    def tokens(self, pack: Ids) -> int:
        """How many tokens a pack holds."""
        return int(self._lengths[pack].sum())
