"""From a torch archive to a safetensors file, byte by byte: nothing is computed, and torch is not needed.

    pytorch_model.bin   a zip: <name>/data.pkl, <name>/data/0, <name>/data/1, … (raw, little-endian)
    model.safetensors   length of the header, header (JSON), the tensors one after the other

Tensors that share a storage (tied weights, slices) are each written whole, so the file stands for the same state dict;
strides are resolved. One storage is in memory at a time. Standard library alone (sandbox.py says why).
"""

import json
import zipfile
from collections.abc import Iterator
from math import prod
from typing import BinaryIO, Literal

from cluster.catalogue.pickles import ITEM_BYTES, MAX_PICKLE_BYTES, Refused, Storage, Tensor, parse

_LEGACY = (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x04\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {
    1: "B",
    2: "H",
    4: "I",
    8: "Q",
}  # integers of an element's size: bytes are moved, never read


def convert(source: BinaryIO, target: BinaryIO) -> dict[str, int]:
    """Write the state dict of a torch archive as safetensors. Returns each tensor's size in bytes. Raises Refused."""
    head = source.read(64)
    source.seek(0)
    if not head.startswith(b"PK"):
        raise Refused(_not_a_zip(head))
    try:
        with zipfile.ZipFile(source) as archive:
            records = _records(archive)
            tensors = parse(_read(archive, records, "data.pkl", MAX_PICKLE_BYTES))
            _write(archive, records, tensors, target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise Refused(f"its archive is damaged ({error})") from None
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _not_a_zip(head: bytes) -> str:
    if head.startswith(_LEGACY):
        return (
            "it is in torch's format of before 1.6, whose pickles cannot be told from other programmes; where you "
            "trust it, load it and save it again with torch, or with safetensors"
        )
    if head[:1] == b"\x80":
        return "it is a plain pickle, and no archive that torch.save writes"
    return "it is no archive that torch.save writes"


def _records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries by their name below its one folder."""
    infos = archive.infolist()
    folders = {info.filename.partition("/")[0] for info in infos}
    records = {info.filename.partition("/")[2]: info for info in infos}
    if len(folders) != 1 or len(records) != len(infos):
        raise Refused("its archive has no single folder, or a name twice")
    if "constants.pkl" in records:
        raise Refused("it is a TorchScript programme and no state dict")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise Refused("its archive is compressed or encrypted, as torch.save's never is")
    if "byteorder" in records and _read(archive, records, "byteorder", 16) != b"little":
        raise Refused("it was written on a big-endian machine")
    return records


def _read(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], name: str, most: int) -> bytes:
    """One entry, its checksum verified."""
    if name not in records:
        raise Refused(f"its archive has no {name}")
    if records[name].file_size > most:
        raise Refused(f"its {name} is larger than such a one can be")
    return archive.read(records[name])


def _write(
    archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], tensors: dict[str, Tensor], target: BinaryIO
) -> None:
    by_storage: dict[str, list[str]] = {}
    sizes: dict[str, Storage] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.storage.key, []).append(name)
        if sizes.setdefault(tensor.storage.key, tensor.storage).nbytes != tensor.storage.nbytes:
            raise Refused(f"its storage {tensor.storage.key} is said to have two sizes")
    order = [name for names in by_storage.values() for name in names]
    target.write(_header(tensors, order))
    for key, names in by_storage.items():
        data = _read(archive, records, f"data/{key}", sizes[key].nbytes)
        if len(data) != sizes[key].nbytes:
            raise Refused(f"its data/{key} has {len(data)} bytes where {sizes[key].nbytes} are said to be")
        for name in names:
            for piece in _bytes_of(tensors[name], memoryview(data)):
                target.write(piece)


def _header(tensors: dict[str, Tensor], order: list[str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor, data: memoryview) -> Iterator[bytes | memoryview]:
    """A tensor's elements in row-major order."""
    item = ITEM_BYTES[tensor.dtype]
    if tensor.is_contiguous or not prod(tensor.shape):
        yield data[tensor.offset * item : tensor.offset * item + tensor.nbytes]
        return
    elements = data[: len(data) // item * item].cast(_FORMATS[item])
    *outer, length = tensor.shape
    *steps, step = tensor.stride
    for start in _starts(tensor.offset, outer, steps):
        yield elements[start : start + (length - 1) * step + 1 : step or 1].tobytes() * (1 if step else length)


def _starts(offset: int, shape: list[int], stride: list[int]) -> Iterator[int]:
    """Where each innermost row begins, in order."""
    if not shape:
        yield offset
        return
    for index in range(shape[0]):
        yield from _starts(offset + index * stride[0], shape[1:], stride[1:])
