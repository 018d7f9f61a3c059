"""Attention over a packed row: every token sees its own sequence in the paged pool, and nothing else.

All requests of a step stand in one row [1, T]. Stock attention would build one dense T × T mask over all of them (2
to 4 times slower than padded batches on a CPU). Instead the function here is registered with transformers under NAME;
it has no mask function beside it, for which transformers builds no mask at all; and it attends sequence by sequence:

- *Single rows* (decode steps) of all requests go in one call: on a CPU in float32 of our own kernel (kernels.py), which
  reads keys and values where they lie; else padded, the query heads that share a key head laid along the query axis,
  so that keys are never repeated for grouped-query attention.
- *Longer chunks* (prefill) go one call each, causal, over the fresh keys or, for a later chunk, the pool's.

Which rows belong to whom comes as `packed=PackedRows`, a keyword that transformers carries through the model's
forward to every attention layer. Anything else a model asks of its attention (sinks, position biases, …) would
change its answers if ignored, so an unknown keyword is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from cluster.errors import ModelError
from serving.engine import kernels
from serving.engine.kv import KvPool

NAME = "luthier_packed"

# Keywords that carry nothing this function needs: positions are in PackedRows already, dropout is 0 in eval mode, and
# the router's logits are for the training of a mixture of experts.
_INERT = frozenset({"dropout", "position_ids", "use_cache", "output_router_logits"})


@dataclass(frozen=True)
class Span:
    """The rows [row, row + end - start) of the packed row are positions [start, end) of one sequence.

    `slots` is int64 [≥ end]: the pool's slot of every position from 0.
    """

    row: int
    start: int
    end: int
    slots: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.end - self.start


class PackedRows:
    """The layout of one step: spans in row order, the single-row ones first. Shared by all layers.

    What depends only on the layout and the window (padded slots, masks) is made once and kept for the other layers.
    """

    def __init__(self, pool: KvPool, spans: Sequence[Span]) -> None:
        self.pool = pool
        self.num_rows = sum(span.num_rows for span in spans)
        self.write_slots = torch.cat([span.slots[span.start : span.end] for span in spans])
        self.singles = [span for span in spans if span.num_rows == 1]
        self.chunks = [span for span in spans if span.num_rows > 1]
        assert list(spans) == [*self.singles, *self.chunks], "single rows must come first"
        self._decode: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}
        self._runs: dict[int | None, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._chunk_masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def decode_runs(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor, int]:
        """For the single rows: the slots seen, one row's behind the other's, where each begins, and the longest."""
        if window not in self._runs:
            seen = [span.slots[_first_seen(span.start, window) : span.end] for span in self.singles]
            lengths = [len(each) for each in seen]
            self._runs[window] = (torch.cat(seen), torch.tensor([0, *accumulate(lengths)]), max(lengths))
        return self._runs[window]

    def decode_view(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """For the single rows: slots [D, L] padded with the null slot, and where they are real, bool [D, 1, 1, L]."""
        if window not in self._decode:
            seen = [span.slots[_first_seen(span.start, window) : span.end] for span in self.singles]
            slots = pad_sequence(seen, batch_first=True, padding_value=0)
            lengths = torch.tensor([len(each) for each in seen], device=slots.device)
            real = torch.arange(slots.shape[1], device=slots.device) < lengths[:, None]
            self._decode[window] = (slots, real[:, None, None, :])
        return self._decode[window]

    def chunk_mask(self, span: Span, window: int | None) -> torch.Tensor | None:
        """What a chunk's rows may see, bool [rows, seen]; None where plain causal attention says the same."""
        key = (span.row, window)
        if key not in self._chunk_masks:
            if span.start == 0 and (window is None or span.end <= window):
                self._chunk_masks[key] = None
            else:
                device = span.slots.device
                query = torch.arange(span.start, span.end, device=device)[:, None]
                seen = torch.arange(_first_seen(span.start, window), span.end, device=device)
                mask = seen <= query
                self._chunk_masks[key] = mask if window is None else mask & (seen > query - window)
        return self._chunk_masks[key]


def register() -> None:
    """Make NAME known to transformers, as an attention implementation without a mask function."""
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedRows,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unknown: object,
) -> tuple[torch.Tensor, None]:
    """One layer's attention: `query` [1, heads, T, d], `key` and `value` [1, kv_heads, T, d] → [1, T, heads, d].

    A sliding window of w sees w positions, the row's own among them (as transformers counts). Raises ModelError for
    a mask or a keyword that it would have to ignore.
    """
    asked = sorted(name for name, given in unknown.items() if given is not None and name not in _INERT)
    if attention_mask is not None:
        asked.append("a dense mask")
    if not module.is_causal:
        asked.append("attention in both directions")
    if asked:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(asked)}, which the native engine does not do; "
            "serve this model with another engine"
        )
    layer = module.layer_idx
    assert isinstance(layer, int)
    packed.pool.write(layer, packed.write_slots, key, value)
    output = value.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [T, heads, d]

    if packed.singles:
        singles = query[0, :, : len(packed.singles)].transpose(0, 1)  # [D, heads, d]
        if kernels.are_usable(value.device, value.dtype) and value.shape[3] == query.shape[3]:
            keys, values = packed.pool.layer(layer)
            slots, starts, longest = packed.decode_runs(sliding_window)
            output[: len(singles)] = kernels.attend(singles, keys, values, slots, starts, longest, scaling, softcap)
        else:
            slots, real = packed.decode_view(sliding_window)
            keys, values = packed.pool.read(layer, slots)
            grouped = singles.reshape(len(singles), key.shape[1], -1, query.shape[3])  # [D, kv_heads, group, d]
            seen = _attend(grouped, keys, values, real, False, scaling, softcap)
            output[: len(singles)] = seen.flatten(1, 2)

    for span in packed.chunks:
        rows = slice(span.row, span.row + span.num_rows)
        mask = packed.chunk_mask(span, sliding_window)
        if span.start == 0:
            keys, values = key[:, :, rows], value[:, :, rows]
        else:
            first = _first_seen(span.start, sliding_window)
            keys, values = packed.pool.read(layer, span.slots[None, first : span.end])
        seen = _attend(query[:, :, rows], keys, values, mask, mask is None, scaling, softcap)
        output[rows] = seen[0].transpose(0, 1)

    return output[None], None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(cap(q kᵀ · scaling) + mask) v, with cap(s) = softcap · tanh(s / softcap) where a model has one."""
    if softcap is None:
        is_grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=is_grouped
        )
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _first_seen(position: int, window: int | None) -> int:
    """The first position that `position` can see."""
    return 0 if window is None else max(0, position - window + 1)
