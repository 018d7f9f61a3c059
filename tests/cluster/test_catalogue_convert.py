"""Pickles: what is good comes out bit by bit, what is bad leaves no trace and is refused by name."""

import collections
import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from cluster.catalogue import archive, sandbox
from cluster.catalogue.convert import INDEX, convert
from cluster.catalogue.pickles import Refused
from cluster.errors import ModelError

EVERY_DTYPE = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bit by bit, whatever the type; NaN too."""
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and bytes_of(ours) == bytes_of(theirs)


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def converted(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    target.mkdir()
    convert(folder, target, lambda _: None)
    return {name: tensor for path in target.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_state_dict_comes_out_bit_by_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = torch.randn(6, 4)
    state = collections.OrderedDict(torch.nn.Linear(5, 3).state_dict())  # OrderedDict with _metadata, as torch has it
    state |= {str(dtype): torch.randn(3, 5).mul(9).to(dtype) for dtype in EVERY_DTYPE}
    state |= {
        "tied": table,
        "tied.again": table, "slice": table[2:, 1:3], "transposed": table.t(), "scalar": torch.tensor(7.5),
        "empty": torch.zeros(0, 3), "strided": torch.arange(24).reshape(2, 3, 4)[:, :, ::2],
        "parameter": torch.nn.Parameter(torch.tensor([float("nan"), -0.0])),
    }  # fmt: skip
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = converted(tmp_path, tmp_path / "out")
    assert found.keys() == state.keys()
    assert not [name for name in state if not same(found[name], state[name])]


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_any_view_of_a_storage_comes_out_bit_by_bit(shape: list[int], order: Any, dtype: torch.dtype) -> None:
    whole = torch.randint(0, 2, shape).to(dtype)
    axes = list(range(len(shape)))
    order.shuffle(axes)
    view = whole.permute(axes)[tuple(slice(order.randrange(2), None, order.randrange(1, 3)) for _ in axes)]
    saved, out = io.BytesIO(), io.BytesIO()
    torch.save({"view": view, "whole": whole}, saved)
    archive.convert(io.BytesIO(saved.getvalue()), out)
    length = int.from_bytes(out.getvalue()[:8], "little")
    start, end = json.loads(out.getvalue()[8 : 8 + length])["view"]["data_offsets"]
    assert out.getvalue()[8 + length + start : 8 + length + end] == bytes_of(view)


def test_shards_come_out_under_an_index_that_names_each_tensor(tmp_path: Path) -> None:
    shards = [{"a": torch.randn(4, 2), "b": torch.ones(3)}, {"c": torch.zeros(2, dtype=torch.bfloat16)}]
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, tmp_path / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"step": 3}, tmp_path / "training_args.bin")  # a pickle, and no weights: left behind
    (tmp_path / "config.json").write_text("{}")
    found = converted(tmp_path, tmp_path / "out")
    assert all(same(found[name], tensor) for shard in shards for name, tensor in shard.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: file.replace("pytorch_", "").replace(".bin", ".safetensors") for name, file in weight_map.items()
    }
    assert index["metadata"]["total_size"] == 8 * 4 + 3 * 4 + 2 * 2
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {*index["weight_map"].values(), "model.safetensors.index.json", "config.json"}
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelError, match="which is not there"):
        converted(tmp_path, tmp_path / "again")


class Runs:
    """Pickles to a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._call = (call, arguments)

    def __reduce__(self) -> Any:
        return self._call


