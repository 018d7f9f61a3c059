"""From logits to a token: pure functions of one row, so that a request's choice never depends on its neighbours.

    logits ▸ bias ▸ repetition ▸ presence, frequency ▸ no end yet ▸ grammar ▸ temperature ▸ top_k ▸ top_p ▸ draw

The order is transformers' (and vLLM's). What stands before the temperature is done by the row's Shaping, and a row
that asks for none of it has none. A draw takes one uniform number from the request's own generator and inverts the
cumulated distribution, so a seed gives the same tokens alone and in any batch. Log probabilities are reported of the
raw logits, as OpenAI and vLLM do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serving.engine.grammar import Matcher
from serving.engine.protocol import SamplingParams


@dataclass(frozen=True)
class Candidate:
    """A token and its natural-log probability under the raw model distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Choice:
    """The token chosen from a row; its own and the best candidates' log probabilities when asked for, best first."""

    token_id: int
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()


def new_generator(seed: int | None) -> torch.Generator:
    """A generator for one request; without a seed, from the system's entropy. On the CPU whatever the device."""
    generator = torch.Generator(device="cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator


class Shaping:
    """What a request's wishes and its own tokens make of its logits, step by step."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_ids: frozenset[int],
        matcher: Matcher | None = None,
    ) -> None:
        """`matcher` is the answer's place in its grammar, at the beginning, when it has one."""
        self._params = params
        self._prompt_ids = prompt_ids
        self._eos_ids = sorted(eos_ids)
        self._matcher = matcher
        self._num_generated = 0
        # Made for the first token, so that a request that waits holds nothing.
        self._bias: torch.Tensor | None = None  # [vocabulary]
        self._seen: torch.Tensor | None = None  # the tokens of prompt and answer, int64 [tokens]
        self._counts: torch.Tensor | None = None  # how often each is in the answer, [vocabulary]

    @staticmethod
    def is_wanted(params: SamplingParams) -> bool:
        """Whether these parameters change anything before the temperature."""
        return bool(
            params.logit_bias
            or params.repetition_penalty != 1
            or params.presence_penalty
            or params.frequency_penalty
            or params.min_tokens
            or params.grammar
        )

    @property
    def is_complete(self) -> bool:
        """Whether a grammar allows nothing more."""
        return self._matcher is not None and self._matcher.is_complete

    @property
    def error(self) -> str | None:
        """Why the grammar leaves no token."""
        return None if self._matcher is None else self._matcher.error

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [vocabulary] to sample the next token from; those given stay as they are."""
        params, shaped = self._params, logits
        if self._num_generated == 0:
            self._begin(logits)
        if self._bias is not None:
            shaped = shaped + self._bias
        if self._seen is not None:
            penalty, seen = params.repetition_penalty, shaped[self._seen]
            shaped = shaped.scatter(-1, self._seen, torch.where(seen < 0, seen * penalty, seen / penalty))
        if self._counts is not None:
            shaped = shaped - params.frequency_penalty * self._counts - params.presence_penalty * (self._counts > 0)
        if self._num_generated < params.min_tokens:
            shaped = shaped.index_fill(-1, torch.tensor(self._eos_ids, device=shaped.device), -torch.inf)
        if self._matcher is not None:
            shaped = shaped.masked_fill(~self._matcher.allowed().to(shaped.device), -torch.inf)
        return shaped

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen."""
        self._num_generated += 1
        if self._seen is not None:
            self._seen = torch.cat([self._seen, self._seen.new_tensor([token_id])])
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._matcher is not None:
            self._matcher.advance(token_id)

    def _begin(self, logits: torch.Tensor) -> None:
        params = self._params
        if params.logit_bias:
            self._bias = torch.zeros_like(logits)
            token_ids, biases = zip(*params.logit_bias, strict=True)
            self._bias[torch.tensor(token_ids, device=logits.device)] = logits.new_tensor(biases)
        if params.repetition_penalty != 1:
            self._seen = torch.tensor(self._prompt_ids, device=logits.device)
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros_like(logits)


def choose(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator],
    shapings: Sequence[Shaping | None],
) -> list[Choice | None]:
    """One choice a row of `logits` [rows, vocabulary]; None for a row with a NaN or infinite maximum, before or after
    its shaping.

    A row's generator moves on by exactly one draw when the row samples, and not at all when it is greedy.
    """
    best, greedy = (each.tolist() for each in logits.max(-1))
    choices: list[Choice | None] = []
    for row, (wanted, generator, shaping) in enumerate(zip(params, generators, shapings, strict=True)):
        if not abs(best[row]) < torch.inf:  # also False for NaN
            choices.append(None)
            continue
        token_id = int(greedy[row])
        if shaping is None:
            if wanted.temperature > 0:
                token_id = draw(logits[row], wanted, generator)
        else:
            shaped = shaping.apply(logits[row])
            top = shaped.max(-1)
            if not abs(float(top.values)) < torch.inf:
                choices.append(None)
                continue
            token_id = int(top.indices) if wanted.temperature == 0 else draw(shaped, wanted, generator)
        choices.append(
            Choice(token_id) if wanted.logprobs is None else _with_logprobs(logits[row], token_id, wanted.logprobs)
        )
    return choices


def draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Sample one token id from `logits` [vocabulary] at a temperature above 0."""
    kept, token_ids = filtered(logits, params)
    cumulated = kept.softmax(-1, dtype=torch.float64).cumsum(-1)
    uniform = torch.rand((), generator=generator, dtype=torch.float64).to(cumulated.device)
    index = torch.searchsorted(cumulated, uniform * cumulated[-1], right=True)
    return int(token_ids[index.clamp(max=len(token_ids) - 1)])


def filtered(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """What temperature, top_k and top_p leave of a row: scaled logits and their token ids; best first, if any is on.

    top_p keeps the smallest set of best tokens whose probabilities sum to at least top_p; one token always stays.
    """
    # The maximum comes off first: at a temperature near 0 the scaled logits would overflow.
    scaled = (logits.float() - logits.max().float()) / max(params.temperature, 1e-6)
    if not params.top_k and params.top_p == 1:
        return scaled, torch.arange(len(scaled), device=scaled.device)  # sorting would take most of a draw's time
    count = min(params.top_k or len(scaled), len(scaled))
    kept, token_ids = scaled.topk(count) if count < len(scaled) else scaled.sort(descending=True, stable=True)
    if params.top_p < 1:
        probability = kept.softmax(-1, dtype=torch.float64)
        mass_before = probability.cumsum(-1) - probability
        last = max(1, int((mass_before < params.top_p).sum()))
        kept, token_ids = kept[:last], token_ids[:last]
    return kept, token_ids


def _with_logprobs(logits: torch.Tensor, token_id: int, count: int) -> Choice:
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    top = logprobs.topk(min(count, len(logprobs)))
    candidates = tuple(map(Candidate, top.indices.tolist(), top.values.tolist()))
    return Choice(token_id, float(logprobs[token_id]), candidates)
