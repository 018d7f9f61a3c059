"""What the ingress asks of a replica, and what comes back. Plain data that survives a Ray hop."""

from dataclasses import dataclass
from typing import Any

from cluster.records import AdapterRecord, BaseModelRef
from serving.engine.protocol import Quantization, SamplingParams, TokenEvent

Message = dict[str, Any]
Prompt = str | tuple[int, ...] | tuple[Message, ...]
"""Text as it stands, token ids, or a chat for the model's template."""


@dataclass(frozen=True)
class Call:
    """One HTTP request: `n` answers to each prompt, all from the same weights.

    Choice `p * n + i` is the i-th answer to prompt p, as OpenAI numbers them. `max_tokens` None means: up to
    the end of the context; `params.max_tokens` is then without meaning. `adapter` None is the base model.
    With `stream` False everything arrives at the end, in few pieces, which spares one message per token.
    """

    id: str
    base: BaseModelRef  # what the ingress serves; a replica of another, in the middle of an update, refuses
    quantization: Quantization | None  # the same of this
    prompts: tuple[Prompt, ...]
    adapter: AdapterRecord | None
    n: int
    params: SamplingParams
    max_tokens: int | None
    stream: bool


@dataclass(frozen=True)
class Accepted:
    """First of the answer: every choice is in the engine, so the HTTP status can be sent."""

    prompt_tokens: int


@dataclass(frozen=True)
class ChoiceEvent:
    """One engine event of one choice."""

    index: int
    event: TokenEvent


@dataclass(frozen=True)
class ReplicaStatus:
    """What a replica says about itself to `luthier serving status` and to tests."""

    replica: str
    alive: bool
    quantization: Quantization | None  # of the base
    adapters: tuple[str, ...]  # name@version of what is loaded, in the order of loading
    requests: int
    steps: int
    mixed_steps: int
    max_adapters_in_step: int
    adapter_loads: int
    prompt_tokens: int  # computed
    shared_tokens: int  # found in the prefix cache
    generated_tokens: int
    cancelled: int
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    weight_bytes: int  # these three of the engine's own tensors; 0 where another process has them
    kv_bytes: int
    adapter_bytes: int
    adapter_bytes_budget: int | None

    @property
    def memory(self) -> str:
        """For people."""
        if not self.kv_bytes:
            return "in the engine's own process"
        budget = "" if self.adapter_bytes_budget is None else f" of {mib(self.adapter_bytes_budget)}"
        return (
            f"weights {mib(self.weight_bytes)}, keys and values {mib(self.kv_bytes)}, "
            f"adapters {mib(self.adapter_bytes)}{budget}"
        )


def mib(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 2**20:,.1f} MiB"
