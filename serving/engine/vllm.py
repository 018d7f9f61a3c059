"""The second engine: vLLM in a process and an environment of its own, behind the same protocol as the native one.

A thread holds an asyncio loop that keeps vLLM running (vllm_life.py) and carries requests to it over HTTP:

    request ▸ checked (vllm_facts.py) ▸ vLLM's form of it (vllm_api.py) ▸ its tokens ▸ our events (vllm_answer.py)

When vLLM ends, running streams end with an error; while it restarts, `submit` raises Overloaded; then the adapters come
back under their names (vllm_adapters.py). Once it is given up, `stats().alive` is False.
"""

import asyncio
import contextlib
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from cluster.errors import ModelError, NotServing, Overloaded, RequestError, UnknownModel
from serving.engine.protocol import EngineStats, GenerationRequest, Grammar, MakeRoom, TokenEvent
from serving.engine.streams import EventStream, settle
from serving.engine.vllm_adapters import VllmAdapters
from serving.engine.vllm_answer import Answer
from serving.engine.vllm_api import completion_body
from serving.engine.vllm_command import VllmOptions
from serving.engine.vllm_facts import ModelFacts, read_facts
from serving.engine.vllm_grammar import VllmGrammars, ask, structured_outputs
from serving.engine.vllm_life import VllmLife
from serving.engine.vllm_server import VllmServer

_RETRY_AFTER_S = 10

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Live:
    """A request on its way."""

    request: GenerationRequest
    stream: EventStream
    answer: Answer
    task: "asyncio.Task[None] | None" = None
    has_tokens: bool = False
    is_over: bool = False


