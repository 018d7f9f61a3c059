"""The serving side as a whole, on a Ray of its own: what HTTP costs, where traffic goes, how soon a release is live.

Small models, because what is measured is everything around the engine.
"""

import asyncio
import math
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median, quantiles

import httpx
import ray
from ray import serve
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import RequestRouter

from cluster import models, registry
from cluster.errors import RunFailed
from cluster.folder import FolderStore
from cluster.models import ModelConfig
from cluster.records import BaseModelRef
from scripts.benchmarks.report import REPOSITORY, Measure
from serving import deploy
from serving.adapters import HALF_LIFE
from serving.app import build
from serving.calls import ReplicaStatus
from serving.config import AdaptersConfig, EngineConfig, HttpConfig, ReplicaConfig, ServingConfig
from serving.engine.native import NativeEngine, NativeOptions
from serving.engine.protocol import GenerationRequest, SamplingParams
from serving.router import AdapterRouter

NAME, BASE = "bench", "base"
COLD = 99
REPLICAS = 4
AT_ONCE = 64
PLACES = 16  # of each replica: together for two thirds of the adapters
ROOMY_PLACES = 32  # for all
PROMPT, NEW = 64, 128
DEADLINE_S = 180.0
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}


@dataclass(frozen=True)
class Zipf:
    """What the traffic of `zipf` came to, twice in a row on the same replicas."""

    max_over_mean: float  # tokens of the busiest replica, and of all on average
    first_loads: float  # adapters loaded for requests in the first half, before which nobody had asked for any
    later_loads: float  # and in the second
    latency_s: float  # of a request, on average
    clairvoyant_empty: float  # what one cache of all places, that knows the future, would have loaded
    clairvoyant_warm: float

    @property
    def cold_loads(self) -> float:
        return self.first_loads + self.later_loads


@dataclass(frozen=True)
class Contestant:
    """A router over a cache.

    The half-life is that by which adapters are evicted: of one request it is "least recently used", the rule of
    @serve.multiplexed (which would also evict what is in use), and nothing is loaded ahead of requests there.
    """

    router: type[RequestRouter] = AdapterRouter
    half_life: float = HALF_LIFE
    places: int = PLACES
    load_ahead: bool = True


OURS = Contestant()
SERVES = Contestant(PowerOfTwoChoicesRequestRouter, 1 / PLACES, load_ahead=False)
SERVES_ROUTER = Contestant(PowerOfTwoChoicesRequestRouter)
OURS_ROOMY = Contestant(places=ROOMY_PLACES)
SERVES_ROOMY = Contestant(PowerOfTwoChoicesRequestRouter, 1 / ROOMY_PLACES, ROOMY_PLACES, load_ahead=False)


