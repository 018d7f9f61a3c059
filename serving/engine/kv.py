"""The paged pool of keys and values: who holds which block, and the tensors behind the blocks.

A block is `block_tokens` consecutive positions of one sequence, in every layer. Block 0 belongs to nobody, is never
written and stays zero: padded reads point at it, so that what another sequence left behind (a NaN, say) can never
reach a softmax.

    free ──allocate──▶ held ──free──▶ free
                        │ publish (whole, under its key)
                        └────────free──▶ idle ──share──▶ held by any number
                                          └─ the one longest idle is given out when nothing is free

**Prefix cache.** A block whose positions are all computed may be published under a key, and is then shared by every
sequence that begins with the same tokens. Keys and values depend on the weights that made them, so a key is a hash of
the adapter's digest and of *all* tokens up to the block's end: no block is ever shared across digests. (And of how
often that digest was loaded: the engine trusts nobody's word that a folder is what its digest says.)
"""

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256

import torch


def block_keys(weights: str, tokens: list[int], block_tokens: int, after: bytes | None = None) -> list[bytes]:
    """The keys of the whole blocks of `tokens`, computed by `weights`; with `after`, the key of the block before."""
    key = after or sha256(weights.encode()).digest()
    keys = []
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        key = sha256(key + b"".join(token.to_bytes(4, "little") for token in tokens[end - block_tokens : end])).digest()
        keys.append(key)
    return keys


class BlockAllocator:
    """Hands out the block numbers 1 to `num_blocks`. A block has one owner unless it was published."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks, 0, -1))
        self._holders: dict[int, int] = {}
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and held by nobody, longest idle first

    @property
    def num_free(self) -> int:
        """How many can be handed out; idle ones among them."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """How many are held."""
        return len(self._holders)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` positions."""
        return -(-num_tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int]:
        """Take blocks that nobody shares. The caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        blocks = [self._take() for _ in range(count)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """Hold the published blocks of the first keys, up to the first that has none."""
        blocks = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Let others share a held block, all of whose positions are computed. The first under a key stays."""
        assert block in self._holders, f"not held: {block}"
        if key not in self._by_key and block not in self._key_of:
            self._by_key[key] = block
            self._key_of[block] = key

    def free(self, blocks: list[int]) -> None:
        """Give blocks back. Giving back what is not held is a bug and asserts."""
        assert self._holders.keys() >= set(blocks), f"not held, or freed before: {blocks}"
        assert len(set(blocks)) == len(blocks), f"twice in one call: {blocks}"
        for block in reversed(blocks):  # a prefix outlives what came after it
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._idle.popitem(last=False)
        del self._by_key[self._key_of.pop(block)]
        return block


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
