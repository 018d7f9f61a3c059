"""The engine without its thread: sequences in, one step at a time, events out.

    plan()             who runs next            owner's lock held, no tensors
    execute(chunks)    forward pass, sampling   no lock; the scheduler may take new requests meanwhile
    commit(choices)    events, finished, freed  owner's lock held

`native.py` calls the three from its thread; a test calls `step()` and sees every interleaving it wants, repeatably.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from cluster.errors import InvalidRequest, RequestError, UnknownModel
from serving.engine.adapter import Adapter, Target
from serving.engine.grammar import Grammars
from serving.engine.model import PackedModel
from serving.engine.protocol import (
    GRAMMAR_FAILED,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenEvent,
    TokenLogprob,
)
from serving.engine.sampling import Choice, Shaping, choose, new_generator
from serving.engine.scheduler import Chunk, Scheduler, Sequence
from serving.engine.text import TextStream

Event = tuple[str, TokenEvent]  # request id and what happened to it
Picks = list[Choice | None]  # one for each chunk that samples, in the chunks' order; None: no token can be chosen


@dataclass
class _Live:
    """What a sequence carries besides its place in the schedule."""

    sequence: Sequence
    generator: torch.Generator
    text: TextStream
    shaping: Shaping | None


class EngineCore:
    """All state of an engine. Not thread-safe; see the module's docstring for who may call what when."""

    def __init__(self, model: PackedModel, scheduler: Scheduler) -> None:
        self._model = model
        self._scheduler = scheduler
        self.grammars = Grammars(model.tokenizer, model.facts.vocabulary, model.facts.eos_ids)
        self._live: dict[str, _Live] = {}
        self._retiring: set[str] = set()
        self._loads: Counter[str] = Counter()  # of each digest
        self._stats = EngineStats()

    @property
    def target(self) -> Target:
        """What an adapter must fit."""
        return self._model.target

    def size_of(self, adapter: Adapter) -> int:
        """What it takes of the memory for adapters, in bytes; from any thread."""
        return self._model.table.size_of(adapter)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._live)

    @property
    def backlog(self) -> int:
        """Tokens that those who wait will have computed before the last of them has begun: all but the last's own."""
        return sum(each.max_cached for each in self._scheduler.waiting)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises RequestError, UnknownModel or Overloaded, and is then as if never called."""
        if request.id in self._live:
            raise RequestError(f"request id {request.id} is in use; every running request needs its own")
        vocabulary = self._model.facts.vocabulary
        stray = next((each for each in request.prompt_ids if not 0 <= each < vocabulary), None)
        if stray is not None:
            raise RequestError(f"prompt token {stray} is not in the model's vocabulary of {vocabulary}")
        if request.adapter is not None and not self._is_servable(request.adapter):
            raise UnknownModel(f"adapter {request.adapter} is not loaded in this engine; load it first")
        shaping = self._shaping(request) if Shaping.is_wanted(request.params) else None
        loaded = f"{request.adapter} {self._loads[request.adapter]}" if request.adapter is not None else ""
        sequence = Sequence(request, weights=loaded)
        self._scheduler.add(sequence)
        text = TextStream(self._model.decode, request.params.stop)
        self._live[request.id] = _Live(sequence, new_generator(request.params.seed), text, shaping)
        self._stats = replace(self._stats, requests=self._stats.requests + 1)

    def cancel(self, request_id: str) -> None:
        """End a request at the next plan. Unknown or ended ids are no error: the end may have crossed the call."""
        if request_id in self._live:
            self._live[request_id].sequence.is_cancelled = True

    def load(self, adapter: Adapter) -> bool:
        """Take an adapter into use between two steps. False while the same one is still being unloaded: try later."""
        if adapter.digest in self._retiring:
            return False
        if adapter.digest not in self._model.table.adapters:
            self._model.table.load(adapter)
            self._loads[adapter.digest] += 1
            self._stats = replace(self._stats, adapter_loads=self._stats.adapter_loads + 1)
        return True

    def unload(self, digest: str) -> bool:
        """Refuse new requests for an adapter, and free it if none uses it. False while some do: try later."""
        if digest not in self._model.table.adapters:
            return True
        self._retiring.add(digest)
        if any(live.sequence.request.adapter == digest for live in self._live.values()):
            return False
        self._model.table.unload(digest)
        self._retiring.discard(digest)
        return True

    def step(self) -> list[Event]:
        """One whole step: plan, execute, commit."""
        chunks, events = self.plan()
        return events + self.commit(chunks, self.execute(chunks)) if chunks else events

    def plan(self) -> tuple[list[Chunk], list[Event]]:
        """Drop the cancelled, then choose the next step's chunks."""
        cancelled = [live.sequence for live in self._live.values() if live.sequence.is_cancelled]
        events = [self._end(sequence, "cancelled") for sequence in cancelled]
        return self._scheduler.plan(), events

    def execute(self, chunks: list[Chunk]) -> Picks:
        """The forward pass, and a choice for every chunk that samples."""
        logits = self._model.forward(chunks)
        sampling = [self._live[chunk.sequence.request.id] for chunk in chunks if chunk.samples]
        picks = choose(
            logits,
            [each.sequence.request.params for each in sampling],
            [each.generator for each in sampling],
            [each.shaping for each in sampling],
        )
        for live, choice in zip(sampling, picks, strict=True):
            if live.shaping is not None and choice is not None:
                live.shaping.advance(choice.token_id)
        return picks

    def commit(self, chunks: list[Chunk], picks: Picks) -> list[Event]:
        """Book a step's results: tokens, text, ends."""
        self._count(chunks)
        remaining = iter(picks)
        events = []
        for chunk in chunks:
            sequence = chunk.sequence
            choice = next(remaining) if chunk.samples else None
            if choice is not None or not chunk.samples:
                self._scheduler.advance(chunk)
            if chunk.samples:
                live = self._live[sequence.request.id]
                if choice is None:
                    events.append(self._end(sequence, "error", _why_no_token(live)))
                else:
                    events.append(self._token(live, choice))
        return events

    def fail(self, chunks: list[Chunk], error: Exception) -> list[Event]:
        """A step broke: end its requests with an error. The others, and the engine, go on."""
        reason = f"the engine could not compute this step: {type(error).__name__}: {error}"
        return [self._end(chunk.sequence, "error", reason) for chunk in chunks]

    def close(self, reason: str) -> list[Event]:
        """End every request with an error."""
        return [self._end(live.sequence, "error", reason) for live in list(self._live.values())]

    def stats(self) -> EngineStats:
        """Counters and state."""
        allocator, running, waiting = self._scheduler.allocator, self._scheduler.running, self._scheduler.waiting
        unread = sum(max(0, len(each.request.prompt_ids) - each.computed) for each in running)
        behind = sum(len(each.request.prompt_ids) for each in waiting)
        return replace(
            self._stats,
            running=len(running),
            waiting=len(waiting),
            queued_prompt_tokens=unread + round(self._new_share * behind),
            waiting_answer_tokens=sum(each.request.params.max_tokens for each in waiting),
            running_answer_tokens=sum(each.request.params.max_tokens - each.num_generated for each in running),
            kv_blocks_used=allocator.num_used,
            kv_blocks_total=allocator.num_blocks,
            weight_bytes=self._model.weight_bytes,
            kv_bytes=self._model.pool.num_bytes,
            adapter_bytes=self._model.table.num_bytes,
            adapters=tuple(self._model.table.adapters),
        )

    @property
    def _new_share(self) -> float:
        """Of the prompts so far, the part that the prefix cache did not have."""
        computed, shared = self._stats.prompt_tokens, self._stats.shared_tokens
        return computed / (computed + shared) if computed else 1.0

    def _is_servable(self, digest: str) -> bool:
        return digest in self._model.table.adapters and digest not in self._retiring

    def _shaping(self, request: GenerationRequest) -> Shaping:
        params, facts = request.params, self._model.facts
        stray = next((token for token, _ in params.logit_bias if not 0 <= token < facts.vocabulary), None)
        if stray is not None:
            raise InvalidRequest(
                f"logit_bias has token {stray}, which is not in the model's vocabulary of {facts.vocabulary}",
                "logit_bias",
            )
        matcher = self.grammars.matcher(params.grammar) if params.grammar is not None else None
        return Shaping(params, request.prompt_ids, facts.eos_ids, matcher)

    def _token(self, live: _Live, choice: Choice) -> Event:
        sequence, params = live.sequence, live.sequence.request.params
        sequence.tokens.append(choice.token_id)
        reason: FinishReason | None = None
        if choice.token_id in self._model.facts.eos_ids and not params.ignore_eos:
            text, reason = live.text.flush(), "stop"
        else:
            text = live.text.push(choice.token_id, may_stop=sequence.num_generated > params.min_tokens)
            if live.text.is_stopped:
                reason = "stop"
            elif live.shaping is not None and live.shaping.is_complete:
                text, reason = text + live.text.flush(), "stop"
            elif sequence.num_generated >= params.max_tokens:
                text, reason = text + live.text.flush(), "length"
        if reason is not None:
            self._release(sequence)
        logprob = None
        if choice.logprob is not None:
            logprob = self._logprob(choice.token_id, choice.logprob)
        top = tuple(self._logprob(each.token_id, each.logprob) for each in choice.top)
        return sequence.request.id, TokenEvent(choice.token_id, text, logprob, top, reason)

    def _logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token_id, self._model.token_text(token_id), logprob)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> Event:
        """End without a token; what text was held back is given out first."""
        text = self._live[sequence.request.id].text.flush()
        self._release(sequence)
        return sequence.request.id, TokenEvent(None, text, finish_reason=reason, error=error)

    def _release(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        del self._live[sequence.request.id]

    def _count(self, chunks: list[Chunk]) -> None:
        adapters = {chunk.sequence.request.adapter for chunk in chunks} - {None}
        shared = sum(each.sequence.shared for each in chunks if each.start == each.sequence.shared)
        prompt = sum(max(0, min(chunk.end, len(chunk.sequence.request.prompt_ids)) - chunk.start) for chunk in chunks)
        self._stats = replace(
            self._stats,
            steps=self._stats.steps + 1,
            prompt_tokens=self._stats.prompt_tokens + prompt,
            shared_tokens=self._stats.shared_tokens + shared,
            generated_tokens=self._stats.generated_tokens + sum(chunk.samples for chunk in chunks),
            mixed_steps=self._stats.mixed_steps + (len(adapters) > 1),
            max_adapters_in_step=max(self._stats.max_adapters_in_step, len(adapters)),
        )


def _why_no_token(live: _Live) -> str:
    if live.shaping is not None and live.shaping.error is not None:
        return f"{GRAMMAR_FAILED}: {live.shaping.error}"
    return f"the model's logits are not finite with adapter {live.sequence.request.adapter or '(none)'}"
