"""Who is in the next forward pass, and with how many of its tokens. Pure bookkeeping: no tensors, no clock.

    waiting ──admit──▶ running (prefill ▸ decode) ──finish──▶ gone

1. add      the caller; refuses what can never fit, and everything while `max_waiting` wait.
2. admit    the adapter that was given least goes first (fairness.py), and its oldest request waits until a place and
            *all* the blocks for its prompt and max_tokens are free. So nothing admitted ever runs out of memory,
            nothing is pre-empted and nothing starves. The price is blocks reserved for tokens that may never come;
            pre-emption would go here.
3. plan     each decoding sequence gets its one token; what is left of `max_batch_tokens` goes to prompts in order of
            arrival, each at most half of the whole while others want some. A long prompt is thus read in chunks,
            and delays a running stream by one bounded step, never by its whole length.
4. advance  what was computed counts; blocks that are whole are published for others that begin alike.
5. finish   the blocks return.

With the prefix cache a request begins behind the blocks that another of its adapter has computed; its last prompt token
is always computed anew, since its logits are needed.
"""

from dataclasses import dataclass, field

from cluster.errors import Overloaded, RequestError
from serving.engine.fairness import FairQueue
from serving.engine.kv import BlockAllocator, block_keys
from serving.engine.protocol import GenerationRequest

_SHARE_OF_ROOM = 2
"""How many times the queue's free places one adapter may have waiting there: the dynamic threshold of Choudhury and
Hahne (1998). One alone gets two thirds of the queue, several less each, and there is room for one that comes later."""


@dataclass(frozen=True)
class Limits:
    """What bounds a step and the queue. `max_sequence_tokens` is the model's own context length."""

    max_batch_tokens: int
    max_running: int
    max_waiting: int
    max_sequence_tokens: int
    prefix_cache: bool = False


@dataclass(eq=False)
class Sequence:
    """One request on its way: `tokens` is the prompt and what was generated; the first `computed` are in the pool.

    `weights` tells apart whatever computes different keys and values of the same tokens.
    """

    request: GenerationRequest
    weights: str = ""
    tokens: list[int] = field(init=False)
    computed: int = 0
    shared: int = 0  # of them, those that were there when it was admitted
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its whole blocks, as far as they are published or shared
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def flow(self) -> str:
        """Among whom the engine is shared out: the adapters, and the bare base as one of them."""
        return self.request.adapter or ""

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def max_cached(self) -> int:
        """The most positions this sequence ever stores; the last token's keys are never needed."""
        return len(self.request.prompt_ids) + self.request.params.max_tokens - 1


@dataclass(frozen=True)
class Chunk:
    """The positions [start, end) of a sequence, to be computed in the next step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def samples(self) -> bool:
        """Whether the last position's logits give the next token."""
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """The queue, the running set and the blocks. Not thread-safe: its owner calls it from one place at a time."""

    def __init__(self, limits: Limits, allocator: BlockAllocator) -> None:
        if limits.max_running > limits.max_batch_tokens:
            raise ValueError(
                f"max_running is {limits.max_running} but a step holds only max_batch_tokens = "
                f"{limits.max_batch_tokens}: each running sequence needs one token of it"
            )
        self.limits = limits
        self.allocator = allocator
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []

    def sequences(self) -> list[Sequence]:
        """All that have not ended, running ones first."""
        return [*self.running, *self.waiting]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError when it can never fit, Overloaded when too many wait."""
        prompt, new = len(sequence.request.prompt_ids), sequence.request.params.max_tokens
        if prompt == 0:
            raise RequestError("the prompt is empty; send at least one token")
        if prompt + new > self.limits.max_sequence_tokens:
            raise RequestError(
                f"the prompt's {prompt} tokens and max_tokens {new} are {prompt + new}, above the model's context of "
                f"{self.limits.max_sequence_tokens} tokens; shorten the prompt or lower max_tokens"
            )
        blocks = self.allocator.blocks_for(sequence.max_cached)
        if blocks > self.allocator.num_blocks:
            capacity = self.allocator.num_blocks * self.allocator.block_tokens
            raise RequestError(
                f"the prompt's {prompt} tokens and max_tokens {new} are {prompt + new}, above this engine's key-value "
                f"memory of {capacity} tokens (kv_tokens); shorten the prompt or lower max_tokens"
            )
        room, own = self.limits.max_waiting - len(self.waiting), self.waiting.length(sequence.flow)
        if room <= 0 or own >= _SHARE_OF_ROOM * room:
            of = f"{own} of them for this adapter, " if room > 0 else ""
            raise Overloaded(
                f"{len(self.waiting)} requests wait already, {of}of at most {self.limits.max_waiting} that this engine "
                "queues (max_waiting); try again soon"
            )
        self.waiting.add(sequence.flow, sequence)

    def plan(self) -> list[Chunk]:
        """Admit what fits, then the next step's chunks, single tokens first; empty when there is none."""
        self._admit()
        budget = self.limits.max_batch_tokens
        granted = {sequence: 1 for sequence in self.running if sequence.remaining == 1}
        budget -= len(granted)
        prompts = [sequence for sequence in self.running if sequence.remaining > 1]
        for most in (self.limits.max_batch_tokens // 2, self.limits.max_batch_tokens):
            for sequence in prompts:
                already = granted.get(sequence, 0)
                extra = max(0, min(sequence.remaining, most) - already)
                extra = min(extra, budget)
                if extra:
                    granted[sequence] = already + extra
                    budget -= extra
        chunks = [Chunk(each, each.computed, each.computed + count) for each, count in granted.items()]
        # Single rows first, for attention; each adapter's rows together, for its products.
        return sorted(chunks, key=lambda chunk: (chunk.num_tokens > 1, chunk.sequence.request.adapter or ""))

    def advance(self, chunk: Chunk) -> None:
        """A chunk's keys and values are in the pool."""
        sequence, size = chunk.sequence, self.allocator.block_tokens
        sequence.computed = chunk.end
        if chunk.start >= len(sequence.request.prompt_ids):  # the prompt's were charged when it was admitted
            self.waiting.charge(sequence.flow, chunk.num_tokens, sequence.request.weight)
        whole = chunk.end // size
        if self.limits.prefix_cache and whole > len(sequence.keys):
            first = len(sequence.keys)
            after = sequence.keys[-1] if sequence.keys else None
            keys = block_keys(sequence.weights, sequence.tokens[first * size : whole * size], size, after)
            for block, key in zip(sequence.blocks[first:whole], keys, strict=True):
                self.allocator.publish(block, key)
            sequence.keys += keys

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, waiting or running, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.allocator.free(sequence.blocks)
            sequence.blocks = []
        else:
            self.waiting.remove(sequence.flow, sequence)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.max_running:
            head, size = self.waiting.head(), self.allocator.block_tokens
            prompt = head.request.prompt_ids
            keys: list[bytes] = []
            if self.limits.prefix_cache:
                keys = block_keys(head.weights, prompt[: (len(prompt) - 1) // size * size], size)
            shared = self.allocator.share(keys)
            needed = self.allocator.blocks_for(head.max_cached) - len(shared)
            if needed > self.allocator.num_free:
                self.allocator.free(shared)
                return
            head.blocks = shared + self.allocator.allocate(needed)
            head.keys = keys[: len(shared)]
            head.computed = head.shared = len(shared) * size
            self.running.append(self.waiting.pop())
            self.waiting.charge(head.flow, len(prompt) - head.shared, head.request.weight)
