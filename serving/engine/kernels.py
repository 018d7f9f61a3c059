"""The door to our one kernel in C: built with the system's compiler at first use, kept in the node's cache.

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
from pathlib import Path

import torch

from cluster.models import cache_folder

_SOURCE = Path(__file__).with_name("attend.c")
# -ffast-math when compiling lets sums be vectorised; when linking it would change how the whole process rounds.
_COMPILE = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-c")
_LINK = ("-shared",)
_TIMEOUT_S = 120

_log = logging.getLogger(__name__)


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
        query: [rows, heads, dim], of any strides but the last, which is 1.
        keys, values: a layer's pool, [slots, kv_heads, dim]. All float32, on the CPU.
        slots: int64 [n], what row r sees from starts[r] to starts[r + 1]; starts is int64 [rows + 1].
        longest: the most that one row sees.

    Returns:
        [rows, heads, dim].
    """
    library = _library()
    assert library is not None, "ask is_usable first"
    rows, heads, dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    out = query.new_empty(rows, heads, dim)
    scores = query.new_empty(group * longest)
    library.attend(
        out.data_ptr(), query.data_ptr(), query.stride(0), query.stride(1), keys.data_ptr(), values.data_ptr(),
        slots.data_ptr(), starts.data_ptr(), rows, kv_heads, group, dim, scaling, softcap or 0.0, scores.data_ptr(),
    )  # fmt: skip
    return out


def is_usable(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` can do this layer: float32 on a CPU, keys as wide as values, and a compiler."""
    fits = query.device.type == "cpu" and query.dtype == torch.float32 and query.shape[-1] == value.shape[-1]
    return fits and query.stride(-1) == 1 and _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        _log.warning("no C compiler (CC, cc) here, so that decode attention is slower")
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _log.warning("%s could not be built, so that decode attention is slower: %s", _SOURCE.name, said)
        return None
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.attend.restype = None
    library.attend.argtypes = (
        *(pointer, pointer, integer, integer, pointer, pointer, pointer, pointer),
        *(integer, integer, integer, integer, number, number, pointer),
    )
    return library


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
            made, linked = Path(folder) / "attend.o", Path(folder) / target.name
            for command in ([*_COMPILE, str(_SOURCE), "-o", str(made)], [*_LINK, str(made), "-o", str(linked), "-lm"]):
                subprocess.run([compiler, *command], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
            linked.rename(target)
    return target
