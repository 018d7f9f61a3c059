"""What a torch pickle says, read without running it: its opcodes are interpreted here, and nothing is ever called.

A pickle is a programme for a small stack machine, whose REDUCE calls whatever function it has named. This machine knows
the few opcodes that `torch.save` writes for a state dict (pickle protocols 2 to 5), and for each of a handful of names
a description to put on the stack. Any other name is refused when it is named, before anything is done with it.

    parse(data)   ->   {"model.embed_tokens.weight": Tensor(storage="0", dtype="BF16", …), …}

Standard library alone, and no errors of ours but Refused: it runs in a process that has nothing else (sandbox.py).
"""

import io
import pickletools
import reprlib  # short: a pickle of a hundred bytes can hold more than fits any memory
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""torch's typed storages, and safetensors' name of what is in them."""

DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "uint16": "U16", "uint32": "U32", "uint64": "U64"}
"""Types of elements without a storage class of their own: `_rebuild_tensor_v3` names them."""

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
MAX_PICKLE_BYTES = 256 << 20  # the names and sizes of a million tensors
_MAX_TENSOR_BYTES = 1 << 40
_UNTYPED = "torch.storage UntypedStorage"


class Refused(Exception):
    """What is not read, named as it stands in the file."""


@dataclass(frozen=True)
class Storage:
    """Raw bytes of the archive, `data/<key>`; `dtype` is None where the tensors say it."""

    key: str
    dtype: str | None
    elements: int

    @property
    def nbytes(self) -> int:
        return self.elements * (1 if self.dtype is None else ITEM_BYTES[self.dtype])


@dataclass(frozen=True)
class Tensor:
    """A view into a storage; `offset` and `stride` are in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names, standing for itself: there is nothing to call."""

    text: str


class _Mark:
    pass


def parse(data: bytes) -> dict[str, Tensor]:
    """The state dict that a pickle describes. Raises Refused."""
    if len(data) > MAX_PICKLE_BYTES:
        raise Refused(f"its pickle has {len(data)} bytes, more than the names of any model's tensors take")
    found = _Machine().run(data)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise Refused("it does not hold a state dict, a mapping of names to tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise Refused(
                f"its entry {reprlib.repr(name)} is no tensor but {type(value).__name__}; save the state dict alone"
            )
    return found


class _Machine:
    """The stack machine. What it holds is plain data, descriptions, and names."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._opcodes: dict[str, Callable[[Any], None]] = {
            "PROTO": self._nothing, "FRAME": self._nothing, "MARK": lambda _: self._stack.append(_Mark),
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True), "NEWFALSE": lambda _: self._stack.append(False),
            "BININT": self._push, "BININT1": self._push, "BININT2": self._push, "LONG1": self._push,
            "BINFLOAT": self._push, "BINUNICODE": self._push, "SHORT_BINUNICODE": self._push,
            "EMPTY_DICT": lambda _: self._stack.append({}), "EMPTY_LIST": lambda _: self._stack.append([]),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "TUPLE": lambda _: self._stack.append(tuple(self._above_mark())),
            "TUPLE1": lambda _: self._tuple(1), "TUPLE2": lambda _: self._tuple(2), "TUPLE3": lambda _: self._tuple(3),
            "BINPUT": self._put, "LONG_BINPUT": self._put, "MEMOIZE": lambda _: self._put(len(self._memo)),
            "BINGET": self._get, "LONG_BINGET": self._get,
            "APPEND": lambda _: self._append([self._pop()]), "APPENDS": lambda _: self._append(self._above_mark()),
            "SETITEM": lambda _: self._set([*reversed([self._pop(), self._pop()])]),
            "SETITEMS": lambda _: self._set(self._above_mark()),
            "GLOBAL": lambda lines: self._name(*lines),
            "STACK_GLOBAL": lambda _: self._name(*reversed([self._pop(), self._pop()])),
            "BINPERSID": lambda _: self._stack.append(_storage(self._pop())),
            "REDUCE": self._reduce, "BUILD": self._build,
        }  # fmt: skip

    def run(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        try:
            while code := stream.read(1):
                opcode = _OPCODES[code.decode("latin-1")]
                if opcode.name == "STOP":
                    return self._pop()
                if opcode.name not in self._opcodes:  # before its argument is looked at
                    raise Refused(f"it uses the pickle operation {opcode.name}, which no state dict needs")
                read = _two_lines if opcode.name == "GLOBAL" else opcode.arg.reader if opcode.arg else _no_argument
                self._opcodes[opcode.name](read(stream))
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Refused(f"its pickle is damaged ({error})") from None
        raise Refused("its pickle has no end")

    def _nothing(self, _: Any) -> None:
        pass

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _Mark:
            raise Refused("its pickle is damaged (a mark where a value is needed)")
        return value

    def _above_mark(self) -> list[Any]:
        found: list[Any] = []
        while (value := self._stack.pop()) is not _Mark:
            found.append(value)
        return found[::-1]

    def _tuple(self, length: int) -> None:
        self._stack.append(tuple(reversed([self._pop() for _ in range(length)])))

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise Refused("its pickle appends to what is no list")
        target.extend(values)

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise Refused("its pickle sets items of what is no mapping")
        target.update(zip(values[::2], values[1::2], strict=True))

    def _name(self, module: str, name: str) -> None:
        text = f"{module} {name}"
        allowed = text in _BUILDERS or text == _UNTYPED or (module == "torch" and name in STORAGES | DTYPES)
        if not allowed:
            raise Refused(f"it calls for {module}.{name}, which no state dict needs")
        self._stack.append(_Name(text))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Name) or function.text not in _BUILDERS or not isinstance(arguments, tuple):
            raise Refused(f"it calls {reprlib.repr(function)}, which no state dict needs")
        self._stack.append(_BUILDERS[function.text](*arguments))

    def _build(self, _: Any) -> None:
        """A state dict's own attributes (`_metadata`: versions of modules) are left aside."""
        self._pop()
        if not isinstance(self._stack[-1], dict):
            raise Refused("it sets the state of what is no mapping")


