"""safetensors by their headers alone: which tensors there are, of which size, and whether the files are whole.

8 bytes: length of the header | header: {"name": {"dtype", "shape", "data_offsets"}, …} | the tensors
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal

from cluster.errors import ModelError

INDEX = "model.safetensors.index.json"
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Tensor:
    """One tensor of a header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    file: str
    tensors: dict[str, Tensor]
    file_bytes: int


def read_header(path: Path) -> Header:
    """The header of a file, checked against the file's size. Raises ModelError for one that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{path} is no whole safetensors file: its header has {length} bytes of {size}")
        text = file.read(length)
    try:
        said: dict[str, Any] = json.loads(text)
        tensors: dict[str, Tensor] = {}
        spans = []
        for name, entry in said.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), end - start)
                spans.append((start, end))
        wrong = next((name for name, each in tensors.items() if not _is_sound(each)), None)
        spans.sort()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} has a header that is none of safetensors ({error}); fetch it again") from None
    if wrong is not None:
        raise ModelError(f"{path}: the tensor {wrong} has a size that its shape and type do not give")
    if any(before[1] != after[0] for before, after in pairwise([(0, 0), *spans])):
        raise ModelError(f"{path}: its tensors overlap or leave gaps; fetch it again")
    expected = 8 + length + (spans[-1][1] if spans else 0)
    if size != expected:
        raise ModelError(f"{path} has {size} bytes where its header says {expected}; fetch it again")
    return Header(path.name, tensors, size)


def _is_sound(tensor: Tensor) -> bool:
    bits = ITEM_BITS.get(tensor.dtype)
    # Before anything is multiplied: a header may hold text, or a million factors.
    if len(tensor.shape) > _MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in tensor.shape):
        return False
    return bits is not None and -(-tensor.elements * bits // 8) == tensor.nbytes


def read_index(path: Path) -> dict[str, str]:
    """Which file each tensor is in, by an index. Raises ModelError."""
    try:
        found = {str(name): str(file) for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{path} is no index of weights; fetch it again") from None
    if bad := next((file for file in found.values() if Path(file).name != file), None):
        raise ModelError(f"{path} names the file {bad!r}, which is not one of the folder")
    return found


def dtype_to_hold(folder: Path) -> Literal["fp32", "bf16"]:
    """The precision to hold a folder's weights in: the one that they are stored in, else bf16."""
    try:
        shards = sorted(folder.glob("*.safetensors"))[:1]
        found = {each.dtype for shard in shards for each in read_header(shard).tensors.values()}
    except ModelError:
        return "bf16"  # an inspection refuses such a file
    return "fp32" if found == {"F32"} else "bf16"