class Live:
    """A store with adapters of one model, and the applications that are made of it, one after the other."""

    def __init__(self, model: Path, folders: Sequence[Path], root: Path) -> None:
        self.model = model
        self.store = FolderStore(root / "store")
        self.config = ModelConfig(name=BASE, source=str(model), licence="apache-2.0", dtype="fp32")
        self.base: BaseModelRef = models.pin(self.config, self.store)
        self.names = [f"a{index}" for index in range(len(folders))]
        for name, folder in zip(self.names, folders, strict=True):
            registry.publish(self.store, name, folder, self.base, "bench", 1)
            registry.set_alias(self.store, name, registry.STABLE, 1, "bench")
        registry.publish(self.store, self.names[0], folders[1], self.base, "bench", 2)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])

    @contextmanager
    def served(self, replicas: int, how: Contestant = OURS) -> Iterator[str]:
        """The endpoint's address, while it is there, from when nothing more is loaded ahead."""
        config = ServingConfig(
            name=NAME,
            model=self.config,
            store=self.store.url,
            engine=EngineConfig(max_adapters=how.places, max_rank=16, kv_tokens=8192, max_batch_tokens=256),
            replicas=ReplicaConfig(min=replicas, max=replicas, cpus=0.1),
            http=HttpConfig(port=self.port),
            adapters=AdaptersConfig(load_ahead=how.load_ahead),
        )
        serve.start(http_options={"host": config.http.host, "port": config.http.port})
        serve.run(build(config, self.base, how.router, how.half_life), name=NAME, route_prefix="/")
        try:
            self._wait_until_loaded(min(replicas * how.places, len(self.names)) if how.load_ahead else 0)
            yield f"http://127.0.0.1:{self.port}/v1"
        finally:
            serve.delete(NAME)

    def replicas(self) -> list[ReplicaStatus]:
        return deploy.status(NAME)[1]

    def _wait_until_loaded(self, adapters: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while sum(len(each.adapters) for each in self.replicas()) < adapters:
            if time.monotonic() > deadline:
                raise RunFailed(f"{adapters} adapters were not loaded ahead within {DEADLINE_S} s")
            time.sleep(0.2)


@contextmanager
def private_ray(variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """A Ray of this process alone, whose processes have these variables too."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    os.environ |= variables or {}
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        for name in variables or ():
            del os.environ[name]


def measure(live: Live, rounds: int, quick: bool) -> list[Measure]:
    """Everything that needs an application."""
    few = 20 if quick else 300
    with private_ray():
        with live.served(1) as url:
            over_http = [asyncio.run(http_latencies(url, live.names[1], few)) for _ in range(rounds)]
            alone = [asyncio.run(engine_latencies(live, few)) for _ in range(rounds)]
            moves = [asyncio.run(moves_live(url, live)) for _ in range(rounds)]
        traffic = 60 if quick else 800
        found: dict[Contestant, list[Zipf]] = {
            each: [] for each in (OURS, SERVES, SERVES_ROUTER, OURS_ROOMY, SERVES_ROOMY)
        }
        for index in range(rounds):
            for how, seen in found.items():
                with live.served(REPLICAS, how) as url:
                    seen.append(asyncio.run(zipf(url, live, traffic, seed=index)))
    with private_ray(HAPROXY), live.served(1) as url:
        by_haproxy = [asyncio.run(http_latencies(url, live.names[1], few)) for _ in range(rounds)]
    possible = {
        "clairvoyant_empty": median(each.clairvoyant_empty for each in found[OURS]),
        "clairvoyant_warm": median(each.clairvoyant_warm for each in found[OURS]),
    }

    def beside(
        name: str, unit: str, figure: Callable[[Zipf], float], ours: Contestant = OURS, peer: Contestant = SERVES
    ) -> Measure:
        ours_, peers = ([figure(each) for each in found[who]] for who in (ours, peer))
        return Measure(f"zipf_{name}", unit, ours_, peers, possible)

    return [
        Measure("haproxy_p50_ms", "ms", [median(each) for each in by_haproxy], [median(each) for each in over_http]),
        Measure("haproxy_p99_ms", "ms", [_p99(each) for each in by_haproxy], [_p99(each) for each in over_http]),
        Measure("ingress_p50_ms", "ms", [median(each) for each in over_http], [median(each) for each in alone]),
        Measure("ingress_p99_ms", "ms", [_p99(each) for each in over_http], [_p99(each) for each in alone]),
        Measure("alias_live_s", "s", [release for release, _ in moves], [back for _, back in moves]),
        beside("max_over_mean", "", lambda each: each.max_over_mean),
        beside("latency_s", "s", lambda each: each.latency_s),
        beside("cold_loads_over_serve", "loads", lambda each: each.cold_loads),
        beside("cold_loads_first", "loads", lambda each: each.first_loads),
        beside("cold_loads_later", "loads", lambda each: each.later_loads),
        beside("cold_loads_all_fit", "loads", lambda each: each.cold_loads, OURS_ROOMY, SERVES_ROOMY),
        beside("cold_loads_by_router", "loads", lambda each: each.cold_loads, peer=SERVES_ROUTER),
    ]


async def http_latencies(url: str, model: str, count: int) -> list[float]:
    """Milliseconds of requests for one token each, one after the other, over one connection."""
    body = {"model": model, "prompt": [300] * PROMPT, "max_tokens": 1, "temperature": 0}
    found = []
    async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
        for index in range(-5, count):
            began = time.perf_counter()
            answer = await client.post(f"{url}/completions", json=body)
            answer.raise_for_status()
            if index >= 0:
                found.append(1e3 * (time.perf_counter() - began))
    return found


async def engine_latencies(live: Live, count: int) -> list[float]:
    """The same requests on an engine in this process."""
    engine = NativeEngine(live.model, NativeOptions(num_threads=1))
    engine.start()
    found = []
    try:
        for index in range(-5, count):
            began = time.perf_counter()
            params = SamplingParams(max_tokens=1, temperature=0)
            async for _ in engine.submit(GenerationRequest(str(index), [300] * PROMPT, None, params)):
                pass
            if index >= 0:
                found.append(1e3 * (time.perf_counter() - began))
    finally:
        engine.stop()
    return found


async def moves_live(url: str, live: Live) -> tuple[float, float]:
    """Seconds from an alias's move to the last answer of the version before, under 50 requests/s; and of its way back.

    Raises what a request that fails raises: no error is allowed.
    """
    name = live.names[0]
    seen: list[tuple[float, str]] = []
    body = {"model": name, "prompt": [300] * PROMPT, "max_tokens": 4, "temperature": 0}
    over = asyncio.Event()

    async def ask(client: httpx.AsyncClient) -> None:
        asked_at = time.monotonic()
        answer = await client.post(f"{url}/completions", json=body)
        answer.raise_for_status()
        seen.append((asked_at, answer.headers["x-luthier-adapter"]))

    async def traffic() -> None:
        async with httpx.AsyncClient(timeout=DEADLINE_S) as client, asyncio.TaskGroup() as group:
            while not over.is_set():
                group.create_task(ask(client))
                await asyncio.sleep(0.02)

    async def move(version: int) -> float:
        moved_at = time.monotonic()
        await asyncio.to_thread(registry.set_alias, live.store, name, registry.STABLE, version, "bench")
        await asyncio.sleep(random.uniform(2, 3) * AdaptersConfig().alias_refresh_s)  # at any time between two looks
        return moved_at

    async with asyncio.TaskGroup() as group:
        group.create_task(traffic())
        await asyncio.sleep(1)
        released_at, taken_back_at = await move(2), await move(1)
        over.set()

    def last(version: int, after: float, before: float) -> float:
        """Until the last request that a version answered, of those asked in a span of time."""
        return max(asked for asked, by in seen if by == f"{name}@{version}" and after <= asked < before) - after

    return last(1, released_at, taken_back_at), last(2, taken_back_at, math.inf)


async def zipf(url: str, live: Live, requests: int, seed: int) -> Zipf:
    """One hot adapter that gets half of all requests, and COLD ones by Zipf's law; `requests` of them, twice."""
    chance = random.Random(seed)
    names = live.names[: COLD + 1]
    weights = list(accumulate([0.5, *(0.5 / rank / _harmonic(len(names) - 1) for rank in range(1, len(names)))]))
    asked: list[str] = []
    took: list[float] = []

    async def client_loop(client: httpx.AsyncClient, left: Iterator[int]) -> None:
        for _ in left:
            asked.append(chance.choices(names, cum_weights=weights)[0])
            body = {"model": asked[-1], "max_tokens": NEW, "temperature": 0}
            prompt = [chance.randrange(300, 6_000) for _ in range(PROMPT)]
            began = time.monotonic()
            (await client.post(f"{url}/completions", json={**body, "prompt": prompt})).raise_for_status()
            took.append(time.monotonic() - began)

    async def half() -> None:
        left = iter(range(requests))
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=DEADLINE_S, limits=limits) as client, asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(client_loop(client, left))

    looks = [await asyncio.to_thread(live.replicas)]
    for _ in range(2):
        await half()
        looks.append(await asyncio.to_thread(live.replicas))
    tokens = [each.generated_tokens + each.prompt_tokens for each in looks[-1]]
    first, later = (
        sum(each.adapter_loads for each in after) - sum(each.adapter_loads for each in before)
        for before, after in pairwise(looks)
    )
    loaded = clairvoyant(asked, REPLICAS * PLACES)
    return Zipf(
        max_over_mean=max(tokens) / (sum(tokens) / len(tokens)),
        first_loads=first,
        later_loads=later,
        latency_s=sum(took) / len(took),
        clairvoyant_empty=sum(loaded[:requests]),
        clairvoyant_warm=sum(loaded[requests:]),
    )


def clairvoyant(asked: Sequence[str], places: int) -> list[bool]:
    """Which requests load if what is needed again latest goes (Belady 1966): no cache of as many places loads less."""
    next_at, later = [0] * len(asked), dict.fromkeys(asked, len(asked))
    for at in reversed(range(len(asked))):
        next_at[at], later[asked[at]] = later[asked[at]], at
    held: dict[str, int] = {}  # until when it is not needed
    loads = []
    for name, then in zip(asked, next_at, strict=True):
        loads.append(name not in held)
        if loads[-1] and len(held) == places:
            del held[max(held, key=lambda each: held[each])]
        held[name] = then
    return loads


def _p99(figures: list[float]) -> float:
    return quantiles(figures, n=100)[98]


def _harmonic(count: int) -> float:
    return sum(1 / rank for rank in range(1, count + 1))
