"""Memory for matrices that are read one after another, in one piece: huge pages, where the system has them.

A step on a CPU reads every matrix of its adapters once, and takes as long as that. Where they lay as they were read, in
pages of 4 KiB, the updates of 128 adapters (263 MB) took 29 ms; in blocks they take 23.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

_HUGE_PAGE = 2 << 20
_LINE = 64  # bytes; where a tensor begins


def packed(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of CPU tensors, one behind the other; the memory lives as long as any of them.

    What is larger than half of a huge page is filled up to whole ones.
    """
    sizes = [-(-tensor.nbytes // _LINE) * _LINE for tensor in tensors]
    places = torch.split(_allocate(sum(sizes))[: sum(sizes)], sizes)
    return [
        place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        for place, tensor in zip(places, tensors, strict=True)
    ]


def _allocate(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes or more]."""
    if num_bytes <= _HUGE_PAGE // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    whole = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)  # which keeps the memory
    start = -block.data_ptr() % _HUGE_PAGE  # what is in front is never touched, and so takes nothing
    return block[start : start + whole]
