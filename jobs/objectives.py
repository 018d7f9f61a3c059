"""The loss of a packed row, normalised so that batching never changes it.

A step's loss is the sum of the cross-entropies of its supervised tokens over their number in the WHOLE global batch.
Every worker knows that number beforehand, since it follows from the batch and the dataset, so each micro-batch is
divided by it at once. The loss and its gradient are then the same for any world size, micro-batch, accumulation or
packing (averaging averages, as is common, weights short answers more than long ones).
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from jobs.dataset import Dataset


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch: whole samples laid end to end.

    Attributes:
        input_ids: [1, T]; position_ids: [1, T], from 0 in each sample.
        sample_lengths: lengths of the samples, summing to T.
        predicts: [S] positions whose next token is supervised; targets: [S] those tokens.
        first_sample: the id of its first sample.
        weight: 1, or 0 for a row that only keeps a rank in step with the others.
    """

    input_ids: Tensor
    position_ids: Tensor
    sample_lengths: list[int]
    predicts: Tensor
    targets: Tensor
    first_sample: int
    weight: float

    def to(self, device: torch.device) -> "PackedRow":
        """The same row on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "predicts", "targets")}
        return replace(self, **moved)


def pack_row(dataset: Dataset, samples: npt.NDArray[np.int64], weight: float = 1.0) -> PackedRow:
    """Lay samples end to end. A sample's first token is never a target, so nothing is learned across a border."""
    ids, marks = zip(*(dataset.sample(int(sample)) for sample in samples), strict=True)
    lengths = [len(sample) for sample in ids]
    tokens = torch.from_numpy(np.concatenate(ids).astype(np.int64))
    targets_at = torch.from_numpy(np.flatnonzero(np.concatenate(marks)))
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
    return PackedRow(
        tokens[None], positions[None], lengths, targets_at - 1, tokens[targets_at], int(samples[0]), weight
    )


def supervised_logits(model: nn.Module, row: PackedRow) -> Tensor:
    """Logits [S, vocabulary] at the positions that predict a supervised token, and nowhere else.

    `logits_to_keep` is transformers' own argument, so whatever a family does to its logits (soft caps, scales) is done.
    """
    output = model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        use_cache=False,
        logits_to_keep=row.predicts,
        sample_lengths=row.sample_lengths,
    )
    logits: Tensor = output.logits.flatten(0, 1)  # a view, also backwards: [0] would write a second gradient of zeros
    return logits
