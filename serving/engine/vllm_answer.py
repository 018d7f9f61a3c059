"""From vLLM's tokens to our events: an answer's text, its end and its candidates are made here, as the native engine's.

The tokens that end an answer, stop strings, whole characters and the texts of candidates thereby follow one rule.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from cluster.errors import ModelError
from serving.engine.protocol import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from serving.engine.text import TextStream
from serving.engine.vllm_api import Candidate, Chunk, Token


@dataclass(frozen=True)
class ModelFacts:
    """What must be known of a model to check requests and to make text."""

    tokenizer: Any
    vocabulary: int
    max_context: int  # the model's own
    eos_ids: frozenset[int]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._text(list(token_ids), skip_special_tokens=True)

    def named(self, candidate: Candidate) -> TokenLogprob:
        """A candidate with its text as it is, special or not."""
        text = self._text([candidate.token_id], skip_special_tokens=False)
        return TokenLogprob(candidate.token_id, text, candidate.logprob)

    def _text(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        text = self.tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class Answer:
    """The answer to one request under way."""

    def __init__(self, request: GenerationRequest, facts: ModelFacts) -> None:
        self._facts = facts
        self._params = request.params
        self._text = TextStream(facts.decode, request.params.stop)
        self._num_tokens = 0

    def take(self, chunk: Chunk) -> list[TokenEvent]:
        """The events of a chunk's tokens, up to the one that ends the answer; what came after it is dropped."""
        events: list[TokenEvent] = []
        for place, token in enumerate(chunk.tokens, start=1):
            is_last = place == len(chunk.tokens)
            events.append(self._event(token, chunk.finish_reason if is_last else None))
            if events[-1].finish_reason is not None:
                return events
        if chunk.finish_reason is not None:
            events.append(self.end("error", f"vLLM ended the answer: {chunk.finish_reason}"))
        return events

    def end(self, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """The last event of an answer that ends without a token; what text was held back is given out with it."""
        return TokenEvent(None, self._text.flush(), finish_reason=reason, error=error)

    def _event(self, token: Token, told: str | None) -> TokenEvent:
        """`told` is why vLLM ended with this token, if it did."""
        reason: FinishReason | None = None
        self._num_tokens += 1
        if token.token_id in self._facts.eos_ids and not self._params.ignore_eos:
            text, reason = self._text.flush(), "stop"
        else:
            text = self._text.push(token.token_id, may_stop=self._num_tokens > self._params.min_tokens)
            if self._text.is_stopped:
                reason = "stop"
            elif told == "length":
                text, reason = text + self._text.flush(), "length"
        if token.logprob is None:
            return TokenEvent(token.token_id, text, finish_reason=reason)
        chosen = self._facts.named(Candidate(token.token_id, token.logprob))
        top = tuple(self._facts.named(each) for each in token.top)
        return TokenEvent(token.token_id, text, chosen, top, reason)


def read_facts(folder: Path) -> ModelFacts:
    """What a model's folder says. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} cannot be read as a causal language model: {error}") from error
    try:
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:  # without the file, transformers takes what the model's config says
        eos = GenerationConfig.from_model_config(config).eos_token_id
    eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
    if tokenizer.eos_token_id is not None:
        eos_ids.add(tokenizer.eos_token_id)
    text = config.get_text_config()
    return ModelFacts(tokenizer, int(text.vocab_size), int(text.max_position_embeddings), frozenset(eos_ids))