def archived(data: bytes, **records: bytes) -> bytes:
    """A torch archive around a pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("archive/data.pkl", data)
        for name, content in records.items():
            file.writestr(f"archive/{name}", content)
    return made.getvalue()


def saved(state: object, legacy: bool = False) -> bytes:
    made = io.BytesIO()
    torch.save(state, made, _use_new_zipfile_serialization=not legacy)
    return made.getvalue()


def attacks(trace: Path) -> dict[str, tuple[bytes, str]]:
    """Files that leave `trace` behind when they are loaded as pickles, and what is said of them."""
    touch = f"touch {trace}"
    code = f"open({str(trace)!r}, 'w')"
    tensor = torch.ones(2)
    within = pickle.dumps(Runs(os.system, touch))
    return {
        "a call": (saved({"a": tensor, "b": Runs(os.system, touch)}), "posix.system"),
        "in a list in a dict": (saved({"a": {"x": [tensor, Runs(exec, code)]}}), "__builtin__.exec"),
        "as a key": (archived(pickle.dumps({Runs(eval, code): 1}, 2)), "__builtin__.eval"),
        "a pickle in a pickle": (saved({"a": Runs(pickle.loads, within)}), "pickle.loads"),
        "protocol 0": (archived(pickle.dumps({"a": Runs(os.system, touch)}, 0)), "operation"),
        "protocol 4": (archived(pickle.dumps({"a": Runs(os.system, touch)}, 4)), "posix.system"),
        "through getattr": (archived(b"cbuiltins\ngetattr\n(cos\nO\x8c\x06system\x86R."), "builtins.getattr"),
        "INST": (archived(b"(S'" + touch.encode() + b"'\nios\nsystem\n."), "operation"),
        "OBJ": (archived(b"(cos\nsystem\n\x8c\x01xo."), "os.system"),
        "an extension code": (archived(b"\x82\x01)R."), "operation EXT1"),
        "legacy": (saved({"a": Runs(os.system, touch)}, legacy=True), "before 1.6"),
        "a plain pickle": (within, "plain pickle"),
        "torch's own loader": (saved({"a": Runs(torch.load, str(trace))}), "torch.serialization.load"),
        "a module's method": (archived(b"ctorch\nFloatStorage\n(\x8c\x01xtR."), "it calls"),
        "a module, whole": (saved(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    }


@pytest.mark.parametrize("attack", attacks(Path("/nowhere")))
def test_a_malicious_pickle_is_refused_by_name_and_leaves_no_trace(attack: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    data, said = attacks(trace)[attack]
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ModelError, match="is not converted") as refused:
        converted(tmp_path, tmp_path / "out")
    assert said in str(refused.value)
    assert not trace.exists()
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".txt"]


def test_the_attacks_do_work_where_pickles_are_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "x").write_bytes(attacks(trace)["a call"][0])
    torch.load(tmp_path / "x", weights_only=False)
    assert trace.exists()


def tensor_pickle(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...], elements: int = 4, key: str = "0"
) -> bytes:
    """A pickle that rebuilds one tensor of these figures, as torch writes it."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + value.to_bytes(8, "little", signed=True) for value in values) + b"t"

    storage = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c" + bytes([len(key)]) + key.encode() + b"\x8c\x03cpu"
    storage += numbers((elements,))[1:-1] + b"tQ"
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers((offset,))[1:-1] + numbers(size) + numbers(stride)
    )
    return b"\x80\x02}\x8c\x01a" + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRs."


