"""The paged pool of keys and values: who holds which block, and the tensors behind the blocks.

A block is `block_tokens` consecutive positions of one sequence, in every layer. Block 0 belongs to nobody, is never
written and stays zero: padded reads point at it, so that what another sequence left behind (a NaN, say) can never
reach a softmax. Invariant, held by a property test: a block is free or has exactly one owner.

There is no prefix sharing yet. When it comes, the digest of the adapter must be part of a block's hash: keys and
values depend on the weights that made them.
"""

import torch


class BlockAllocator:
    """Hands out the block numbers 1 to `num_blocks`, each to one owner at a time."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks, 0, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._held)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` positions."""
        return -(-num_tokens // self.block_tokens)

    def allocate(self, num_tokens: int) -> list[int]:
        """Take the blocks for `num_tokens` positions. The caller has checked `num_free`."""
        count = self.blocks_for(num_tokens)
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        blocks = [self._free.pop() for _ in range(count)]
        self._held.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give blocks back. Giving back what is not held is a bug and asserts."""
        assert self._held.issuperset(blocks), f"not held, or freed before: {blocks}"
        assert len(set(blocks)) == len(blocks), f"twice in one call: {blocks}"
        self._held.difference_update(blocks)
        self._free.extend(blocks)


class KvPool:
    """Keys and values of all layers, addressed by slot = block × block_tokens + offset.

    Each layer's two tensors, [slots, kv_heads, head_dim], are made at the first write, in the shape the model really
    gives (the probe at start-up writes every layer), so nothing is read from a config that may not say it.
    """

    def __init__(self, allocator: BlockAllocator) -> None:
        self._num_slots = (allocator.num_blocks + 1) * allocator.block_tokens
        self._block_tokens = allocator.block_tokens
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def slots(self, blocks: list[int], device: torch.device) -> torch.Tensor:
        """The slots of a sequence's positions, in order: int64 [len(blocks) × block_tokens]."""
        first = torch.tensor(blocks, dtype=torch.int64, device=device) * self._block_tokens
        return (first[:, None] + torch.arange(self._block_tokens, device=device)).flatten()

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store rows: `slots` [rows], `key` and `value` [1, kv_heads, rows, head_dim]."""
        if layer not in self._layers:
            self._layers[layer] = (self._zeros(key), self._zeros(value))
        keys, values = self._layers[layer]
        keys.index_copy_(0, slots, key[0].transpose(0, 1))
        values.index_copy_(0, slots, value[0].transpose(0, 1))

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, each [slots, kv_heads, head_dim]."""
        return self._layers[layer]

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at `slots` [batch, length]: each [batch, kv_heads, length, head_dim]."""
        keys, values = self._layers[layer]
        batch, length = slots.shape
        flat = slots.flatten()
        key = keys.index_select(0, flat).view(batch, length, *keys.shape[1:]).transpose(1, 2)
        value = values.index_select(0, flat).view(batch, length, *values.shape[1:]).transpose(1, 2)
        return key, value

    @torch.inference_mode()
    def clear_null_block(self) -> None:
        """Make block 0 zero again, after the start-up probe wrote there."""
        for keys, values in self._layers.values():
            keys[: self._block_tokens] = 0
            values[: self._block_tokens] = 0

    @property
    def num_layers(self) -> int:
        """Layers written so far."""
        return len(self._layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers made so far."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        _, heads, _, head_dim = like.shape
        return like.new_zeros(self._num_slots, heads, head_dim)