class VllmEngine:
    """An Engine (protocol.py) on vLLM."""

    def __init__(self, folder: Path, options: VllmOptions) -> None:
        self._folder = folder
        self._options = options
        self._adapters = VllmAdapters(folder, options, self._current_server)
        self._facts: ModelFacts
        self._grammars: VllmGrammars
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the next three; only new requests change them outside the engine's thread
        self._why_not: str | None = "it was not started"  # None while it serves
        self._stats = EngineStats(alive=False)
        self._live: dict[str, _Live] = {}
        # In the engine's thread only:
        self._loop: asyncio.AbstractEventLoop
        self._life: VllmLife
        self._living: asyncio.Task[str]
        self._ended: asyncio.Event  # set, and replaced, whenever a request ends
        self._commands: set[asyncio.Task[None]]

    def start(self) -> None:
        """Start vLLM and wait until it is warm. Raises ModelError with its last words. An engine starts once."""
        assert self._thread is None, "an engine starts once; make another"
        self._facts = read_facts(self._folder, self._options.max_context)
        self._grammars = VllmGrammars(self._facts, self._ask)
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), name="luthier-vllm", daemon=True)
        self._thread.start()
        ready.result()

    def stop(self) -> None:
        """End every stream with an error event, and vLLM with all its processes."""
        with self._lock:
            if self._stats.alive:
                self._loop.call_soon_threadsafe(self._living.cancel)
        if self._thread is not None:
            self._thread.join()

    def compile(self, grammar: Grammar) -> None:
        """See Engine.compile: vLLM is asked as well, so this raises Overloaded while it does not serve."""
        self._grammars.compile(grammar)

    def submit(self, request: GenerationRequest) -> EventStream:
        """Send a request and return its stream; see Engine.submit for the errors."""
        grammar = request.params.grammar
        matcher = None if grammar is None else self._grammars.matcher(grammar)
        stream = EventStream(request.id, asyncio.get_running_loop(), self.cancel)
        with self._lock:
            self._check_serves()
            self._check(request)
            live = self._live[request.id] = _Live(request, stream, Answer(request, self._facts, matcher))
            self._stats = replace(self._stats, requests=self._stats.requests + 1)
            self._loop.call_soon_threadsafe(self._begin, live)
        return stream

    def cancel(self, request_id: str) -> None:
        """Stop a request."""
        with self._lock:
            if request_id in self._live:  # and so the loop runs
                self._loop.call_soon_threadsafe(self._cancel, self._live[request_id])

    async def load_adapter(self, digest: str, folder: Path, make_room: MakeRoom | None = None) -> None:  # noqa: ARG002
        """Have vLLM serve an adapter under its digest; the first one after a start warms that path up, too. Its memory
        for adapters is set aside at the start."""
        with self._lock:
            self._check_serves()
        await asyncio.wrap_future(self._in_loop(lambda: self._adapters.load(digest, folder)))

    async def unload_adapter(self, digest: str) -> None:
        """Refuse new requests, wait for the running ones, forget the name."""
        await asyncio.wrap_future(self._in_loop(lambda: self._unload(digest)))

    def stats(self) -> EngineStats:
        """Our own counts; steps and blocks are vLLM's affair. What is beyond `max_running` waits."""
        with self._lock:
            live = list(self._live.values())
            running, waiting = live[: self._options.max_running], live[self._options.max_running :]
            return replace(
                self._stats,
                running=len(running),
                waiting=len(waiting),
                queued_prompt_tokens=sum(len(each.request.prompt_ids) for each in live if not each.has_tokens),
                waiting_answer_tokens=sum(each.request.params.max_tokens for each in waiting),
                running_answer_tokens=sum(each.request.params.max_tokens for each in running),
                adapters=self._adapters.loaded,
            )

    def _check_serves(self) -> None:
        if self._why_not is not None:
            raise NotServing(f"the engine does not serve: {self._why_not}", _RETRY_AFTER_S)

    def _check(self, request: GenerationRequest) -> None:
        if request.id in self._live:
            raise RequestError(f"request id {request.id} is in use; every running request needs its own")
        self._facts.check(request)
        if request.adapter is not None and not self._adapters.has(request.adapter):
            raise UnknownModel(f"adapter {request.adapter} is not loaded in this engine; load it first")
        if len(self._live) >= self._options.max_running + self._options.max_waiting:
            raise Overloaded(f"{self._options.max_waiting} requests wait already (max_waiting); try again later")

    def _ask(self, grammar: Grammar) -> None:
        async def command() -> None:
            with self._lock:
                self._check_serves()
            await ask(self._life.server, self._adapters.base, self._facts, grammar)

        self._in_loop(command).result()

    def _in_loop(self, command: Callable[[], Coroutine[Any, Any, None]]) -> "Future[None]":
        """Run a command in the engine's loop, to its end even when the caller goes away meanwhile."""
        done: Future[None] = Future()
        with self._lock:
            if not self._stats.alive:
                self._check_serves()
            self._loop.call_soon_threadsafe(self._begin_command, command, done)
        return done

    # What follows runs in the engine's thread. First, requests.

    def _begin(self, live: _Live) -> None:
        if not live.is_over:
            live.task = asyncio.create_task(self._generate(live))

    def _cancel(self, live: _Live) -> None:
        self._emit(live, [live.answer.end("cancelled")])
        if live.task is not None:
            live.task.cancel()

    def _fail(self, live: _Live, error: str) -> None:
        self._emit(live, [live.answer.end("error", error)])

    async def _generate(self, live: _Live) -> None:
        """Carry a request to vLLM, and its tokens back."""
        grammar = live.request.params.grammar
        form = None if grammar is None else structured_outputs(grammar)
        body = completion_body(live.request, self._facts.eos_ids, self._adapters.base, form)
        try:
            async with contextlib.aclosing(self._life.server.complete(body)) as chunks:
                async for chunk in chunks:
                    if chunk.error is not None:
                        self._fail(live, f"vLLM refuses the request: {chunk.error}")
                    else:
                        self._emit(live, live.answer.take(chunk))
                    if live.is_over:
                        return
            self._fail(live, "vLLM broke the answer off")
        except aiohttp.ClientError as error:
            self._fail(live, f"vLLM went away during the answer ({type(error).__name__})")
        except Exception as error:  # whatever else, the stream must end
            _log.exception("request %s broke", live.request.id)
            self._fail(live, f"the engine could not go on with this answer: {type(error).__name__}: {error}")

    def _emit(self, live: _Live, events: list[TokenEvent]) -> None:
        """Hand events to the consumer's loop. With the last one the request is over, and its id is free again."""
        if live.is_over or not events:
            return
        tokens = sum(event.token_id is not None for event in events)
        prompt = 0 if live.has_tokens or not tokens else len(live.request.prompt_ids)
        live.has_tokens = live.has_tokens or tokens > 0
        live.is_over = events[-1].finish_reason is not None
        with self._lock:
            if live.is_over:
                del self._live[live.request.id]
            self._stats = replace(
                self._stats,
                generated_tokens=self._stats.generated_tokens + tokens,
                prompt_tokens=self._stats.prompt_tokens + prompt,
            )
        if live.is_over:
            ended, self._ended = self._ended, asyncio.Event()
            ended.set()
        try:
            live.stream.loop.call_soon_threadsafe(live.stream.put, events)
        except RuntimeError:  # that loop is closed: nobody listens there any more
            self._loop.call_soon(self._cancel, live)

    # Commands.

    def _begin_command(self, command: Callable[[], Coroutine[Any, Any, None]], done: "Future[None]") -> None:
        task = asyncio.create_task(command())
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)
        task.add_done_callback(lambda ended: settle(done, ended.exception()))

    async def _unload(self, digest: str) -> None:
        with self._lock:
            if not self._adapters.retire(digest):
                return
        while any(live.request.adapter == digest for live in self._live.values()):
            await self._ended.wait()
        await self._adapters.unload(digest)

    def _current_server(self) -> VllmServer | None:
        """vLLM if it serves, None while it is being restarted. Raises Overloaded once it never will."""
        with self._lock:
            if not self._stats.alive:
                self._check_serves()
            return self._life.server if self._why_not is None else None

    # Beginning and end.

    async def _run(self, ready: "Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._ended, self._commands = asyncio.Event(), set()
        private = Path(tempfile.mkdtemp(prefix="luthier-vllm-"))  # for sockets and for our links to adapters
        self._life = VllmLife(
            lambda: VllmServer(self._folder, self._options, private), self._adapters.restore, self._set_why_not
        )
        with self._lock:
            self._why_not, self._stats = "it is starting", replace(self._stats, alive=True)
            self._living = asyncio.create_task(self._life.run(ready))
        (ended,) = (await asyncio.wait({self._living}))[0]
        error = None if ended.cancelled() else ended.exception()
        reason = "it was stopped" if ended.cancelled() else str(error or ended.result())
        if error is not None and not isinstance(error, ModelError):
            _log.error("the engine's loop broke", exc_info=error)
        await self._close(reason)
        await asyncio.to_thread(shutil.rmtree, private, ignore_errors=True)
        if not ready.done():
            ready.set_exception(error or ModelError(f"the engine did not start: {reason}"))

    def _set_why_not(self, reason: str | None) -> None:
        with self._lock:
            self._why_not = reason

    async def _close(self, reason: str) -> None:
        with self._lock:
            self._why_not, self._stats = reason, replace(self._stats, alive=False)
            unfinished = list(self._live.values())
        for live in unfinished:
            self._fail(live, f"the engine does not serve any more: {reason}")
            self._cancel(live)
        await self._life.server.stop()
        tasks = [live.task for live in unfinished if live.task is not None]
        await asyncio.gather(*tasks, *self._commands, return_exceptions=True)
