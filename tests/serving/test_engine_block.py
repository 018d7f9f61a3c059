"""Matrices in one piece of memory."""

import mmap
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from serving.engine.block import packed


@pytest.mark.parametrize("rows", [1, 3, 5_000])  # below and above where huge pages begin
def test_copies_are_equal_lie_in_order_and_begin_at_cache_lines(rows: int) -> None:
    tensors = [torch.randn(rows, 77), torch.randn(3, rows), torch.randn(1, 1), torch.randn(rows, 128)]
    copies = packed(tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert all(copy.is_contiguous() and copy.data_ptr() % 64 == 0 for copy in copies)
    for one, next_one in pairwise(copies):
        assert 0 <= next_one.data_ptr() - one.data_ptr() - one.nbytes < 64
    copies[0].zero_()
    assert tensors[0].any(), "the original is not touched"


def test_a_kernel_without_huge_pages_has_the_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9_999)  # to the real call, which answers EINVAL as such a kernel does
    tensors = [torch.randn(1 << 20)]
    assert torch.equal(packed(tensors)[0], tensors[0])


def test_memory_lives_as_long_as_a_piece_of_it_and_then_is_given_back() -> None:
    tensors = [torch.ones(1 << 20), torch.ones(1 << 20)]  # 4 MiB each
    last = packed(tensors)[1]
    before = resident_bytes()
    for _ in range(32):
        last = packed(tensors)[1]
        assert bool((last == 1).all())
    assert resident_bytes() - before < 32 << 20


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
