"""Many LoRA adapters under one base: linear layers that give every row of a packed batch its own adapter's update.

Each nn.Linear of the decoder becomes a MixedLoraLinear. All of them read one LoraTable, which knows the loaded
adapters and, for the step that runs, which rows belong to whom. Two ways to compute, chosen by the length of a run
(adjacent rows of one adapter):

- *by segment*, from SEGMENT_ROWS rows on (prefill), or KERNEL_ROWS: two products for the run alone.
- *in place*, below that (decode, where each adapter has a row or two, and short prompts), on a CPU in float32: a kernel
  of ours (kernels.c) reads each adapter's matrices where they are, whatever their ranks.
- *by shelf*, elsewhere: a shelf holds adapters of about one rank, their matrices one behind another, filled up to a
  power of two; the rows are gathered by adapter, and all adapters of the shelf go in two batched products,
  [S, M, in] × [S, in, r] × [S, r, out]. An adapter is copied to its shelf when it first has such rows, and stays there
  as long as others do not need its place, so that decoding rebuilds nothing. A shelf is at most half empty.

An adapter of DoRA also rescales the base's output in its own rows (dora.py); such adapters have shelves of their own,
so that the rows of all others are left as they are and pay nothing.

With a budget in bytes, shelves have what the adapters' own matrices leave of it. They are cleared when a new adapter
needs that, and rows for which they have no room are computed by segment, however short.

Either reads every matrix once, at the speed of the memory: 128 adapters cost what reading them costs. No row ever meets
another adapter's weights, so one that overflows stays alone with it.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from cluster.errors import Overloaded
from serving.engine import dora, kernels
from serving.engine.adapter import Adapter, LoraPair
from serving.engine.quantized import QuantizedLinear

SEGMENT_ROWS = 16
KERNEL_ROWS = 128
"""The same where kernels.c computes the shorter runs: at 64 rows it is as fast as two products and their calls."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowRun:
    """`num_rows` consecutive rows of the packed batch that use one adapter; None is the bare base."""

    adapter: str | None
    num_rows: int


@dataclass(frozen=True)
class _Layout:
    """Where the rows of a step stand on a shelf of S places with M rows each, some of them filled up.

    `gather` int64 [S × M] says which row of the batch stands where. The update at `source` int64 [n] (None: at all)
    goes to the rows `rows` int64 [n], which stand at `places` int64 [n] (None: the shelf does not ask).
    """

    gather: torch.Tensor
    source: torch.Tensor | None
    rows: torch.Tensor
    places: torch.Tensor | None


class Shelf:
    """The places of adapters whose ranks are filled up to `rank`, and the layout of the current step's rows.

    Its adapters are all of DoRA, or none is.
    """

    def __init__(self, rank: int, is_dora: bool) -> None:
        self.rank = rank
        self.is_dora = is_dora
        self.places: list[str | None] = []  # the adapter at each
        self.layout: _Layout | None = None
        self.num_bytes = 0  # of its copies in all layers
        self._last_used: dict[str, int] = {}
        self._step = 0

    def arrange(self, rows_of: Mapping[str, list[int]], device: torch.device) -> dict[int, str]:
        """Lay out a step. Returns the adapters to be copied, by place; when that is all of them, the shelf was cleared.

        Args:
            rows_of: the rows of each adapter, at least one.
        """
        self._step += 1
        self._last_used.update(dict.fromkeys(rows_of, self._step))
        if len(self.places) > 2 * len(rows_of):
            self.places.clear()
        at = {digest: place for place, digest in enumerate(self.places) if digest is not None}
        idle = [place for place, digest in enumerate(self.places) if digest not in rows_of]
        idle.sort(key=lambda place: -self._last_used.get(self.places[place] or "", 0))
        copied = {}
        for digest in rows_of.keys() - at.keys():
            if idle and (self.places[idle[-1]] is None or len(self.places) >= 2 * len(rows_of)):
                place = idle.pop()
                self.places[place] = digest
            else:
                place = len(self.places)
                self.places.append(digest)
            copied[place] = digest
        self._last_used = {each: self._last_used[each] for each in self.places if each is not None}
        self.layout = self._lay_out(rows_of, device)
        return copied

    def forget(self, digest: str) -> None:
        """Free its place."""
        self.places = [None if each == digest else each for each in self.places]

    def _lay_out(self, rows_of: Mapping[str, list[int]], device: torch.device) -> _Layout:
        width = max(map(len, rows_of.values()))
        gather: list[int] = []
        source: list[int] = []
        rows: list[int] = []
        for place, digest in enumerate(self.places):
            mine = rows_of.get(digest, []) if digest is not None else []
            gather += mine + [0] * (width - len(mine))
            source += range(place * width, place * width + len(mine))
            rows += mine
        tensors = [torch.tensor(each, device=device) for each in (gather, source, rows)]
        places = tensors[1] // width if self.is_dora else None
        return _Layout(tensors[0], None if len(rows) == len(gather) else tensors[1], tensors[2], places)


