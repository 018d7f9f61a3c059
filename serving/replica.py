"""One engine with its model, tokenizer and adapters: the deployment that Serve replicates.

A request runs through it like this, and whatever way it ends the engine's memory and the adapter are free again:

    encode ▸ check the length, compile a grammar ▸ hold the adapter ▸ submit all choices, or none ▸ Accepted ▸ events …
    ▸ release

Serve cancels the generator when the client goes away; that is the only signal, and `finally` acts on it.
"""

import asyncio
import logging
import math
import shlex
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import asdict, replace
from pathlib import Path

from ray import serve

from cluster import models, secret
from cluster.errors import InvalidRequest, NotServing
from cluster.records import AdapterRecord, BaseModelRef
from cluster.store import open_existing
from serving import affinity
from serving.adapters import HALF_LIFE, SPARE_SLOTS, AdapterCache
from serving.ahead import load_ahead
from serving.autoscale import ReplicaLoad
from serving.calls import Accepted, Call, ChoiceEvent, ReplicaStatus, mib
from serving.config import EngineConfig, ServingConfig, VllmConfig
from serving.demand import Demand, Stock
from serving.downloads import Downloads
from serving.engine.protocol import Engine, EngineStats, GenerationRequest, TokenStream
from serving.engine.vllm_command import VllmOptions, find_python
from serving.gauges import AnswerClock, AnswerGauges, EngineGauges
from serving.pins import keep_pinned
from serving.protocol import choice_seed
from serving.resolver import Resolver

_METRICS_INTERVAL_S = 5.0
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

_MESSAGE_INTERVAL_S = 0.02
"""A message from replica to client costs Ray and Serve about 1 ms of CPU: 32 streams of a tiny model, a message a
token, ran at 610 tokens/s together where the same answers unstreamed ran at 1930. Nobody reads faster than this."""

_MAX_MESSAGE_EVENTS = 1024
"""gRPC takes messages of 4 MiB, and an event with 20 alternatives has about 1 KiB."""

_log = logging.getLogger(__name__)


