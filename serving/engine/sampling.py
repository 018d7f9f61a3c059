"""From logits to a token: pure functions of one row, so that a request's choice never depends on its neighbours.

The order is transformers': temperature, then top_k, then top_p. A draw takes one uniform number from the request's own
generator and inverts the cumulated distribution, so a seed gives the same tokens alone and in any batch.
"""

from dataclasses import dataclass

import torch

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


def choose(
    logits: torch.Tensor, params: list[SamplingParams], generators: list[torch.Generator]
) -> list[Choice | None]:
    """One choice a row of `logits` [rows, vocabulary]; None for a row with a NaN or infinite maximum.

    A row's generator moves on by exactly one draw when the row samples, and not at all when it is greedy.
    """
    best, greedy = (each.tolist() for each in logits.max(-1))
    choices: list[Choice | None] = []
    for row, (wanted, generator) in enumerate(zip(params, generators, strict=True)):
        if not abs(best[row]) < torch.inf:  # also False for NaN
            choices.append(None)
            continue
        token_id = int(greedy[row]) if wanted.temperature == 0 else draw(logits[row], wanted, generator)
        choices.append(_with_logprobs(logits[row], token_id, wanted.logprobs))
    return choices


def draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Sample one token id from `logits` [vocabulary] at a temperature above 0."""
    kept, token_ids = filtered(logits, params)
    cumulated = kept.softmax(-1, dtype=torch.float64).cumsum(-1)
    uniform = torch.rand((), generator=generator, dtype=torch.float64).to(cumulated.device)
    index = torch.searchsorted(cumulated, uniform * cumulated[-1], right=True)
    return int(token_ids[index.clamp(max=len(token_ids) - 1)])


def filtered(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """What temperature, top_k and top_p leave of a row: scaled logits and their token ids, best first.

    top_p keeps the smallest set of best tokens whose probabilities sum to at least top_p; one token always stays.
    """
    # The maximum comes off first: at a temperature near 0 the scaled logits would overflow.
    scaled = (logits.float() - logits.max().float()) / max(params.temperature, 1e-6)
    count = min(params.top_k or len(scaled), len(scaled))
    kept, token_ids = scaled.topk(count) if count < len(scaled) else scaled.sort(descending=True, stable=True)
    if params.top_p < 1:
        probability = kept.softmax(-1, dtype=torch.float64)
        mass_before = probability.cumsum(-1) - probability
        last = max(1, int((mass_before < params.top_p).sum()))
        kept, token_ids = kept[:last], token_ids[:last]
    return kept, token_ids


def _with_logprobs(logits: torch.Tensor, token_id: int, count: int | None) -> Choice:
    if count is None:
        return Choice(token_id)
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    top = logprobs.topk(min(count, len(logprobs)))
    candidates = tuple(map(Candidate, top.indices.tolist(), top.values.tolist()))
    return Choice(token_id, float(logprobs[token_id]), candidates)
