"""vLLM's HTTP API in our terms: a request's body for /v1/completions, and the tokens of each chunk that comes back.

Pure functions. Token ids go in and come back (`return_token_ids`), candidates are named by id
(`return_tokens_as_token_ids`), and the text is made on our side: then the tokens that end an answer, stop strings and
whole characters are the same with every engine. So vLLM is told nothing of stop strings, its own idea of ending tokens
is off (`ignore_eos`), and every sampling parameter is said, whatever its defaults or the model's are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serving.engine.protocol import GenerationRequest

BASE_NAME = "base"
"""The name of the bare model there. Adapters are served under their digests."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A token and its natural-log probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Token:
    """A generated token. `logprob` and `top` (best first) only when they were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What one server-sent event tells. A `finish_reason` (stop, length, or one of vLLM's own) comes with the last."""

    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    error: str | None = None


def completion_body(
    request: GenerationRequest, eos_ids: Iterable[int], base: str = BASE_NAME, structured_outputs: Json | None = None
) -> Json:
    """What to POST for a request; `eos_ids` end the answer, `base` is asked when no adapter is. `structured_outputs` is
    the request's grammar as vLLM takes it (vllm_grammar.py), whose end no `ignore_eos` overrules."""
    params = request.params
    return {
        "model": request.adapter or base,
        "prompt": request.prompt_ids,
        "stream": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": 0.0,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "logit_bias": {str(token): bias for token, bias in params.logit_bias} or None,
        "min_tokens": params.min_tokens,
        "seed": None if params.seed is None else params.seed % 2**63,
        "logprobs": params.logprobs,
        "ignore_eos": True,
        "stop_token_ids": [] if params.ignore_eos and structured_outputs is None else sorted(eos_ids),
        "structured_outputs": structured_outputs,
    }


def read_chunk(chunk: Json, num_top: int | None) -> Chunk:
    """The tokens of a chunk, with `num_top` alternatives each."""
    if "error" in chunk:
        return Chunk(error=error_message(chunk))
    tokens: list[Token] = []
    reason = None
    for choice in chunk["choices"]:
        reason = choice.get("finish_reason") or reason
        ids = choice.get("token_ids") or []
        if num_top is None:
            tokens += [Token(each) for each in ids]
        else:
            told = choice["logprobs"]
            rows = zip(ids, told["token_logprobs"], told["top_logprobs"], strict=True)
            tokens += [Token(id_, logprob, _best(top, num_top)) for id_, logprob, top in rows]
    return Chunk(tuple(tokens), reason)


def error_message(body: Json) -> str:
    """vLLM's own words from the body of an error."""
    error = body.get("error", body)
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _best(top: dict[str, float], count: int) -> tuple[Candidate, ...]:
    """vLLM lists the chosen token beside the best ones, whether it is one of them or not."""
    candidates = [Candidate(int(name.removeprefix("token_id:")), logprob) for name, logprob in top.items()]
    return tuple(sorted(candidates, key=lambda each: -each.logprob)[:count])
