"""What an engine is: prompt token ids in, a stream of tokens out, adapters by digest.

An engine knows nothing of Ray, HTTP, tenants or the store. It is given a folder with a base model and, while it
runs, folders with peft adapters; whoever stands above it fetches, names and counts them. Importing this imports no
torch, so the HTTP side can build requests with it.
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from cluster.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MAX_PENALTY = 2.0  # presence and frequency, either way
MAX_REPETITION_PENALTY = 1000.0  # and no less than one through it: further out, float32 logits overflow

MakeRoom = Callable[[int], Awaitable[None]]
"""Awaited by an engine with the bytes that an adapter is about to take in it."""

GRAMMAR_FAILED = "the grammar leaves no token"
"""What the error of an answer begins with whose grammar met a limit: the request is at fault, asked again too."""

FinishReason = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_schema", "regex", "choice", "lark"]
Quantization = Literal["int8", "nf4"]  # of the base's weights (quantized.py)


@dataclass(frozen=True)
class Grammar:
    """What the whole answer must be: `text` is a JSON schema, a regular expression, a JSON list of strings of which it
    is one, or a grammar in Lark's notation. `param` is the request's parameter that asked for it, for messages.
    """

    kind: GrammarKind
    text: str
    param: str = field(default="grammar", compare=False)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Raises InvalidRequest, naming the value and its range, when built with a bad one.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. `stop` strings end the text and are not part of it.
    `seed` makes the draws repeatable whatever else is in the batch (taken modulo 2**63); None draws a fresh one.
    `logprobs` is the number of alternatives to report beside the chosen token's own; None reports nothing.
    OpenAI's `n` is not here: each choice is a request of its own.

    `logit_bias` is added to the logits of its tokens. `repetition_penalty` divides what is positive and multiplies what
    is negative of the tokens of prompt and answer (as in transformers; 1 is off). `presence_penalty` is taken off the
    tokens of the answer once, `frequency_penalty` as often as the answer has them (as in OpenAI's API).
    None of the first `min_tokens` tokens ends the sequence or completes a stop string. `ignore_eos` goes on after the
    end of the sequence, up to `max_tokens`. A `grammar` leaves only tokens by which the answer can still belong to it,
    and ends it when nothing may follow, whatever min_tokens and ignore_eos say.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias)
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more, and finite"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("stop", self.stop, all(self.stop), "without empty strings"),
            (
                "logprobs",
                self.logprobs,
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"0 to {MAX_LOGPROBS}",
            ),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= MAX_PENALTY, "-2 to 2"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= MAX_PENALTY, "-2 to 2"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                1 / MAX_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
                f"{1 / MAX_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g} (1 is off)",
            ),
            (
                "min_tokens",
                self.min_tokens,
                0 <= self.min_tokens <= self.max_tokens,
                f"0 to max_tokens, which is {self.max_tokens}",
            ),
            (
                "logit_bias",
                dict(self.logit_bias),
                all(abs(bias) <= MAX_BIAS for _, bias in self.logit_bias),
                "biases of -100 to 100",
            ),
        )
        for name, value, is_good, wanted in checks:
            if not is_good:
                raise InvalidRequest(f"{name} is {value!r}; it must be {wanted}", name)


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate. `adapter` is the digest of a loaded adapter; None is the bare base model.

    While others wait, an adapter of weight 2 gets twice the tokens of one of weight 1.
    """

    id: str
    prompt_ids: list[int]
    adapter: str | None
    params: SamplingParams
    weight: float = 1.0


@dataclass(frozen=True)
class TokenLogprob:
    """A candidate token, its own text, and its natural-log probability under the raw model distribution."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class TokenEvent:
    """One generated token, or the end of a stream without one (`token_id` None: cancelled, or an error).

    `text` is what may be shown now: whole characters only, never part of a stop string, so that it may lag behind the
    tokens; the texts of all events joined are the answer. `logprob` and `top_logprobs` (best first) are of the raw
    model distribution, before temperature and filters, and set only when asked for. The event whose
    `finish_reason` is set is the last one; `error` says why when that is "error".
    """

    token_id: int | None
    text: str
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start (requests … adapter_loads) and the state right now (the rest)."""

    requests: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # computed
    shared_tokens: int = 0  # of prompts, found in the prefix cache
    generated_tokens: int = 0
    mixed_steps: int = 0  # forward passes that held two or more distinct adapters
    max_adapters_in_step: int = 0
    adapter_loads: int = 0
    running: int = 0
    waiting: int = 0
    queued_prompt_tokens: int = 0  # to be computed; of those that wait, less what the prefix cache should have
    waiting_answer_tokens: int = 0  # at most to come, by max_tokens
    running_answer_tokens: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    weight_bytes: int = 0  # of the base, as its tensors say; 0 where another process has them
    kv_bytes: int = 0  # of the paged pool
    adapter_bytes: int = 0  # of adapters, and of copies that steps compute with
    adapters: tuple[str, ...] = ()  # digests loaded
    alive: bool = True


class TokenStream(Protocol):
    """The events of one request. Leaving early must be said: `async with contextlib.aclosing(stream)`."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """The stream itself."""

    async def __anext__(self) -> TokenEvent:
        """The next event; after the one that has a finish_reason, StopAsyncIteration."""

    async def aclose(self) -> None:
        """Cancel the request if it still runs. A cancelled consumer task does this by itself."""


class Engine(Protocol):
    """What the replica needs of an engine. Everything but start, stop and compile is for an asyncio loop."""

    def start(self) -> None:
        """Load the base model and begin to serve; blocks until ready. Raises ModelError."""

    def stop(self) -> None:
        """End every stream with an error event and free the model. Blocks; a second call does nothing."""

    def compile(self, grammar: Grammar) -> None:
        """Make a grammar ready, so that `submit` finds it so. Takes up to a second: call it in a thread of its own.
        Raises InvalidRequest, which names `grammar.param`, when it cannot be understood, or nothing belongs to it."""

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request. Raises at once, before any token: RequestError when it can never fit, UnknownModel when
        the adapter is not loaded, Overloaded when too many wait. The adapter stays in use until the stream ends."""

    def cancel(self, request_id: str) -> None:
        """Stop a request; its memory is free by the next step. An id that already ended is no error."""

    async def load_adapter(self, digest: str, folder: Path, make_room: MakeRoom | None = None) -> None:
        """Make an adapter servable. Reading and checking happen beside the running steps; taking it into use happens
        between two. In between, an engine whose memory for adapters grows with them awaits `make_room`; what that
        raises ends the load. Already loaded is no error. Raises AdapterRefused, and Overloaded when all is taken.
        """

    async def unload_adapter(self, digest: str) -> None:
        """Forget an adapter: new requests for it are refused at once, running ones end first, then it is freed and
        this returns. Not loaded is no error."""

    def stats(self) -> EngineStats:
        """Counters and state, from any thread."""