class Replica:
    """Answers Calls. Made by Serve, one to a process."""

    def __init__(self, config: ServingConfig, base: BaseModelRef, half_life: float = HALF_LIFE) -> None:
        """Fetch the model and start the engine; blocks. Raises ModelError, StoreError."""
        # Here, not above: these import torch, and the deploying side imports this module for its class alone.
        from serving.prompts import Prompts

        self._teardown = ExitStack()  # first, because __del__ runs even when what follows fails
        self._base = base
        self._quantization = config.quantization
        if config.engine.kind == "vllm":
            find_python(config.engine.python)  # before anything is fetched
        secret.load(config.secrets)
        store = open_existing(config.store)  # one that is away for a while must not be made anew, empty
        folder = models.fetch(config.model, base, store)
        limits = (models.read_shape(folder).max_position_embeddings, config.engine.max_sequence_tokens)
        self._max_context = min(limit for limit in limits if limit is not None)
        self._default_max_tokens = config.engine.default_max_tokens
        self._prompts = Prompts(folder, self._max_context)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="luthier-encode")
        self._engine = start_engine(folder, config)
        self._teardown.callback(self._engine.stop)
        downloads = Downloads(models.cache_folder() / "adapters", store, config.adapters.disk_max_bytes)
        self._adapter_bytes = config.engine.adapter_bytes if isinstance(config.engine, EngineConfig) else None
        self._weights = config.adapters.weights
        self._demand = Demand()
        self._adapters = AdapterCache(
            self._engine,
            downloads,
            config.engine.max_adapters,
            self._advertise,
            max_bytes=self._adapter_bytes,
            half_life=half_life,
            retry_failed_s=config.adapters.retry_failed_s,
        )
        _log.info("%s", memory_plan(self._engine.stats(), self._adapter_bytes))
        # Serve runs this in the loop that it runs requests in, and does not wait for what comes beside them.
        refresh_s = config.adapters.alias_refresh_s
        names = Resolver(store, base, refresh_s)
        if config.adapters.load_ahead:
            self._loading_ahead = asyncio.create_task(
                load_ahead(self._adapters, base, names, config.replicas.min), name="luthier-ahead"
            )
        if config.adapters.pinned:
            self._pinning = asyncio.create_task(
                keep_pinned(config.adapters.pinned, names, self._adapters, refresh_s), name="luthier-pinned"
            )
        self._cancelled = 0
        self._gauges = EngineGauges(base.name)
        self._answers = AnswerGauges(base.name)
        self._stopping = threading.Event()
        self._teardown.callback(self._stopping.set)
        threading.Thread(target=self._export, name="luthier-metrics", daemon=True).start()

    async def generate(self, call: Call) -> AsyncIterator[Accepted | list[ChoiceEvent]]:
        """`Accepted`, then the events in lists: what has come since the last list, or all at the end (`call.stream`).

        Raises RequestError (Overloaded, NotServing, …), and what loading the adapter raises, before Accepted.
        """
        if (call.base, call.quantization) != (self._base, self._quantization):
            meant = f"{call.base.name} at {call.base.revision} in {call.quantization or 'full precision'}"
            raise NotServing(f"the served base is being changed to {meant}; try again soon", 5)
        clock = AnswerClock(call.adapter)
        loop = asyncio.get_running_loop()
        prompts = [await loop.run_in_executor(self._encoder, self._prompts.encode, each) for each in call.prompts]
        requests = self._requests(call, prompts)
        if call.params.grammar is not None:
            await loop.run_in_executor(self._encoder, self._engine.compile, call.params.grammar)
        async with AsyncExitStack() as stack:
            if call.adapter is not None:
                await stack.enter_async_context(self._adapters.hold(call.adapter))
                self._demand.count(call.adapter)
            streams = []
            for request in requests:
                stream = self._engine.submit(request)
                stack.push_async_callback(stream.aclose)
                streams.append(stream)
            clock.prompt_tokens = sum(map(len, prompts))
            yield Accepted(clock.prompt_tokens)
            gathered: list[ChoiceEvent] = []
            is_whole = False
            try:
                async with aclosing(_merge(streams)) as batches:
                    async for batch in batches:
                        clock.saw(batch)
                        if not call.stream:
                            gathered += batch
                            continue
                        for message in _messages(batch):
                            yield message
                is_whole = True
            finally:
                self._cancelled += not is_whole
                self._answers.export(clock)
            for message in _messages(gathered):
                yield message

    def _requests(self, call: Call, prompts: list[list[int]]) -> list[GenerationRequest]:
        digest = call.adapter.digest if call.adapter else None
        weight = self._weights.get(call.adapter.name if call.adapter else self._base.name, 1.0)
        requests: list[GenerationRequest] = []
        for prompt in prompts:
            params = replace(call.params, max_tokens=self._max_tokens(len(prompt), call.max_tokens))
            for index in range(call.n):
                choice = replace(params, seed=choice_seed(params.seed, index))
                requests.append(GenerationRequest(f"{call.id}-{len(requests)}", prompt, digest, choice, weight))
        return requests

    def _max_tokens(self, prompt: int, asked: int | None) -> int:
        """How many tokens may be generated after `prompt` tokens. Raises InvalidRequest when there is no room."""
        wanted = asked or 1
        if prompt + wanted > self._max_context:
            raise InvalidRequest(
                f"the context here is {self._max_context} tokens, and this asks for {prompt + wanted} "
                f"({prompt} in the prompt, {wanted} for the answer); shorten the prompt or lower max_tokens",
                "messages",
                "context_length_exceeded",
            )
        return asked or min(self._default_max_tokens, self._max_context - prompt)

    async def prefetch(self, record: AdapterRecord) -> None:
        """Load an adapter that requests are about to ask for. Raises as loading does."""
        await self._adapters.prefetch(record)

    async def stock(self) -> Stock:
        """Which adapters this replica was asked for lately, and which it has."""
        return Stock(self._demand.wanted(), self._adapters.digests)

    async def ready(self) -> bool:
        """Answers when this replica serves."""
        return self._engine.stats().alive

    async def status(self) -> ReplicaStatus:
        """What this replica does now, and what it did since its start."""
        stats = self._engine.stats()
        return ReplicaStatus(
            replica=serve.get_replica_context().replica_tag,
            alive=stats.alive,
            quantization=self._quantization,
            adapters=tuple(f"{record.name}@{record.version}" for record in self._adapters.loaded),
            requests=stats.requests,
            steps=stats.steps,
            mixed_steps=stats.mixed_steps,
            max_adapters_in_step=stats.max_adapters_in_step,
            adapter_loads=stats.adapter_loads,
            prompt_tokens=stats.prompt_tokens,
            shared_tokens=stats.shared_tokens,
            generated_tokens=stats.generated_tokens,
            cancelled=self._cancelled,
            running=stats.running,
            waiting=stats.waiting,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_total=stats.kv_blocks_total,
            weight_bytes=stats.weight_bytes,
            kv_bytes=stats.kv_bytes,
            adapter_bytes=stats.adapter_bytes,
            adapter_bytes_budget=self._adapter_bytes,
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve every second, and given to the autoscaling policy."""
        stats = self._engine.stats()
        load = ReplicaLoad(
            id="",  # Serve knows
            time_s=time.monotonic(),
            requests=stats.requests,
            prompt_tokens=stats.prompt_tokens,
            generated_tokens=stats.generated_tokens,
            running=stats.running,
            waiting=stats.waiting,
            queued_prompt_tokens=stats.queued_prompt_tokens,
            waiting_answer_tokens=stats.waiting_answer_tokens,
            running_answer_tokens=stats.running_answer_tokens,
            kv_used=stats.kv_blocks_used / max(1, stats.kv_blocks_total),
        )
        return {name: value for name, value in asdict(load).items() if name != "id"}

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here."""
        if not self._engine.stats().alive:
            raise RuntimeError("the engine's thread has ended; this replica's log says why")

    def _advertise(self) -> None:
        affinity.advertise([record.digest for record in self._adapters.loaded])

    def _export(self) -> None:
        while not self._stopping.wait(_METRICS_INTERVAL_S):
            self._gauges.export(self._engine.stats(), self._adapter_bytes)

    def __del__(self) -> None:
        """Called by Serve once the last stream has ended."""
        self._teardown.close()


def memory_plan(stats: EngineStats, adapter_bytes: int | None) -> str:
    """What a replica's engine holds and will hold, for its log."""
    if not stats.kv_bytes:
        return "memory: in the engine's own process"
    adapters = "adapters what engine.max_adapters of them take"
    total = ""
    if adapter_bytes is not None:
        adapters = f"adapters at most {mib(adapter_bytes)}, and one more while it is read"
        total = f"; {mib(stats.weight_bytes + stats.kv_bytes + adapter_bytes)} in all, beside what a step computes with"
    return f"memory: weights {mib(stats.weight_bytes)}, keys and values {mib(stats.kv_bytes)}, {adapters}{total}"


def start_engine(folder: Path, config: ServingConfig) -> Engine:
    """The configured engine on this node's device, ready. Raises ModelError."""
    engine = (
        _vllm(folder, config, config.engine) if config.engine.kind == "vllm" else _native(folder, config, config.engine)
    )
    engine.start()
    return engine


def _native(folder: Path, config: ServingConfig, engine: EngineConfig) -> Engine:
    from serving.engine.native import NativeEngine, NativeOptions

    return NativeEngine(
        folder,
        NativeOptions(
            dtype=_DTYPES[config.model.dtype],
            quantization=engine.quantization,
            device="cuda" if config.replicas.gpus else "cpu",
            kv_tokens=engine.kv_tokens,
            max_batch_tokens=engine.max_batch_tokens,
            max_running=engine.max_running,
            max_waiting=engine.max_waiting,
            max_adapters=engine.max_adapters + SPARE_SLOTS,
            max_rank=engine.max_rank,
            adapter_bytes=engine.adapter_bytes,
            prefix_cache=engine.prefix_cache,
            num_threads=engine.threads,
        ),
    )


def _vllm(folder: Path, config: ServingConfig, engine: VllmConfig) -> Engine:
    from serving.engine.vllm import VllmEngine

    return VllmEngine(
        folder,
        VllmOptions(
            python=find_python(engine.python),
            dtype=_DTYPES[config.model.dtype],
            num_gpus=math.ceil(config.replicas.gpus),
            kv_bytes=engine.kv_bytes,
            max_context=engine.max_context,
            max_batch_tokens=engine.max_batch_tokens,
            max_running=engine.max_running,
            max_waiting=engine.max_waiting,
            max_adapters=engine.max_adapters + SPARE_SLOTS,
            max_rank=engine.max_rank,
            prefix_cache=engine.prefix_cache,
            num_threads=engine.threads,
            start_timeout_s=engine.start_timeout_s,
            arguments=tuple(shlex.split(engine.arguments)),
        ),
    )


def _messages(events: list[ChoiceEvent]) -> Iterator[list[ChoiceEvent]]:
    for start in range(0, len(events), _MAX_MESSAGE_EVENTS):
        yield events[start : start + _MAX_MESSAGE_EVENTS]


async def _merge(streams: list[TokenStream]) -> AsyncGenerator[list[ChoiceEvent], None]:
    """The events of all streams, in lists: the first at once, later ones at least _MESSAGE_INTERVAL_S apart."""
    queue: asyncio.Queue[ChoiceEvent | None] = asyncio.Queue()
    clock = asyncio.get_running_loop().time
    next_at = 0.0

    async def pump(index: int, stream: TokenStream) -> None:
        try:
            async for event in stream:
                queue.put_nowait(ChoiceEvent(index, event))
        finally:
            queue.put_nowait(None)

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            arrived = [await queue.get()]
            if clock() < next_at:
                await asyncio.wait(pumps, timeout=next_at - clock())  # what has ended altogether is not kept waiting
            while not queue.empty():
                arrived.append(queue.get_nowait())
            running -= arrived.count(None)
            batch = [each for each in arrived if each is not None]
            if batch:
                yield batch
                next_at = clock() + _MESSAGE_INTERVAL_S
        await asyncio.gather(*pumps)  # raises what a stream raised
    finally:
        for each in pumps:
            each.cancel()
