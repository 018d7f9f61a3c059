"""What an engine is: prompt token ids in, a stream of tokens out, adapters by digest.

An engine knows nothing of Ray, HTTP, tenants or the store. It is given a folder with a base model and, while it
runs, folders with peft adapters; whoever stands above it fetches, names and counts them. Importing this imports no
torch, so the HTTP side can build requests with it.
"""

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from cluster.errors import RequestError

MAX_LOGPROBS = 20

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Raises RequestError, naming the value and its range, when built with a bad one.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. `stop` strings end the text and are not part of it.
    `seed` makes the draws repeatable whatever else is in the batch (taken modulo 2**63); None draws a fresh one.
    `logprobs` is the number of alternatives to report beside the chosen token's own; None reports nothing.
    OpenAI's `n` is not here: each choice is a request of its own.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

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
        )
        for name, value, is_good, wanted in checks:
            if not is_good:
                raise RequestError(f"{name} is {value!r}; it must be {wanted}")


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate. `adapter` is the digest of a loaded adapter; None is the bare base model."""

    id: str
    prompt_ids: list[int]
    adapter: str | None
    params: SamplingParams


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
    """Counters since the start (requests … max_adapters_in_step) and the state right now (the rest)."""

    requests: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # computed
    shared_tokens: int = 0  # of prompts, found in the prefix cache
    generated_tokens: int = 0
    mixed_steps: int = 0  # forward passes that held two or more distinct adapters
    max_adapters_in_step: int = 0
    running: int = 0
    waiting: int = 0
    queued_prompt_tokens: int = 0  # to be computed; of those that wait, less what the prefix cache should have
    waiting_answer_tokens: int = 0  # at most to come, by max_tokens
    running_answer_tokens: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
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
    """What the replica needs of an engine. Everything but start and stop is for use inside an asyncio loop."""

    def start(self) -> None:
        """Load the base model and begin to serve; blocks until ready. Raises ModelError."""

    def stop(self) -> None:
        """End every stream with an error event and free the model. Blocks; a second call does nothing."""

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request. Raises at once, before any token: RequestError when it can never fit, UnknownModel when
        the adapter is not loaded, Overloaded when too many wait. The adapter stays in use until the stream ends."""

    def cancel(self, request_id: str) -> None:
        """Stop a request; its memory is free by the next step. An id that already ended is no error."""

    async def load_adapter(self, digest: str, folder: Path) -> None:
        """Make an adapter servable. Reading and checking happen beside the running steps; taking it into use happens
        between two. Already loaded is no error. Raises AdapterRefused, and Overloaded when all slots are taken."""

    async def unload_adapter(self, digest: str) -> None:
        """Forget an adapter: new requests for it are refused at once, running ones end first, then it is freed and
        this returns. Not loaded is no error."""

    def stats(self) -> EngineStats:
        """Counters and state, from any thread."""
