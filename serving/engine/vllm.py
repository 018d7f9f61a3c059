"""The second engine: vLLM in a process and an environment of its own, behind the same protocol as the native one.

A thread holds an asyncio loop that starts vLLM (vllm_server.py), watches it, and carries requests to it over HTTP:

    starting ─▶ serving ─▶ it ends, or stops answering ─▶ restarting ─▶ serving …
                                                              └─ too often ─▶ given up: stats().alive is False

When it ends, running streams end with an error; while it restarts, `submit` raises Overloaded; then the adapters come
back under their names. Each is served under its digest, so no name ever stands for other weights. vLLM reads an
adapter's files whenever it likes (it may drop one that was not used for long), so the engine keeps its own links.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from cluster.errors import AdapterRefused, InvalidRequest, ModelError, Overloaded, RequestError, UnknownModel
from serving.engine.protocol import EngineStats, GenerationRequest, Grammar, MakeRoom, SamplingParams, TokenEvent
from serving.engine.streams import EventStream, settle
from serving.engine.vllm_answer import Answer, ModelFacts, read_facts
from serving.engine.vllm_api import BASE_NAME, completion_body
from serving.engine.vllm_command import VllmOptions
from serving.engine.vllm_server import VllmServer
from serving.engine.vllm_zero import ZERO_NAME, write_zero_adapter

_MAX_RESTARTS = 5  # in a row; the wait before each is twice the one before
_FIRST_BACKOFF_S = 1.0
_STEADY_S = 600.0  # after this long of serving, the next end counts as the first
_RETRY_AFTER_S = 10

# The first sampled request, and the first with an adapter, compile for up to tens of seconds.
_WARM_UPS = (SamplingParams(max_tokens=2, temperature=0), SamplingParams(max_tokens=2, top_p=0.9, top_k=5, logprobs=1))

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
        self._base = BASE_NAME if options.num_gpus else ZERO_NAME  # what answers without an adapter (vllm_zero.py)
        self._facts: ModelFacts
        self._max_context: int
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the next five; only new requests change them outside the engine's thread
        self._why_not: str | None = "it was not started"  # None while it serves
        self._stats = EngineStats(alive=False)
        self._live: dict[str, _Live] = {}
        self._adapters: dict[str, Path] = {}  # by digest: our links
        self._retiring: set[str] = set()
        # In the engine's thread only:
        self._loop: asyncio.AbstractEventLoop
        self._life: asyncio.Task[str]
        self._server: VllmServer
        self._private: Path  # for sockets and for our links to adapters
        self._changing: asyncio.Lock  # what vLLM serves
        self._news: asyncio.Event  # set, and replaced, whenever a request ends or an adapter has gone
        self._commands: set[asyncio.Task[None]]
        self._is_lora_warm = False

    def start(self) -> None:
        """Start vLLM and wait until it is warm. Raises ModelError with its last words. An engine starts once."""
        assert self._thread is None, "an engine starts once; make another"
        self._facts = read_facts(self._folder)
        self._max_context = min(self._facts.max_context, self._options.max_context or self._facts.max_context)
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), name="luthier-vllm", daemon=True)
        self._thread.start()
        ready.result()

    def stop(self) -> None:
        """End every stream with an error event, and vLLM with all its processes."""
        with self._lock:
            if self._stats.alive:
                self._loop.call_soon_threadsafe(self._life.cancel)
        if self._thread is not None:
            self._thread.join()

    def compile(self, grammar: Grammar) -> None:
        """Refuse it: the text of an answer is made here, and vLLM's own grammars are not the native engine's."""
        raise InvalidRequest(
            f"{grammar.param} needs the native engine, and this base is served by vLLM (engine.kind)", grammar.param
        )

    def submit(self, request: GenerationRequest) -> EventStream:
        """Send a request and return its stream; see Engine.submit for the errors."""
        stream = EventStream(request.id, asyncio.get_running_loop(), self.cancel)
        with self._lock:
            self._check_serves()
            self._check(request)
            live = self._live[request.id] = _Live(request, stream, Answer(request, self._facts))
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
        await self._in_loop(lambda: self._load(digest, folder))

    async def unload_adapter(self, digest: str) -> None:
        """Refuse new requests, wait for the running ones, forget the name."""
        await self._in_loop(lambda: self._unload(digest))

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
                adapters=tuple(self._adapters),
            )

    def _check_serves(self) -> None:
        if self._why_not is not None:
            raise Overloaded(f"the engine does not serve: {self._why_not}", _RETRY_AFTER_S)

    def _check(self, request: GenerationRequest) -> None:
        prompt, new = len(request.prompt_ids), request.params.max_tokens
        if request.id in self._live:
            raise RequestError(f"request id {request.id} is in use; every running request needs its own")
        if not prompt:
            raise RequestError("the prompt is empty; it must hold at least one token")
        vocabulary = self._facts.vocabulary
        stray = next((each for each in request.prompt_ids if not 0 <= each < vocabulary), None)
        if stray is not None:
            raise RequestError(f"prompt token {stray} is not in the model's vocabulary of {vocabulary}")
        if prompt + new > self._max_context:
            raise RequestError(
                f"{prompt} prompt tokens and max_tokens {new} are more than the context of {self._max_context}; "
                "shorten the prompt or lower max_tokens"
            )
        if request.adapter is not None and (request.adapter not in self._adapters or request.adapter in self._retiring):
            raise UnknownModel(f"adapter {request.adapter} is not loaded in this engine; load it first")
        if len(self._live) >= self._options.max_running + self._options.max_waiting:
            raise Overloaded(f"{self._options.max_waiting} requests wait already (max_waiting); try again later")

    # What follows runs in the engine's thread. First, its life.

    async def _run(self, ready: "Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._changing, self._news, self._commands = asyncio.Lock(), asyncio.Event(), set()
        self._private = Path(tempfile.mkdtemp(prefix="luthier-vllm-"))
        self._server = VllmServer(self._folder, self._options, self._private)
        with self._lock:
            self._why_not, self._stats = "it is starting", replace(self._stats, alive=True)
            self._life = asyncio.create_task(self._serve(ready))
        (ended,) = (await asyncio.wait({self._life}))[0]
        error = None if ended.cancelled() else ended.exception()
        reason = "it was stopped" if ended.cancelled() else str(error or ended.result())
        if error is not None and not isinstance(error, ModelError):
            _log.error("the engine's loop broke", exc_info=error)
        await self._close(reason)
        if not ready.done():
            ready.set_exception(error or ModelError(f"the engine did not start: {reason}"))

    async def _serve(self, ready: "Future[None]") -> str:
        """Start, then restart vLLM whenever it ends. Returns why it is given up. Raises ModelError before that."""
        await self._bring_up()
        ready.set_result(None)
        failures, began = 0, self._loop.time()
        why = await self._server.ended()
        while True:
            with self._lock:
                self._why_not = "vLLM has ended, and is being restarted"
            failures = 1 if self._loop.time() - began > _STEADY_S else failures + 1
            _log.error("vLLM failed (%d in a row): %s", failures, why)
            await self._server.stop()
            if failures > _MAX_RESTARTS:
                return f"vLLM failed {failures} times in a row; {why}"
            await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** (failures - 1))
            began, self._server = self._loop.time(), VllmServer(self._folder, self._options, self._private)
            try:
                await self._bring_up()
                why = await self._server.ended()
            except ModelError as error:
                why = str(error)

    async def _bring_up(self) -> None:
        """Start vLLM, warm it up, give it the adapters; then it serves. Raises ModelError."""
        self._is_lora_warm = False
        await self._server.start()
        try:
            if self._base == ZERO_NAME:
                await self._server.load(ZERO_NAME, self._zero_adapter())
            await self._warm_up(None)
            async with self._changing:
                for digest, links in list(self._adapters.items()):
                    await self._serve_adapter(digest, links)
                with self._lock:
                    self._why_not = None
        except (AdapterRefused, RequestError, aiohttp.ClientError) as error:
            raise ModelError(f"vLLM has started, but fails at once: {error}; {self._server.said()}") from error

    def _zero_adapter(self) -> Path:
        folder = self._private / ZERO_NAME
        if not folder.exists():
            write_zero_adapter(self._folder, folder)
        return folder

    async def _warm_up(self, adapter: str | None) -> None:
        """A greedy and a sampled request. Raises RequestError with vLLM's reason, aiohttp.ClientError."""
        for params in _WARM_UPS:
            body = completion_body(GenerationRequest("warm-up", [0], adapter, params), (), self._base)
            async with contextlib.aclosing(self._server.complete(body)) as chunks:
                async for chunk in chunks:
                    if chunk.error is not None:
                        raise RequestError(chunk.error)

    async def _close(self, reason: str) -> None:
        with self._lock:
            self._why_not, self._stats = reason, replace(self._stats, alive=False)
            unfinished = list(self._live.values())
        for live in unfinished:
            self._fail(live, f"the engine does not serve any more: {reason}")
            self._cancel(live)
        await self._server.stop()
        tasks = [live.task for live in unfinished if live.task is not None]
        await asyncio.gather(*tasks, *self._commands, return_exceptions=True)
        await asyncio.to_thread(shutil.rmtree, self._private, ignore_errors=True)

    # Requests.

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
        body = completion_body(live.request, self._facts.eos_ids, self._base)
        try:
            async with contextlib.aclosing(self._server.complete(body)) as chunks:
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
            self._tell()
        try:
            live.stream.loop.call_soon_threadsafe(live.stream.put, events)
        except RuntimeError:  # that loop is closed: nobody listens there any more
            self._loop.call_soon(self._cancel, live)

    # Adapters.

    async def _load(self, digest: str, folder: Path) -> None:
        while digest in self._retiring:
            await self._news.wait()
        async with self._changing:
            if digest in self._adapters:
                return
            with self._lock:
                self._check_serves()
            if len(self._adapters) >= self._options.max_adapters:
                raise Overloaded(f"all {self._options.max_adapters} adapter slots are taken; unload one first")
            links = Path(tempfile.mkdtemp(dir=self._private)) / "adapter"
            try:
                await asyncio.to_thread(shutil.copytree, folder, links, copy_function=_link)
                await self._serve_adapter(digest, links)
            except (AdapterRefused, RequestError, aiohttp.ClientError) as error:
                await asyncio.to_thread(shutil.rmtree, links)
                if isinstance(error, aiohttp.ClientError):
                    raise Overloaded("vLLM went away while it loaded an adapter", _RETRY_AFTER_S) from error
                raise AdapterRefused(str(error).replace(str(links), str(folder))) from error
            with self._lock:
                self._adapters[digest] = links

    async def _serve_adapter(self, digest: str, links: Path) -> None:
        """Raises AdapterRefused, RequestError when vLLM cannot use it after all, and aiohttp.ClientError."""
        await self._server.load(digest, links)
        if not self._is_lora_warm:
            await self._warm_up(digest)
            self._is_lora_warm = True

    async def _unload(self, digest: str) -> None:
        with self._lock:
            if digest not in self._adapters:
                return
            self._retiring.add(digest)
        while any(live.request.adapter == digest for live in self._live.values()):
            await self._news.wait()
        async with self._changing:
            links = self._adapters.get(digest)
            if links is None:
                return  # another call has done it
            with self._lock:
                if not self._stats.alive:
                    self._check_serves()
                is_serving = self._why_not is None
            if is_serving:
                with contextlib.suppress(aiohttp.ClientError):  # it has just ended, and comes back without this adapter
                    await self._server.unload(digest)
            with self._lock:
                del self._adapters[digest]
                self._retiring.discard(digest)
        self._tell()
        await asyncio.to_thread(shutil.rmtree, links)

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _in_loop(self, command: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a command in the engine's loop, to its end even when the caller goes away meanwhile."""
        done: Future[None] = Future()
        with self._lock:
            if not self._stats.alive:
                self._check_serves()
            self._loop.call_soon_threadsafe(self._begin_command, command, done)
        await asyncio.wrap_future(done)

    def _begin_command(self, command: Callable[[], Coroutine[Any, Any, None]], done: "Future[None]") -> None:
        task = asyncio.create_task(command())
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)
        task.add_done_callback(lambda ended: settle(done, ended.exception()))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
