"""An adapter's cold start by part: from a request that names one which no replica has yet to its first token.

Measured through the resolver, the node's downloads, the adapter cache and the engine as a replica puts them together,
without HTTP and Ray. Stores are real: an S3 server where Ceph's object gateway is installed, else a folder.
"""

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from statistics import median

import safetensors.torch

from cluster import keys, models, records, registry
from cluster.models import ModelConfig
from cluster.records import AdapterRecord, BaseModelRef
from cluster.store import Store, open_store
from scripts.benchmarks.peers import object_server
from scripts.benchmarks.report import Measure
from serving.adapters import SPARE_SLOTS, AdapterCache
from serving.config import AdaptersConfig
from serving.downloads import Download, Downloads
from serving.engine.native import NativeEngine, NativeOptions
from serving.engine.protocol import GenerationRequest, MakeRoom, SamplingParams
from serving.resolver import Resolver

PARTS = ("resolve", "fetch", "verify", "place", "first_token", "whole")
PROMPT = 64
WEIGHTS = "adapter_model.safetensors"

Times = dict[str, float]
"""Milliseconds of each of PARTS."""


class TimedDownloads(Downloads):
    """The node's downloads, which note how long the last one took."""

    took_ms = 0.0
    folder = Path()

    def open(self, record: AdapterRecord) -> Download:
        began = time.perf_counter()
        download = super().open(record)
        self.took_ms, self.folder = _since(began), download.folder
        return download


class TimedEngine(NativeEngine):
    """The engine, which notes how long the last adapter took to be read and taken into use."""

    took_ms = 0.0

    async def load_adapter(self, digest: str, folder: Path, make_room: MakeRoom | None = None) -> None:
        began = time.perf_counter()
        await super().load_adapter(digest, folder, make_room)
        self.took_ms = _since(began)


@contextmanager
def open_a_store(root: Path) -> Iterator[tuple[Store, str]]:
    """An empty store, and what it is."""
    if not object_server.is_ceph_installed():
        yield open_store(root.as_uri()), "a folder"
        return
    with object_server.started() as server:
        os.environ.update(server.variables)
        yield open_store(f"s3://{server.bucket}/cold"), server.name


def measure(model: Path, folders: Sequence[Path], root: Path, rounds: int) -> tuple[list[Measure], str]:
    """The measures, and which store they are of. Each round starts all adapters but the first, which warms up."""
    with open_a_store(root / "cold-store") as (store, name):
        config = ModelConfig(name="base", source=str(model), licence="apache-2.0", dtype="fp32")
        base = models.pin(config, store)
        for index, folder in enumerate(folders):
            registry.publish(store, f"a{index}", folder, base, "bench", 1)
            registry.set_alias(store, f"a{index}", registry.STABLE, 1, "bench")
        found = [
            asyncio.run(_round(model, store, base, len(folders), root / f"cold-{index}")) for index in range(rounds)
        ]
    return [
        Measure(
            f"cold_start_{part}_ms",
            "ms, less is better",
            [median(each[part] for each, _ in one) for one in found],
            [median(each[part] for _, each in one) for one in found],
        )
        for part in PARTS
    ], name


async def _round(model: Path, store: Store, base: BaseModelRef, count: int, cache: Path) -> list[tuple[Times, Times]]:
    """Ours and the least that it could be, of each adapter."""
    places = count + SPARE_SLOTS
    engine = TimedEngine(model, NativeOptions(max_adapters=places, prefix_cache=False, num_threads=1))
    engine.start()
    try:
        downloads = TimedDownloads(cache, store, AdaptersConfig().disk_max_bytes)
        adapters = AdapterCache(engine, downloads, count)
        resolver = Resolver(store, base, AdaptersConfig().alias_refresh_s)
        found = []
        for index in range(count):
            name = f"a{index}"
            ours = await _cold_start(name, resolver, downloads, adapters, engine)
            found.append((ours, await _least(name, store, resolver, adapters, engine)))
    finally:
        engine.stop()
    return found[1:]


async def _cold_start(
    name: str, resolver: Resolver, downloads: TimedDownloads, adapters: AdapterCache, engine: TimedEngine
) -> Times:
    began = time.perf_counter()
    record = await resolver.resolve(name)
    resolved_ms = _since(began)
    assert record is not None
    async with adapters.hold(record) as digest:
        first_token_ms = await _first_token(engine, digest)
    whole_ms = _since(began)
    # The store hashes a file when it is there, within the download: the same again, alone, tells how long that takes.
    began = time.perf_counter()
    for path in downloads.folder.iterdir():
        records.describe_file(path, path.name)
    verify_ms = _since(began)
    return {
        "resolve": resolved_ms,
        "fetch": downloads.took_ms - verify_ms,
        "verify": verify_ms,
        "place": engine.took_ms,
        "first_token": first_token_ms,
        "whole": whole_ms,
    }


async def _least(name: str, store: Store, resolver: Resolver, adapters: AdapterCache, engine: NativeEngine) -> Times:
    """One small read, one read of the weights, their SHA-256 and parse in memory, the same request once it is warm."""
    began = time.perf_counter()
    await asyncio.to_thread(store.get, keys.alias_entry(name, 1))
    resolve_ms = _since(began)
    began = time.perf_counter()
    data = await asyncio.to_thread(store.get, keys.adapter_file(name, 1, WEIGHTS))
    fetch_ms = _since(began)
    began = time.perf_counter()
    hashlib.sha256(data).hexdigest()
    verify_ms = _since(began)
    began = time.perf_counter()
    safetensors.torch.load(data)
    place_ms = _since(began)
    began = time.perf_counter()
    record = await resolver.resolve(name)
    assert record is not None
    async with adapters.hold(record) as digest:
        first_token_ms = await _first_token(engine, digest)
    return {
        "resolve": resolve_ms,
        "fetch": fetch_ms,
        "verify": verify_ms,
        "place": place_ms,
        "first_token": first_token_ms,
        "whole": _since(began),
    }


async def _first_token(engine: NativeEngine, digest: str) -> float:
    """Milliseconds until a request's first token."""
    began = time.perf_counter()
    prompt = [random.randrange(300, 6_000) for _ in range(PROMPT)]
    params = SamplingParams(max_tokens=1, temperature=0)
    async with aclosing(engine.submit(GenerationRequest(digest, prompt, digest, params))) as stream:
        await anext(stream)
        return _since(began)


def _since(began: float) -> float:
    return 1e3 * (time.perf_counter() - began)
