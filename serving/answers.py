"""What goes back over HTTP, in OpenAI's exact shapes: whole answers, and chunks of a stream. Pure functions.

An `Answer` knows its request and turns engine events into JSON objects; the ingress only sends them.
Usage counts a prompt's tokens once whatever n is, and every generated token, as OpenAI does.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cluster.errors import InvalidRequest, LuthierError
from serving.calls import ChoiceEvent
from serving.engine.protocol import GRAMMAR_FAILED, TokenEvent, TokenLogprob

Json = dict[str, Any]


@dataclass
class Usage:
    """Tokens of one request so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self) -> Json:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class Answer(ABC):
    """One request's answer under way. `model` is what the client asked for, word by word."""

    id: str
    created: int
    model: str
    wants_logprobs: bool
    includes_usage: bool = False
    usage: Usage = field(default_factory=Usage)

    object: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def opening(self, index: int) -> Iterator[Json]:
        """What comes before a choice's first token."""

    @abstractmethod
    def _piece(self, index: int, events: list[TokenEvent]) -> Json:
        """A choice of a chunk: what `events` add."""

    @abstractmethod
    def _ending(self, index: int, reason: str) -> Json:
        """The last chunk's choice."""

    @abstractmethod
    def _choice(self, index: int, events: list[TokenEvent], reason: str) -> Json:
        """A whole choice."""

    def chunks(self, events: Iterable[ChoiceEvent]) -> Iterator[Json]:
        """The chunks for events that arrived together: one a choice, and one more for each that ended.

        Raises LuthierError when the engine could not go on.
        """
        for index, group in _by_choice(events).items():
            self._count(group)
            if any(event.text or event.logprob for event in group):
                yield self._chunk([self._piece(index, group)])
            reason = _reason(group)
            if reason:
                yield self._chunk([self._ending(index, reason)])

    def closing(self) -> Iterator[Json]:
        """After the last choice: the usage, if asked for."""
        if self.includes_usage:
            yield {**self._head(self.chunk_object), "choices": [], "usage": self.usage.to_json()}

    def whole(self, events: Iterable[ChoiceEvent]) -> Json:
        """The answer in one piece. Raises LuthierError when the engine could not finish it."""
        choices = []
        for index, group in sorted(_by_choice(events).items()):
            self._count(group)
            choices.append(self._choice(index, group, _reason(group) or "stop"))
        return {**self._head(self.object), "choices": choices, "usage": self.usage.to_json()}

    def _count(self, events: list[TokenEvent]) -> None:
        self.usage.completion_tokens += sum(event.token_id is not None for event in events)

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head(self.chunk_object), "choices": choices}
        return {**chunk, "usage": None} if self.includes_usage else chunk


@dataclass
class ChatAnswer(Answer):
    """/v1/chat/completions."""

    object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def opening(self, index: int) -> Iterator[Json]:
        yield self._chunk([_delta(index, {"role": "assistant", "content": "", "refusal": None})])

    def _piece(self, index: int, events: list[TokenEvent]) -> Json:
        choice = _delta(index, {"content": _text(events)})
        return {**choice, "logprobs": self._logprobs(events)}

    def _ending(self, index: int, reason: str) -> Json:
        return {**_delta(index, {}), "finish_reason": reason}

    def _choice(self, index: int, events: list[TokenEvent], reason: str) -> Json:
        message = {"role": "assistant", "content": _text(events), "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(events), "finish_reason": reason}

    def _logprobs(self, events: list[TokenEvent]) -> Json | None:
        if not self.wants_logprobs:
            return None
        content = [
            {**_candidate(event.logprob), "top_logprobs": [_candidate(each) for each in event.top_logprobs]}
            for event in events
            if event.logprob
        ]
        return {"content": content, "refusal": None}


@dataclass
class CompletionAnswer(Answer):
    """/v1/completions. OpenAI gives chunks the same object name as whole answers."""

    object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"
    _offset: dict[int, int] = field(default_factory=dict)  # of each choice: characters of the tokens so far

    def opening(self, index: int) -> Iterator[Json]:
        self._offset[index] = 0
        return iter(())

    def _piece(self, index: int, events: list[TokenEvent]) -> Json:
        return self._choice(index, events, None)

    def _ending(self, index: int, reason: str) -> Json:
        return self._choice(index, [], reason)

    def _choice(self, index: int, events: list[TokenEvent], reason: str | None) -> Json:
        logprobs = self._logprobs(index, events) if events else None
        return {"index": index, "text": _text(events), "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, events: list[TokenEvent]) -> Json | None:
        """Parallel lists, one entry a token; `text_offset` counts characters of the choice's text so far."""
        if not self.wants_logprobs:
            return None
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for event in events:
            if event.logprob:
                offset = self._offset.get(index, 0)
                found["tokens"].append(event.logprob.token)
                found["token_logprobs"].append(event.logprob.logprob)
                found["top_logprobs"].append({each.token: each.logprob for each in event.top_logprobs})
                found["text_offset"].append(offset)
                self._offset[index] = offset + len(event.logprob.token)
        return found


def _by_choice(events: Iterable[ChoiceEvent]) -> dict[int, list[TokenEvent]]:
    groups: dict[int, list[TokenEvent]] = {}
    for each in events:
        groups.setdefault(each.index, []).append(each.event)
    return groups


def _text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def _reason(events: list[TokenEvent]) -> str | None:
    """OpenAI knows `stop` and `length`; everything else is an answer that did not come to its end."""
    last = events[-1]
    if last.error is not None and last.error.startswith(GRAMMAR_FAILED):
        raise InvalidRequest(f"{last.error}; ask for a smaller one")
    if last.finish_reason in ("error", "cancelled"):
        raise LuthierError(f"the answer ended early: {last.error or last.finish_reason}")
    return last.finish_reason


def _delta(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _candidate(candidate: TokenLogprob) -> Json:
    # A token may be a part of a character: its text is then U+FFFD, and its bytes are not known here.
    whole = "\ufffd" not in candidate.token
    return {
        "token": candidate.token,
        "logprob": candidate.logprob,
        "bytes": list(candidate.token.encode()) if whole else None,
    }
