"""From vLLM's tokens to our events: an answer's text, its end and its candidates are made here, as the native engine's.

The tokens that end an answer, stop strings, whole characters, the ends of grammars and the texts of candidates thereby
follow one rule.
"""

from serving.engine.grammar import Matcher
from serving.engine.protocol import FinishReason, GenerationRequest, TokenEvent
from serving.engine.text import TextStream
from serving.engine.vllm_api import Candidate, Chunk, Token
from serving.engine.vllm_facts import ModelFacts


class Answer:
    """The answer to one request under way."""

    def __init__(self, request: GenerationRequest, facts: ModelFacts, matcher: Matcher | None = None) -> None:
        """`matcher` is the answer's place in its grammar, at the beginning, when it has one."""
        self._facts = facts
        self._matcher = matcher
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
        if self._matcher is not None:
            self._matcher.advance(token.token_id)
            if self._matcher.error is not None:
                return self.end("error", f"the answer left its grammar: {self._matcher.error}")
        if token.token_id in self._facts.eos_ids and not self._params.ignore_eos:
            text, reason = self._text.flush(), "stop"
        else:
            text = self._text.push(token.token_id, may_stop=self._num_tokens > self._params.min_tokens)
            if self._text.is_stopped:
                reason = "stop"
            elif self._matcher is not None and self._matcher.is_complete:
                text, reason = text + self._text.flush(), "stop"
            elif told == "length":
                text, reason = text + self._text.flush(), "length"
        if token.logprob is None:
            return TokenEvent(token.token_id, text, finish_reason=reason)
        chosen = self._facts.named(Candidate(token.token_id, token.logprob))
        top = tuple(self._facts.named(each) for each in token.top)
        return TokenEvent(token.token_id, text, chosen, top, reason)