LIES = {
    "beyond its storage": (tensor_pickle(1, (4,), (1,)), "beyond its storage"),
    "a negative stride": (tensor_pickle(3, (4,), (-1,)), "no sizes"),
    "repeated without end": (tensor_pickle(0, (1 << 30, 4), (0, 1)), "repeats its storage"),
    "another file": (tensor_pickle(0, (4,), (1,), key="../data.pkl"), "none to a storage"),
    "a storage that is not there": (tensor_pickle(0, (4,), (1,), key="9"), "no data/9"),
    "a storage of another size": (tensor_pickle(0, (4,), (1,), elements=8), "16 bytes where 32"),
    "no end": (tensor_pickle(0, (4,), (1,))[:-1], "no end"),
    "nothing on the stack": (b"\x80\x02R.", "damaged"),
    "not one mapping": (b"\x80\x02]\x8c\x01aa.", "state dict"),
    "a bomb": (b"\x80\x02)" + b"q\x00h\x00\x86" * 99 + b")R.", "it calls"),  # 2 to the 99th empty tuples
    "a number": (b"\x80\x02}\x8c\x01aK\x01s.", "no tensor but int"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_pickle_that_lies_about_its_tensors_is_refused(lie: str) -> None:
    data, said = LIES[lie]
    with pytest.raises(Refused, match=said):
        archive.convert(io.BytesIO(archived(data, **{"data/0": bytes(16)})), io.BytesIO())


def test_the_same_pickle_without_a_lie_is_read() -> None:
    made = io.BytesIO(archived(tensor_pickle(0, (4,), (1,)), **{"data/0": bytes(16)}))
    assert archive.convert(made, io.BytesIO()) == {"a": 16}


@settings(max_examples=300)
@given(st.binary(max_size=80), st.integers(0, 200))
def test_no_bytes_whatever_end_in_anything_but_a_refusal_or_tensors(noise: bytes, at: int) -> None:
    good = tensor_pickle(0, (4,), (1,))
    data = good[: at % len(good)] + noise + good[at % len(good) :]
    with contextlib.suppress(Refused):
        archive.convert(io.BytesIO(archived(data, **{"data/0": bytes(16)})), io.BytesIO())


def test_the_archive_itself_is_not_trusted(tmp_path: Path) -> None:
    good = saved({"a": torch.ones(64)})
    flipped = bytearray(good)
    flipped[good.index(torch.ones(64).numpy().tobytes()) + 5] ^= 1  # a byte of the weights: the checksum is wrong
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_pickle(0, (4,), (1,)))
    script = archived(tensor_pickle(0, (4,), (1,)), **{"constants.pkl": b""})
    bad = [
        (bytes(flipped), "damaged"),
        (good[:-9], "damaged"),
        (packed.getvalue(), "compressed"),
        (script, "TorchScript"),
    ]
    for data, said in bad:
        with pytest.raises(Refused, match=said):
            archive.convert(io.BytesIO(data), io.BytesIO())


PROBE = """
import json, os, resource, socket, sys
sys.path.insert(0, {root!r})
from cluster.catalogue import sandbox
sandbox._limit(1000)
walls = sandbox._close()
def tried(what):
    try:
        what()
        return "could"
    except BaseException as error:
        return type(error).__name__
print(json.dumps({{
    "walls": walls,
    "environment": dict(os.environ),
    "network": tried(lambda: socket.socket().connect(("127.0.0.1", {port}))),
    "passwords": tried(lambda: open("/etc/passwd")),
    "memory": tried(lambda: bytearray(2 << 30)),
    "here": os.listdir("/"),
}}))
"""


def probe(folder: Path, *before: str) -> dict[str, Any]:
    """What the converting process can do, once it has closed its walls."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        code = PROBE.format(root=str(Path(sandbox.__file__).parents[2]), port=listening.getsockname()[1])
        command = [*before, sys.executable, "-I", "-S", "-B", "-c", code]
        done = subprocess.run(command, env={}, cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_converting_process_is_walled_in(tmp_path: Path) -> None:
    said = probe(tmp_path)
    assert said["memory"] == "MemoryError"
    assert set(said["environment"]) <= {"LC_CTYPE"}  # Python's own
    if os.geteuid() == 0:  # the others may not be allowed to, and are told then
        assert said["walls"] == {"network": "", "files": ""}
    if not said["walls"]["network"]:
        assert said["network"] == "OSError"
    if not said["walls"]["files"]:
        assert (said["passwords"], said["here"]) == ("FileNotFoundError", [])


def test_a_wall_that_the_kernel_refuses_is_told(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-r", "true"], check=False).returncode:
        pytest.skip("no user namespaces here, in which a kernel that refuses could be made")
    shell = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    said = probe(tmp_path, "/usr/bin/unshare", "-r", "sh", "-c", shell, "sh")
    assert said["network"] == "could"
    assert said["walls"]["network"] == os.strerror(errno.ENOSPC)
