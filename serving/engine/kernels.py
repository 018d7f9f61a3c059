"""The door to our kernels in C: built with the system's compiler at first use, kept in the node's cache.

Where there is no compiler the engine computes the same with torch alone, slower, and says so once.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluster.models import cache_folder

_SOURCE = Path(__file__).with_name("kernels.c")
# -ffast-math when compiling lets sums be vectorised; when linking it would change how the whole process rounds.
_COMPILE = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-c")
_LINK = ("-shared",)
_TIMEOUT_S = 120

_log = logging.getLogger(__name__)


# As `Adapter` in kernels.c: the addresses of its matrices in one layer, its rank there, and of its rescale or 0.
ADAPTER = np.dtype([("a", np.uint64), ("b", np.uint64), ("rank", np.int64), ("rescale", np.uint64)])


@dataclass
class Groups:
    """Rows by adapter: group g has rows[starts[g] : starts[g + 1]] and the adapter of slots[g]; all int64, contiguous.

    `largest` is the largest group times the highest rank.
    """

    slots: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    largest: int
    low: npt.NDArray[np.float32] = field(init=False)

    @functools.cached_property
    def arguments(self) -> tuple[int, ...]:
        """As the kernel takes them, once for all layers of a step: numpy takes a microsecond for an address."""
        self.low = np.empty(self.largest, np.float32)  # room to work in
        places = (self.slots, self.starts, self.rows, self.low)
        return len(self.slots), *(each.ctypes.data for each in places)


def are_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they can compute for this kind of tensor, and could be built."""
    return device.type == "cpu" and dtype == torch.float32 and library() is not None


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of single rows, each over its own slots of the pool: softmax(cap(q kᵀ · scaling)) v.

    Args:
        query: [rows, heads, dim], of any strides.
        keys, values: a layer's pool, [slots, kv_heads, dim]. All float32, on the CPU.
        slots: int64 [n], what row r sees from starts[r] to starts[r + 1]; starts is int64 [rows + 1].
        longest: the most that one row sees.

    Returns:
        [rows, heads, dim].
    """
    kernels = library()
    assert kernels is not None, "ask are_usable first"
    if query.stride(-1) != 1:
        query = query.contiguous()
    rows, heads, dim = query.shape
    kv_heads = keys.shape[1]
    out = query.new_empty(rows, heads, dim)
    scores = query.new_empty(heads * longest)
    kernels.attend(
        out.data_ptr(), query.data_ptr(), query.stride(0), query.stride(1), keys.data_ptr(), values.data_ptr(),
        slots.data_ptr(), starts.data_ptr(), rows, kv_heads, heads // kv_heads, dim, scaling, softcap or 0.0,
        scores.data_ptr(),
    )  # fmt: skip
    return out


def update(out: torch.Tensor, x: torch.Tensor, adapters: int, groups: Groups) -> None:
    """Rescale the rows of adapters that do, and add the low-rank updates of all to theirs, in place.

    Args:
        out, x: [1, rows, out_features] and [1, rows, in_features], float32; out is contiguous.
        adapters: the address of the layer's ADAPTER [slots].
    """
    kernels = library()
    assert kernels is not None, "ask are_usable first"
    x = x.contiguous()
    kernels.update(out.data_ptr(), x.data_ptr(), x.shape[-1], out.shape[-1], adapters, *groups.arguments)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if need be; None where they cannot be."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        _log.warning("no C compiler (CC, cc) here, so that decoding is slower")
        return None
    try:
        kernels = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _log.warning("%s could not be built, so that decoding is slower: %s", _SOURCE.name, said)
        return None
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    kernels.attend.restype = kernels.update.restype = None
    kernels.attend.argtypes = (
        *(pointer, pointer, integer, integer, pointer, pointer, pointer, pointer),
        *(integer, integer, integer, integer, number, number, pointer),
    )
    kernels.update.argtypes = (
        *(pointer, pointer, integer, integer, pointer),
        *(integer, pointer, pointer, pointer, pointer),
    )
    return kernels


def _built(compiler: str) -> Path:
    """The shared library, of this source by this compiler for this processor; several processes may build at once."""
    said = subprocess.run(
        [compiler, "-v", "-march=native", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True
    )  # the compiler, and what `native` is here
    named = "\n".join((_SOURCE.read_text(), *_COMPILE, *_LINK, said.stderr))
    target = cache_folder() / "kernels" / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made, linked = Path(folder) / "kernels.o", Path(folder) / target.name
            for command in ([*_COMPILE, str(_SOURCE), "-o", str(made)], [*_LINK, str(made), "-o", str(linked), "-lm"]):
                subprocess.run([compiler, *command], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
            linked.rename(target)
    return target