def _two_lines(stream: io.BytesIO) -> tuple[str, str]:
    """GLOBAL's module and name, as unpicklers read them (pickletools would resolve escapes in them)."""
    module, name = stream.readline(), stream.readline()
    return module.decode().removesuffix("\n"), name.decode().removesuffix("\n")


def _no_argument(_: io.BytesIO) -> None:
    pass


def _storage(persistent: Any) -> Storage:
    """From torch's ("storage", class, key, device, number of elements)."""
    kind, cls, key, _, elements = persistent
    is_whole = kind == "storage" and isinstance(cls, _Name) and isinstance(key, str) and isinstance(elements, int)
    if not is_whole or not key.isdecimal() or not 0 <= elements <= _MAX_TENSOR_BYTES:
        raise Refused(f"its reference {reprlib.repr(persistent)} is none to a storage")
    return Storage(key, None if cls.text == _UNTYPED else STORAGES[cls.text.removeprefix("torch ")], elements)


def _ordered(*items: Any) -> dict[Any, Any]:
    return dict(*items)


def _tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise Refused("a tensor without a storage of a known type")
    return _checked(Tensor(storage, storage.dtype, offset, shape, stride))


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any) -> Tensor:
    name = dtype.text.removeprefix("torch ") if isinstance(dtype, _Name) else ""
    if not isinstance(storage, Storage) or name not in DTYPES:
        raise Refused("a tensor without a storage, or of an unknown type")
    return _checked(Tensor(storage, DTYPES[name], offset, shape, stride))


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise Refused("a parameter that is no tensor")
    return tensor


def _checked(tensor: Tensor) -> Tensor:
    """`tensor`, if it is within its storage and no larger than it."""
    numbers = (tensor.offset, *tensor.shape, *tensor.stride)
    if not all(isinstance(each, int) and 0 <= each <= _MAX_TENSOR_BYTES for each in numbers):
        raise Refused("a tensor whose offset, shape or strides are no sizes")
    if len(tensor.shape) != len(tensor.stride):
        raise Refused("a tensor with more sizes than strides, or fewer")
    if not prod(tensor.shape):
        return tensor
    item = ITEM_BYTES[tensor.dtype]
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if (last + 1) * item > tensor.storage.nbytes:
        raise Refused("a tensor that reaches beyond its storage")
    if tensor.nbytes > tensor.storage.nbytes:
        raise Refused("a tensor that repeats its storage (an expanded one); save it with .contiguous()")
    return tensor


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered,
    "torch._utils _rebuild_tensor_v2": _tensor_v2,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": _parameter,
}
"""What may be called, and what it leaves on the stack."""
