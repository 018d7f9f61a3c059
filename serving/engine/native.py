"""The native engine: EngineCore in a thread of its own, its events handed to asyncio streams.

One thread computes; any number of asyncio loops submit. A lock guards the core, and the thread lets go of it during
the forward pass, so that submitting, cancelling and asking for stats never wait for a step. Loading an adapter reads
and checks its files in a worker thread; only the exchange of references waits for the gap between two steps.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cluster.errors import NotServing, Overloaded
from serving.engine.adapter import read_adapter
from serving.engine.core import EngineCore, Event
from serving.engine.kv import BlockAllocator
from serving.engine.lora import LoraTable
from serving.engine.model import PackedModel
from serving.engine.pace import Pace
from serving.engine.protocol import EngineStats, GenerationRequest, Grammar, MakeRoom, Quantization, TokenEvent
from serving.engine.scheduler import Limits, Scheduler
from serving.engine.streams import EventStream, settle

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeOptions:
    """How much an engine may hold. Memory of keys and values: 2 × layers × kv_heads × head_dim × kv_tokens values."""

    dtype: str = "float32"  # or bfloat16, float16
    quantization: Quantization | None = None  # of the base's linear layers; adapters and the rest stay in dtype
    device: str = "cpu"  # or cuda, cuda:1
    kv_tokens: int = 16384  # positions that all running sequences may hold together
    block_tokens: int = 16
    max_batch_tokens: int = 512  # rows of one forward pass
    max_running: int = 64
    max_waiting: int = 256
    max_adapters: int = 16
    max_rank: int = 64
    adapter_bytes: int | None = None  # of all adapters; None: no limit but their number
    prefix_cache: bool = True
    num_threads: int | None = None  # of torch, in this process; None leaves them as they are


@dataclass(frozen=True)
class _Command:
    """Something to do between two steps: `attempt` returns False to be tried again after the next one."""

    attempt: Callable[[EngineCore], bool]
    done: Future[None]


class NativeEngine:
    """An Engine (protocol.py) on transformers' model code."""

    def __init__(self, folder: Path, options: NativeOptions) -> None:
        self._folder = folder
        self._options = options
        self._wake = threading.Condition()
        self._core: EngineCore | None = None  # only while it serves
        self._why_not = "it was not started"
        self._last_stats = EngineStats(alive=False)
        self._streams: dict[str, EventStream] = {}
        self._commands: list[_Command] = []
        self._pace = Pace()  # in tokens
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load the model and start the thread. Raises ModelError. An engine starts once."""
        assert self._thread is None, "an engine starts once; make another"
        core = load_core(self._folder, self._options)
        self._core = core
        self._thread = threading.Thread(target=self._run, args=(core,), name="luthier-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End every stream with an error event, let go of the model and join the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def compile(self, grammar: Grammar) -> None:
        """Beside the loop: the lock is not held meanwhile. See Engine.compile."""
        with self._wake:
            grammars = self._serving_core().grammars
        grammars.compile(grammar)

    def submit(self, request: GenerationRequest) -> EventStream:
        """Queue a request and return its stream; see Engine.submit for the errors."""
        stream = EventStream(request.id, asyncio.get_running_loop(), self.cancel)
        with self._wake:
            core = self._serving_core()
            try:
                core.add(request)
            except Overloaded as error:
                raise Overloaded(str(error), self._pace.wait_s(core.backlog)) from None
            self._streams[request.id] = stream
            self._wake.notify()
        return stream

    def cancel(self, request_id: str) -> None:
        """Stop a request."""
        with self._wake:
            if self._core is not None:
                self._core.cancel(request_id)
                self._wake.notify()

    async def load_adapter(self, digest: str, folder: Path, make_room: MakeRoom | None = None) -> None:
        """Read and check beside the loop, take into use between two steps."""
        with self._wake:
            core = self._serving_core()
        adapter = await asyncio.to_thread(read_adapter, digest, folder, core.target)
        if make_room is not None:
            await make_room(core.size_of(adapter))
        await self._between_steps(lambda core: core.load(adapter))

    async def unload_adapter(self, digest: str) -> None:
        """Refuse new requests, wait for the running ones, free."""
        await self._between_steps(lambda core: core.unload(digest))

    def stats(self) -> EngineStats:
        """Counters and state; the last ones once the engine has ended."""
        with self._wake:
            return self._last_stats if self._core is None else self._core.stats()

    async def _between_steps(self, attempt: Callable[[EngineCore], bool]) -> None:
        command = _Command(attempt, Future())
        with self._wake:
            self._serving_core()
            self._commands.append(command)
            self._wake.notify()
        await asyncio.wrap_future(command.done)

    def _serving_core(self) -> EngineCore:
        if self._core is None:
            raise NotServing(f"the engine does not serve: {self._why_not}")
        return self._core

    def _run(self, core: EngineCore) -> None:
        """The thread. An error outside a step is a bug: it ends the engine, and says so to everyone who waits."""
        reason = "it was stopped"
        try:
            while self._turn(core):
                pass
        except Exception as error:
            _log.exception("the engine's loop broke")
            reason = f"its loop broke: {type(error).__name__}: {error}"
        with self._wake:
            self._core, self._why_not = None, reason
            outbox = self._route(core.close(f"the engine does not serve any more: {reason}"))
            self._last_stats = replace(core.stats(), alive=False)
            commands, self._commands = self._commands, []
        self._send(outbox)
        for command in commands:
            settle(command.done, NotServing(f"the engine does not serve any more: {reason}"))

    def _turn(self, core: EngineCore) -> bool:
        """Wait for work, then one step. False when it is time to stop."""
        with self._wake:
            self._attempt_commands(core)
            while not (self._is_stopping or core.has_work):
                self._wake.wait()
                self._attempt_commands(core)
            if self._is_stopping:
                return False
            chunks, events = core.plan()
            outbox = self._route(events)
        self._send(outbox)
        if not chunks:
            return True
        try:
            picks = core.execute(chunks)
        except Exception as error:  # whatever a model can raise, out of memory included: only this step's requests end
            _log.exception("a step of %d requests broke", len(chunks))
            with self._wake:
                outbox = self._route(core.fail(chunks, error))
        else:
            with self._wake:
                self._pace.did(sum(chunk.num_tokens for chunk in chunks))
                outbox = self._route(core.commit(chunks, picks))
        self._send(outbox)
        return True

    def _attempt_commands(self, core: EngineCore) -> None:
        commands, self._commands = self._commands, []
        for command in commands:
            try:
                if command.attempt(core):
                    settle(command.done, None)
                else:
                    self._commands.append(command)
            except Overloaded as error:
                settle(command.done, error)

    def _route(self, events: list[Event]) -> "_Outbox":
        """Find the events' streams, under the lock that ended their requests: an id may be taken again at once."""
        outbox: _Outbox = {}
        for request_id, event in events:
            ended = event.finish_reason is not None
            stream = self._streams.pop(request_id) if ended else self._streams[request_id]
            outbox.setdefault(stream.loop, []).append((stream, event))
        return outbox

    def _send(self, outbox: "_Outbox") -> None:
        """One call into each asyncio loop, however many events."""
        for loop, batch in outbox.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # that loop is closed: nobody listens there any more
                for stream, _ in batch:
                    self.cancel(stream.request_id)


_Outbox = dict[asyncio.AbstractEventLoop, list[tuple[EventStream, TokenEvent]]]


def load_core(folder: Path, options: NativeOptions) -> EngineCore:
    """An engine's core with the base model of `folder` loaded. Raises ModelError."""
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    allocator = BlockAllocator(options.kv_tokens // options.block_tokens, options.block_tokens)
    table = LoraTable(options.max_adapters, options.adapter_bytes)
    model = PackedModel(
        folder,
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
        allocator=allocator,
        table=table,
        max_rank=options.max_rank,
    )
    limits = Limits(
        options.max_batch_tokens,
        options.max_running,
        options.max_waiting,
        model.facts.max_sequence_tokens,
        options.prefix_cache,
    )
    return EngineCore(model, Scheduler(limits, allocator))


def _put_all(batch: list[tuple[EventStream, TokenEvent]]) -> None:
    for stream, event in batch:
        stream.put([event])