class LoraTable:
    """The loaded adapters, at most `max_adapters` and `max_bytes`, and the assignment of the current step's rows.

    Loading and unloading exchange references and must happen between two steps; the owner sees to it.
    """

    def __init__(self, max_adapters: int, max_bytes: int | None = None) -> None:
        self.max_adapters = max_adapters
        self.max_bytes = max_bytes
        self.adapters: dict[str, Adapter] = {}
        self.segments: list[tuple[str, slice]] = []
        self.groups: kernels.Groups | None = None
        self.shelves: list[Shelf] = []  # those with rows in this step
        self._slots: dict[str, int] = {}  # where each layer's table has an adapter
        self._by_kind: dict[tuple[int, bool], Shelf] = {}
        self._shelf_bytes = 0
        self._has_said = False
        self._modules: list[MixedLoraLinear] = []

    def register(self, module: "MixedLoraLinear") -> None:
        """Let a layer keep its part of every shelf."""
        self._modules.append(module)

    @property
    def num_bytes(self) -> int:
        """Of the loaded adapters and of what is copied to shelves."""
        return sum(each.num_bytes for each in list(self.adapters.values())) + self._shelf_bytes

    def size_of(self, adapter: Adapter) -> int:
        """What an adapter needs of `max_bytes`: itself, and its place on a shelf where there are shelves."""
        pair = next(iter(adapter.pairs.values()))
        if kernels.are_usable(pair.a.device, pair.a.dtype):
            return adapter.num_bytes
        return adapter.num_bytes + sum(_place_bytes(each, _shelf_rank(adapter)) for each in adapter.pairs.values())

    def load(self, adapter: Adapter) -> None:
        """Take an adapter into use; one that is there is kept. Raises Overloaded when slots or bytes are used up."""
        if adapter.digest in self.adapters:
            return
        if len(self.adapters) >= self.max_adapters:
            raise Overloaded(
                f"all {self.max_adapters} adapter slots of the engine are taken (max_adapters); unload one first"
            )
        if self._exceeds(adapter.num_bytes):
            for shelf in self._by_kind.values():
                self._clear(shelf)
        if self._exceeds(adapter.num_bytes):
            raise Overloaded(
                f"an adapter of {adapter.num_bytes:,} bytes does not fit beside the engine's others, of "
                f"{self.num_bytes:,} of {self.max_bytes:,} bytes (adapter_bytes); unload one first"
            )
        slot = next(each for each in range(self.max_adapters) if each not in self._slots.values())
        for module in self._modules:
            module.set_slot(slot, adapter)
        self._slots[adapter.digest] = slot
        self.adapters[adapter.digest] = adapter

    def unload(self, digest: str) -> None:
        """Forget an adapter."""
        self._shelf(self.adapters.pop(digest)).forget(digest)
        slot = self._slots.pop(digest)
        for module in self._modules:
            module.set_slot(slot, None)

    def assign(self, runs: Sequence[RowRun], device: torch.device, dtype: torch.dtype) -> None:
        """Set the rows of the next forward pass: runs in row order. Neighbours of one adapter count as one run."""
        self.segments, self.shelves, self.groups = [], [], None
        short: dict[str, list[int]] = {}
        row = 0
        in_place = kernels.are_usable(device, dtype)
        long = KERNEL_ROWS if in_place else SEGMENT_ROWS
        for run in _merged(runs):
            if run.adapter is not None and run.num_rows >= long:
                self.segments.append((run.adapter, slice(row, row + run.num_rows)))
            elif run.adapter is not None:
                short.setdefault(run.adapter, []).extend(range(row, row + run.num_rows))
            row += run.num_rows
        if short and in_place:
            self.groups = self._group(short)
        elif short:
            self._shelve(short, device)

    def _group(self, short: Mapping[str, list[int]]) -> kernels.Groups:
        slots = [self._slots[digest] for digest in short]
        counts = [len(rows) for rows in short.values()]
        rows = [row for rows in short.values() for row in rows]
        ranks = (self.adapters[digest].rank for digest in short)
        return kernels.Groups(
            np.array(slots, np.int64),
            np.array([0, *accumulate(counts)], np.int64),
            np.array(rows, np.int64),
            largest=max(counts) * max(ranks),
        )

    def _shelve(self, short: Mapping[str, list[int]], device: torch.device) -> None:
        rows_of: dict[Shelf, dict[str, list[int]]] = {}
        for digest, rows in short.items():
            rows_of.setdefault(self._shelf(self.adapters[digest]), {})[digest] = rows
        self.shelves = list(rows_of)
        for shelf, mine in rows_of.items():
            if not self._has_room(shelf, mine, rows_of):
                self._say_once_that_it_is_slow()
                self.shelves.remove(shelf)
                self.segments += [(digest, slice(row, row + 1)) for digest, rows in mine.items() for row in rows]
                continue
            copied = shelf.arrange(mine, device)
            for module in self._modules if copied else ():
                module.place(shelf, {place: self.adapters[digest] for place, digest in copied.items()})
            if copied:
                self._count(shelf, sum(module.bytes_on(shelf) for module in self._modules))

    def _shelf(self, adapter: Adapter) -> Shelf:
        kind = _shelf_rank(adapter), adapter.is_dora
        return self._by_kind.setdefault(kind, Shelf(*kind))

    def _has_room(self, shelf: Shelf, rows_of: Mapping[str, list[int]], others: Collection[Shelf]) -> bool:
        """Whether what a step needs of a shelf fits; shelves that the step does not use are cleared if need be."""
        new = rows_of.keys() - set(shelf.places)
        if self.max_bytes is None or not new:
            return True
        pairs: dict[str, LoraPair] = {}
        for adapter in self.adapters.values():
            if self._shelf(adapter) is shelf:
                pairs.update(adapter.pairs)
        places = _capacity(len(shelf.places) + len(new))
        wanted = places * sum(_place_bytes(pair, shelf.rank) for pair in pairs.values())
        if self._exceeds(wanted):  # beside the copies of before, which go one layer after another
            for each in self._by_kind.values():
                if each not in others:
                    self._clear(each)
        return not self._exceeds(wanted)

    def _say_once_that_it_is_slow(self) -> None:
        if not self._has_said:
            self._has_said = True
            _log.warning(
                "engine.adapter_bytes of %d leaves no room to lay adapters together: they decode one by one, slowly; "
                "raise it, or lower engine.max_adapters",
                self.max_bytes,
            )

    def _exceeds(self, more: int) -> bool:
        return self.max_bytes is not None and self.num_bytes + more > self.max_bytes

    def _clear(self, shelf: Shelf) -> None:
        for module in self._modules:
            module.clear(shelf)
        shelf.places.clear()
        self._count(shelf, 0)

    def _count(self, shelf: Shelf, num_bytes: int) -> None:
        self._shelf_bytes += num_bytes - shelf.num_bytes
        shelf.num_bytes = num_bytes


