"""Many LoRA adapters under one base: linear layers that give every row of a packed batch its own adapter's update.

Each nn.Linear of the decoder becomes a MixedLoraLinear. All of them read one LoraTable, which knows the loaded
adapters and, for the step that runs, which rows belong to whom. Two ways to compute, chosen by the length of a run
(adjacent rows of one adapter):

- *by segment*, from SEGMENT_ROWS rows on (prefill): two products for the run alone.
- *batched*, below that (decode, where each adapter has a row or two): the rows are gathered by adapter and all
  adapters go in two batched products, [S, M, in] × [S, in, r] × [S, r, out]. The products alone, timed apart (8
  adapters of rank 16, 4 rows each, one CPU thread), took 1/3 to 1/2 of the time of one masked product over all A's
  stacked. With 2 adapters there was no gain, and in whole decode runs none that stood out of the noise.

A stack of A's and B's is kept while the batch's adapters are among its own, so that decoding rebuilds none; it may
hold at most twice the adapters in use, so that leavers do not slow the rest for ever. No row ever meets another
adapter's weights, so one that overflows stays alone with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from cluster.errors import Overloaded
from serving.engine.adapter import Adapter, LoraPair

SEGMENT_ROWS = 16


@dataclass(frozen=True)
class RowRun:
    """`num_rows` consecutive rows of the packed batch that use one adapter; None is the bare base."""

    adapter: str | None
    num_rows: int


@dataclass(frozen=True)
class _Batched:
    """The rows of short runs, by adapter: S adapters (those of the stack) with M places each, some of them filled up.

    `gather` int64 [S × M] says which row of the batch stands at each place; the real ones are at the places `source`
    int64 [n], and their updates go to the rows `rows` int64 [n].
    """

    gather: torch.Tensor
    source: torch.Tensor
    rows: torch.Tensor


class LoraTable:
    """The loaded adapters, at most `max_adapters`, and the assignment of the current step's rows.

    Loading and unloading exchange references and must happen between two steps; the owner sees to it.
    """

    def __init__(self, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self.adapters: dict[str, Adapter] = {}
        self.stack: list[str] = []  # the adapters in every module's stack, in order
        self.stack_version = 0
        self.segments: list[tuple[str, slice]] = []
        self.batched: _Batched | None = None

    def load(self, adapter: Adapter) -> None:
        """Take an adapter into use; one that is there is kept. Raises Overloaded when all slots are taken."""
        if adapter.digest in self.adapters:
            return
        if len(self.adapters) >= self.max_adapters:
            raise Overloaded(
                f"all {self.max_adapters} adapter slots of the engine are taken (max_adapters); unload one first"
            )
        self.adapters[adapter.digest] = adapter

    def unload(self, digest: str) -> None:
        """Forget an adapter, and drop the stacks that copied it; the modules let go of theirs at their next step."""
        del self.adapters[digest]
        if digest in self.stack:
            self._restack([each for each in self.stack if each != digest])

    def assign(self, runs: Sequence[RowRun], device: torch.device) -> None:
        """Set the rows of the next forward pass: runs in row order. Neighbours of one adapter count as one run."""
        self.segments = []
        short: dict[str, list[int]] = {}
        row = 0
        for run in _merged(runs):
            if run.adapter is not None and run.num_rows >= SEGMENT_ROWS:
                self.segments.append((run.adapter, slice(row, row + run.num_rows)))
            elif run.adapter is not None:
                short.setdefault(run.adapter, []).extend(range(row, row + run.num_rows))
            row += run.num_rows
        self.batched = self._batch(short, device) if short else None

    def _batch(self, rows_of: Mapping[str, list[int]], device: torch.device) -> _Batched:
        if not rows_of.keys() <= set(self.stack) or len(self.stack) > 2 * len(rows_of):
            self._restack(list(rows_of))
        width = max(map(len, rows_of.values()))
        gather: list[int] = []
        source: list[int] = []
        rows: list[int] = []
        for index, digest in enumerate(self.stack):
            mine = rows_of.get(digest, [])
            gather += mine + [0] * (width - len(mine))
            source += range(index * width, index * width + len(mine))
            rows += mine
        return _Batched(*(torch.tensor(each, device=device) for each in (gather, source, rows)))

    def _restack(self, digests: list[str]) -> None:
        self.stack = digests
        self.stack_version += 1


class MixedLoraLinear(nn.Module):
    """An nn.Linear plus, for each row, the update of that row's adapter. Takes the base layer's own parameters."""

    def __init__(self, base: nn.Linear, path: str, table: LoraTable) -> None:
        super().__init__()
        self.base = base
        self._path = path
        self._table = table
        self._version = -1
        self._stack: LoraPair | None = None  # a [S, in, r] and b [S, r, out]; None: the stack's adapters leave this be

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [1, T, in] → [1, T, out], with T the rows given to LoraTable.assign."""
        output = linear(x, self.base.weight, self.base.bias)
        table = self._table
        if table.batched is not None:
            if self._version != table.stack_version:
                self._stack, self._version = self._build_stack(), table.stack_version
            if self._stack is not None:
                rows = x[0].index_select(0, table.batched.gather).view(len(table.stack), -1, x.shape[2])
                update = (rows @ self._stack.a @ self._stack.b).flatten(0, 1)
                output[0].index_add_(0, table.batched.rows, update.index_select(0, table.batched.source))
        for digest, rows_of in table.segments:
            pair = table.adapters[digest].pairs.get(self._path)
            if pair is not None:
                output[0, rows_of].addmm_(linear(x[0, rows_of], pair.a), pair.b.t())
        return output

    def _build_stack(self) -> LoraPair | None:
        """The updates of the table's stack, one behind another, filled up with zeros to the highest rank."""
        adapters = [self._table.adapters[digest] for digest in self._table.stack]
        pairs = [adapter.pairs.get(self._path) for adapter in adapters]
        rank = max((len(pair.a) for pair in pairs if pair is not None), default=0)
        if rank == 0:
            return None
        weight = self.base.weight
        a = weight.new_zeros(len(pairs), self.base.in_features, rank)
        b = weight.new_zeros(len(pairs), rank, self.base.out_features)
        for index, pair in enumerate(pairs):
            if pair is not None:
                a[index, :, : len(pair.a)] = pair.a.t()
                b[index, : len(pair.a)] = pair.b.t()
        return LoraPair(a, b)


def _merged(runs: Sequence[RowRun]) -> list[RowRun]:
    merged: list[RowRun] = []
    for run in runs:
        if merged and merged[-1].adapter == run.adapter:
            run = RowRun(run.adapter, merged.pop().num_rows + run.num_rows)
        merged.append(run)
    return merged


def install(decoder: nn.Module, prefix: str, table: LoraTable) -> Mapping[str, tuple[int, int]]:
    """Replace every nn.Linear under `decoder` (whose path in the whole model is `prefix`) by a MixedLoraLinear.

    All are replaced at once, so that loading an adapter never changes the module tree under a running step; a layer
    that no adapter of the batch targets costs one comparison. Returns their (out, in) shapes by full path.
    """
    linears = [(name, module) for name, module in decoder.named_modules() if type(module) is nn.Linear]
    shapes = {}
    for name, module in linears:
        path = f"{prefix}.{name}"
        parent, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(parent), attribute, MixedLoraLinear(module, path, table))
        shapes[path] = (module.out_features, module.in_features)
    return shapes