class MixedLoraLinear(nn.Module):
    """A linear layer plus, for each row, the update of that row's adapter, in full precision whatever the base's."""

    def __init__(self, base: nn.Linear | QuantizedLinear, path: str, table: LoraTable) -> None:
        super().__init__()
        self.base = base
        self._path = path
        self._table = table
        self._slots = np.zeros(table.max_adapters, kernels.ADAPTER)
        self._address: int = self._slots.ctypes.data
        # This layer's part of each shelf: a [S, r, in], b [S, r, out] and for DoRA rescale [S, 2, out], S the places
        # there is room for. None: nothing on the shelf adapts this layer.
        self._shelves: dict[Shelf, LoraPair] = {}
        table.register(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [1, T, in] → [1, T, out], with T the rows given to LoraTable.assign."""
        output: torch.Tensor = self.base(x)
        if self._table.groups is not None:
            kernels.update(output, x, self._address, self._table.groups)
        for shelf in self._table.shelves:
            stack, layout, places = self._shelves.get(shelf), shelf.layout, len(shelf.places)
            if stack is not None and layout is not None:
                rows = x[0].index_select(0, layout.gather).view(places, -1, x.shape[2])
                update = (rows @ stack.a[:places].transpose(1, 2) @ stack.b[:places]).flatten(0, 1)
                if layout.source is not None:
                    update = update.index_select(0, layout.source)
                if stack.rescale is not None and layout.places is not None:
                    mine = dora.rescaled(output[0].index_select(0, layout.rows), stack.rescale[layout.places])
                    output[0].index_copy_(0, layout.rows, (mine + update).to(output.dtype))
                else:
                    output[0].index_add_(0, layout.rows, update)
        for digest, rows_of in self._table.segments:
            pair = self._table.adapters[digest].pairs.get(self._path)
            if pair is not None:
                mine = output[0, rows_of]
                if pair.rescale is not None:
                    mine.copy_(dora.rescaled(mine, pair.rescale))
                mine.addmm_(linear(x[0, rows_of], pair.a), pair.b)
        return output

    def set_slot(self, slot: int, adapter: Adapter | None) -> None:
        """Note where this layer's part of an adapter is. The table keeps the adapter as long as it is in the slot."""
        pair = adapter.pairs.get(self._path) if adapter is not None else None
        if pair is None:
            self._slots[slot] = (0, 0, 0, 0)
        else:
            rescale = 0 if pair.rescale is None else pair.rescale.data_ptr()
            self._slots[slot] = (pair.a.data_ptr(), pair.b.data_ptr(), len(pair.a), rescale)

    def bytes_on(self, shelf: Shelf) -> int:
        """Of this layer's part of a shelf."""
        return self._shelves[shelf].num_bytes if shelf in self._shelves else 0

    def clear(self, shelf: Shelf) -> None:
        """Give up this layer's part of a shelf."""
        self._shelves.pop(shelf, None)

    @torch.inference_mode()
    def place(self, shelf: Shelf, adapters: Mapping[int, Adapter]) -> None:
        """Copy adapters to their places on a shelf, making room for them; ranks are filled up with zeros.

        One that leaves this layer alone has zeros there, and a scale of 1.
        """
        if len(adapters) == len(shelf.places):
            self._shelves.pop(shelf, None)  # it was cleared
        for place, adapter in adapters.items():
            pair = adapter.pairs.get(self._path)
            if pair is None and shelf not in self._shelves:
                continue
            stack = self._with_room(shelf, pair.a if pair is not None else self._shelves[shelf].a)
            for side in ("a", "b"):
                here = getattr(stack, side)[place]
                rank = 0
                if pair is not None:
                    rank = len(pair.a)
                    here[:rank] = getattr(pair, side)
                here[rank:] = 0
            if stack.rescale is not None:
                rescale = pair.rescale if pair is not None else None
                stack.rescale[place] = dora.NO_RESCALE if rescale is None else rescale

    def _with_room(self, shelf: Shelf, like: torch.Tensor) -> LoraPair:
        stack, wanted = self._shelves.get(shelf), len(shelf.places)
        if stack is None or len(stack.a) < wanted:
            capacity = _capacity(wanted)
            a = like.new_zeros(capacity, shelf.rank, self.base.in_features)
            b = like.new_zeros(capacity, shelf.rank, self.base.out_features)
            rescale = None
            if shelf.is_dora:
                rescale = a.new_empty(capacity, 2, self.base.out_features, dtype=torch.float32)
                rescale[:] = dora.NO_RESCALE
            if stack is not None:
                a[: len(stack.a)], b[: len(stack.b)] = stack.a, stack.b
                if rescale is not None and stack.rescale is not None:
                    rescale[: len(stack.rescale)] = stack.rescale
            self._shelves[shelf] = stack = LoraPair(a, b, rescale)
        return stack


def _shelf_rank(adapter: Adapter) -> int:
    return 1 << (adapter.rank - 1).bit_length()


def _capacity(places: int) -> int:
    return 1 << (places - 1).bit_length()


def _place_bytes(pair: LoraPair, rank: int) -> int:
    """Of one layer's place on a shelf."""
    matrices = pair.a.nbytes + pair.b.nbytes
    return pair.num_bytes - matrices + rank * matrices // len(pair.a)


def _merged(runs: Sequence[RowRun]) -> list[RowRun]:
    merged: list[RowRun] = []
    for run in runs:
        if merged and merged[-1].adapter == run.adapter:
            run = RowRun(run.adapter, merged.pop().num_rows + run.num_rows)
        merged.append(run)
    return merged


def install(decoder: nn.Module, prefix: str, table: LoraTable) -> Mapping[str, nn.Linear | QuantizedLinear]:
    """Replace every linear layer under `decoder` (whose path in the whole model is `prefix`) by a MixedLoraLinear.

    All are replaced at once, so that loading an adapter never changes the module tree under a running step; a layer
    that no adapter of the batch targets costs one comparison. Returns what was replaced, by full path.
    """
    linears = {
        name: module
        for name, module in decoder.named_modules()
        if type(module) is nn.Linear or isinstance(module, QuantizedLinear)
    }
    for name, module in linears.items():
        parent, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(parent), attribute, MixedLoraLinear(module, f"{prefix}.{name}", table))
    return {f"{prefix}.{name}": module for name, module in linears.items()}
