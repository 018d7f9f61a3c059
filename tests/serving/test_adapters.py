"""The adapter cache and the downloads below it, against an engine in memory that notices every misuse, and a real one.

The engine in memory refuses a load beyond its slots or bytes and an unload of what is in use, and lets a test hold a
load open: the orders of events that matter are made, not waited for.
"""

import asyncio
import gc
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster import keys, registry
from cluster.errors import AdapterRefused, NotServing, ObjectDamaged, ObjectNotFound, Overloaded, StoreUnreachable
from cluster.folder import FolderStore
from cluster.records import AdapterRecord, BaseModelRef
from serving.adapters import HALF_LIFE, SPARE_SLOTS, AdapterCache
from serving.downloads import Downloads
from serving.engine import kernels
from serving.engine.adapter import LoraPair, read_adapter
from serving.engine.native import NativeEngine, NativeOptions, load_core
from serving.engine.protocol import EngineStats, GenerationRequest, MakeRoom, SamplingParams, TokenStream
from serving.pins import keep_pinned
from serving.resolver import Resolver
from tests.serving.conftest import LoraRecipe, TinyModel

BASE = BaseModelRef(name="base", revision="r1", licence="apache-2.0")


class MemoryEngine:
    """The adapter side of an engine, with as many slots and bytes as it is given."""

    def __init__(self, slots: int, max_bytes: int | None = None) -> None:
        self.slots = slots
        self.max_bytes = max_bytes
        self.sizes: dict[str, int] = {}
        self.loaded: set[str] = set()
        self.loading: set[str] = set()
        self.loads: Counter[str] = Counter()
        self.in_use: Counter[str] = Counter()
        self.refused: set[str] = set()
        self.broken: set[str] = set()  # raises what nobody foresaw
        self.gates: dict[str, asyncio.Event] = {}

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def submit(self, request: GenerationRequest) -> TokenStream:
        raise NotImplementedError("this engine generates nothing")

    def stats(self) -> EngineStats:
        return EngineStats(adapters=tuple(self.loaded))

    async def load_adapter(self, digest: str, folder: Path, make_room: MakeRoom | None = None) -> None:
        self.loads[digest] += 1
        self.loading.add(digest)
        assert (folder / "adapter_config.json").is_file()
        await self.gates[digest].wait() if digest in self.gates else await asyncio.sleep(0)
        self.loading.discard(digest)
        if digest in self.broken:
            raise KeyError(digest)
        if digest in self.refused:
            raise AdapterRefused(f"{digest[:8]} has a rank of 1000")
        self.sizes[digest] = (folder / "adapter_model.safetensors").stat().st_size
        if make_room is not None:
            await make_room(self.sizes[digest])
        if len(self.loaded) >= self.slots:
            raise Overloaded("all slots are taken")
        assert self.max_bytes is None or self.used_bytes + self.sizes[digest] <= self.max_bytes, "over the budget"
        self.loaded.add(digest)

    @property
    def used_bytes(self) -> int:
        return sum(self.sizes[digest] for digest in self.loaded)

    async def unload_adapter(self, digest: str) -> None:
        assert self.in_use[digest] == 0, "an adapter in use was evicted"
        await asyncio.sleep(0)
        self.loaded.discard(digest)


class Bench:
    """A store with published adapters, and a cache over an engine in memory."""

    def __init__(
        self, root: Path, max_adapters: int = 2, disk_bytes: int = 1 << 30, max_bytes: int | None = None
    ) -> None:
        self.root = root
        self.store = FolderStore(root / "store")
        self.engine = MemoryEngine(max_adapters + SPARE_SLOTS, max_bytes)
        self.downloads = Downloads(root / "cache", self.store, disk_bytes)
        self.changes = 0
        self.now = 0.0
        self.cache = AdapterCache(
            self.engine,
            self.downloads,
            max_adapters,
            self._changed,
            max_bytes=max_bytes,
            retry_failed_s=30,
            clock=lambda: self.now,
        )

    def _changed(self) -> None:
        self.changes += 1

    def publish(self, name: str, size: int = 100) -> AdapterRecord:
        """An adapter that takes `size` bytes in the engine in memory."""
        folder = self.root / "made" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(name.encode().ljust(size, b"."))
        (folder / "NOTICE").write_text("all rights given")
        return registry.publish(self.store, name, folder, BASE, f"run-{name}", 1)

    def file(self, record: AdapterRecord) -> Path:
        return self.root / "store" / keys.adapter_file(record.name, record.version, "adapter_model.safetensors")

    @asynccontextmanager
    async def use(self, record: AdapterRecord) -> AsyncIterator[None]:
        """Hold an adapter as a request does; the engine then knows that it is in use."""
        async with self.cache.hold(record) as digest:
            assert digest in self.engine.loaded
            self.engine.in_use[digest] += 1
            try:
                yield
            finally:
                self.engine.in_use[digest] -= 1

    async def touch(self, record: AdapterRecord) -> None:
        async with self.use(record):
            pass

    async def waits_for_a_place(self, record: AdapterRecord) -> None:
        """Until the files are here, and nothing more happens because all places are in use."""
        await until((self.root / "cache" / record.digest).exists)
        await settle()
        assert self.engine.loads[record.digest] == 0

    def names(self) -> list[str]:
        return [record.name for record in self.cache.loaded]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds; a hang is a failure."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for is a state, not an event
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Let everything that can go on without an outside event go on, threads included: to see that nothing happens."""
    for _ in range(50):
        await asyncio.sleep(0.001)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_fifty_requests_for_one_adapter_load_it_once(bench: Bench) -> None:
    record = bench.publish("a")

    async def main() -> None:
        await asyncio.gather(*(bench.touch(record) for _ in range(50)))

    asyncio.run(main())
    assert bench.engine.loads == {record.digest: 1}
    assert bench.changes == 1


def test_two_adapters_load_at_the_same_time(bench: Bench) -> None:
    a, b = bench.publish("a"), bench.publish("b")

    async def main() -> None:
        bench.engine.gates = {a.digest: asyncio.Event(), b.digest: asyncio.Event()}
        tasks = [asyncio.create_task(bench.touch(each)) for each in (a, b)]
        await until(lambda: bench.engine.loading == {a.digest, b.digest})
        for gate in bench.engine.gates.values():
            gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_the_adapter_idle_for_longest_goes(bench: Bench) -> None:
    a, b, c = (bench.publish(name) for name in "abc")

    async def main() -> None:
        for each in (a, b, a, c):
            await bench.touch(each)

    asyncio.run(main())
    assert bench.names() == ["a", "c"]
    assert bench.engine.loaded == {a.digest, c.digest}


def test_of_idle_adapters_the_one_asked_for_least_goes(bench: Bench) -> None:
    hot, cold, another, third = (bench.publish(name) for name in ("hot", "cold", "another", "third"))

    async def main() -> None:
        for each in (hot, hot, cold, another, third):  # what is asked for once takes one place, by turns
            await bench.touch(each)
        assert bench.names() == ["hot", "third"]
        for _ in range(int(6 * HALF_LIFE)):  # until the morning's favourite counts for less than one request
            await bench.touch(third)
        await bench.touch(cold)
        await bench.touch(another)
        assert bench.names() == ["third", "another"]

    asyncio.run(main())


def test_several_leave_for_a_large_one_and_as_few_as_will_do(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=8, max_bytes=1000)
    a, b, c, used, large = (
        bench.publish(name, size) for name, size in (("a", 100), ("b", 300), ("c", 200), ("used", 350), ("large", 600))
    )

    async def main() -> None:
        async with bench.use(used):
            for each in (a, b, c):
                await bench.touch(each)
            assert bench.cache.used_bytes == 950
            await bench.touch(large)
            assert bench.names() == ["used", "large"]
            await bench.touch(b)  # there is no room for it beside what is in use and the large one
            assert bench.names() == ["used", "b"]
            assert bench.cache.used_bytes == bench.engine.used_bytes == 650

    asyncio.run(main())


def test_what_is_larger_than_the_budget_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=2, max_bytes=250)
    a, b, pinned = (bench.publish(name) for name in ("a", "b", "pinned"))
    huge, too_large = bench.publish("huge", 251), bench.publish("too-large", 151)

    async def main() -> None:
        await bench.touch(a)
        await bench.touch(b)
        with pytest.raises(AdapterRefused, match=r"huge@1 takes 251 bytes .*adapter_bytes of 250 leaves 250"):
            await bench.touch(huge)
        assert bench.names() == ["a", "b"]
        await bench.cache.prefetch(pinned)
        bench.cache.pin([pinned])
        with pytest.raises(AdapterRefused, match=r"takes 151 bytes .*leaves 150 beside what is pinned"):
            await bench.touch(too_large)
        assert bench.names() == ["b", "pinned"]
        await bench.touch(b)

    asyncio.run(main())
    assert bench.engine.loads[b.digest] == 1


def test_pinned_adapters_beyond_the_budget_are_a_clear_fault_and_do_not_chase_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path, max_adapters=4, max_bytes=250)
    records = [bench.publish(name) for name in ("first", "second", "third")]
    for record in records:
        registry.set_alias(bench.store, record.name, registry.STABLE, 1, "test")

    async def main() -> None:
        names = [record.name for record in records]
        pinning = asyncio.create_task(keep_pinned(names, Resolver(bench.store, BASE, 0.01), bench.cache, 0.01))
        await until(lambda: "third" in caplog.text)
        for _ in range(3):
            bench.now += 31
            await settle()
        pinning.cancel()

    asyncio.run(main())
    assert bench.names() == ["first", "second"]
    assert bench.engine.loads[records[0].digest] == bench.engine.loads[records[1].digest] == 1
    assert caplog.text.count("adapter_bytes of 250 leaves 50") == 1


def test_an_adapter_in_use_stays_even_when_it_was_used_longest_ago(bench: Bench) -> None:
    a, b, c = (bench.publish(name) for name in "abc")

    async def main() -> None:
        async with bench.use(a):
            await bench.touch(b)
            await bench.touch(c)
            assert bench.names() == ["a", "c"]

    asyncio.run(main())


def test_a_newcomer_waits_while_all_are_in_use(bench: Bench) -> None:
    a, b, c = (bench.publish(name) for name in "abc")

    async def main() -> None:
        async with bench.use(a):
            async with bench.use(b):
                newcomer = asyncio.create_task(bench.touch(c))
                await settle()
                assert not newcomer.done()
                assert bench.engine.loads[c.digest] == 0
            await newcomer
            assert "a" in bench.names()

    asyncio.run(main())


def test_a_busy_adapter_cannot_starve_another(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=1)
    busy, other = bench.publish("busy"), bench.publish("other")

    async def main() -> None:
        stop = asyncio.Event()

        async def client(turn: int) -> None:
            while not stop.is_set():
                async with bench.use(busy):
                    for _ in range(3 + turn):  # of different lengths, so that somebody always holds it
                        await asyncio.sleep(0)

        async with bench.use(busy):
            clients = [asyncio.create_task(client(turn)) for turn in range(4)]
            newcomer = asyncio.create_task(bench.touch(other))
            await bench.waits_for_a_place(other)
        async with asyncio.timeout(30):
            await newcomer
            stop.set()
            await asyncio.gather(*clients)

    asyncio.run(main())


def test_a_failed_load_tells_everyone_and_is_not_tried_again_at_once_and_gives_its_place_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=1)
    record = bench.publish("a")
    bench.engine.refused.add(record.digest)

    async def fails(times: int) -> None:
        failed = await asyncio.gather(*(bench.touch(record) for _ in range(times)), return_exceptions=True)
        assert {type(each) for each in failed} == {AdapterRefused}

    async def main() -> None:
        await fails(10)
        bench.engine.refused.clear()
        bench.now = 29.0
        await fails(10)
        assert bench.engine.loads[record.digest] == 1
        bench.now = 31.0
        async with asyncio.timeout(30):
            await bench.touch(record)
        assert bench.names() == ["a"]

    asyncio.run(main())


def test_a_store_that_was_away_is_asked_again_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    record = bench.publish("a")

    def away(*_: object) -> None:
        raise StoreUnreachable("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "download", away)
        with pytest.raises(StoreUnreachable):
            asyncio.run(bench.touch(record))
    asyncio.run(Bench.touch(bench, record))


def test_what_is_pinned_is_never_evicted_until_another_is(bench: Bench) -> None:
    old, new, b, c = (bench.publish(name) for name in ("old", "new", "b", "c"))

    async def main() -> None:
        await bench.cache.prefetch(old)
        bench.cache.pin([old])
        for each in (b, c, b, c):
            await bench.touch(each)
        assert bench.names() == ["old", "c"]
        async with bench.use(c):  # the newcomer waits for it, and does not take the pinned one's place
            newcomer = asyncio.create_task(bench.touch(b))
            await settle()
            assert bench.names() == ["old", "c"]
        await newcomer
        await bench.cache.prefetch(new)
        bench.cache.pin([new])
        await bench.touch(b)
        await bench.touch(c)
        assert bench.names() == ["new", "c"]

    asyncio.run(main())
    assert bench.engine.loads[old.digest] == bench.engine.loads[new.digest] == 1


def test_a_pin_follows_its_alias_and_keeps_the_old_version_until_the_new_one_can_be_loaded(bench: Bench) -> None:
    old, b, c = (bench.publish(name) for name in ("named", "b", "c"))
    folder = bench.root / "made" / "second"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"second" * 100)
    new = registry.publish(bench.store, "named", folder, BASE, "run", 2)
    registry.set_alias(bench.store, "named", registry.STABLE, 1, "first")

    async def others() -> None:
        for each in (b, c):
            await bench.touch(each)

    async def main() -> None:
        pinning = asyncio.create_task(keep_pinned(["named"], Resolver(bench.store, BASE, 0.01), bench.cache, 0.01))
        await until(lambda: old.digest in bench.engine.loaded)
        await settle()
        await others()
        assert old.digest in bench.engine.loaded
        bench.engine.refused.add(new.digest)
        registry.set_alias(bench.store, "named", registry.STABLE, 2, "second")
        await until(lambda: bench.engine.loads[new.digest] == 1)
        await settle()
        await others()
        assert old.digest in bench.engine.loaded
        bench.engine.refused.clear()
        bench.now += 31
        await until(lambda: new.digest in bench.engine.loaded)
        await settle()
        await others()
        assert bench.engine.loaded >= {new.digest}
        assert old.digest not in bench.engine.loaded
        pinning.cancel()

    asyncio.run(main())


def test_a_load_whose_callers_all_left_is_advertised_only_if_it_is_there(bench: Bench) -> None:
    record = bench.publish("a")

    async def main() -> None:
        gate = bench.engine.gates[record.digest] = asyncio.Event()
        callers = [asyncio.create_task(bench.touch(record)) for _ in range(3)]
        await until(lambda: record.digest in bench.engine.loading)
        for each in callers:
            each.cancel()
        await settle()
        assert bench.names() == []
        bench.engine.refused.add(record.digest)
        gate.set()
        await settle()
        assert bench.names() == []
        assert bench.engine.loaded == set()

    asyncio.run(main())


def test_a_load_that_fails_evicts_nothing(bench: Bench) -> None:
    a, b, bad = (bench.publish(name) for name in ("a", "b", "bad"))
    bench.engine.refused.add(bad.digest)

    async def main() -> None:
        await bench.touch(a)
        await bench.touch(b)
        with pytest.raises(AdapterRefused, match="rank"):
            await bench.touch(bad)
        assert bench.names() == ["a", "b"]
        await bench.touch(a)  # and none is left marked as leaving
        await bench.touch(b)

    asyncio.run(main())
    assert bench.engine.loads[a.digest] == bench.engine.loads[b.digest] == 1


def test_one_caller_leaving_does_not_end_the_load_for_another(bench: Bench) -> None:
    record = bench.publish("a")

    async def main() -> None:
        gate = bench.engine.gates[record.digest] = asyncio.Event()
        leaver, stayer = (asyncio.create_task(bench.touch(record)) for _ in range(2))
        await until(lambda: record.digest in bench.engine.loading)
        leaver.cancel()
        await settle()
        gate.set()
        await stayer
        assert leaver.cancelled()

    asyncio.run(main())
    assert bench.engine.loads[record.digest] == 1


def test_a_load_that_nobody_waits_for_takes_no_place(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=1)
    a, b = bench.publish("a"), bench.publish("b")

    async def main() -> None:
        async with bench.use(a):
            newcomer = asyncio.create_task(bench.touch(b))
            await bench.waits_for_a_place(b)
            newcomer.cancel()
            await settle()
            async with bench.use(a):  # which is not leaving any more
                assert bench.names() == ["a"]
        await settle()
        assert bench.engine.loads[b.digest] == 0
        await bench.touch(b)

    asyncio.run(main())


@pytest.mark.parametrize("max_bytes", [None, 400, 250])
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_requests_and_departures_ends_well(tmp_path: Path, seed: int, max_bytes: int | None) -> None:
    """The engine asserts on its own that nothing in use goes and that neither slots nor bytes are overrun."""
    bench = Bench(tmp_path, max_adapters=3, max_bytes=max_bytes)
    chance = random.Random(seed)
    records = [bench.publish(f"a{number}", chance.randrange(10, 250)) for number in range(7)]
    bench.engine.refused.add(records[6].digest)
    done: Counter[str] = Counter()

    async def request(number: int) -> None:
        record = records[chance.randrange(7)]
        for _ in range(chance.randrange(30)):
            await asyncio.sleep(0)
        try:
            async with bench.use(record):
                for _ in range(chance.randrange(20)):
                    await asyncio.sleep(0)
            done["answered"] += 1
        except AdapterRefused:
            done["refused"] += 1

    async def main() -> None:
        tasks = [asyncio.create_task(request(number)) for number in range(300)]
        for task in chance.sample(tasks, 60):
            await asyncio.sleep(0)
            task.cancel()
        async with asyncio.timeout(60):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [each for each in results if isinstance(each, Exception)]
        assert not wrong
        await settle()
        assert len(bench.engine.loaded) <= 3
        assert bench.engine.loaded == {record.digest for record in bench.cache.loaded}
        assert max_bytes is None or bench.engine.used_bytes == bench.cache.used_bytes <= max_bytes

    asyncio.run(main())
    assert done["answered"] + done["refused"] >= 240
    assert done["answered"] > 100


def test_damaged_files_are_refused_and_fetched_anew_once_whole(bench: Bench) -> None:
    record = bench.publish("a")
    good = bench.file(record).read_bytes()
    bench.file(record).write_bytes(good[:-1] + b"!")
    with pytest.raises(ObjectDamaged, match="adapters/a/1/adapter_model"):
        asyncio.run(bench.touch(record))
    assert not (bench.root / "cache" / record.digest).exists()
    bench.file(record).write_bytes(good)
    bench.now += 31
    asyncio.run(Bench.touch(bench, record))


def test_a_record_that_lies_about_its_digest_is_refused(bench: Bench) -> None:
    record = bench.publish("a").model_copy(update={"digest": "0" * 64})
    with pytest.raises(ObjectDamaged, match="another digest"):
        bench.downloads.open(record)


def test_missing_files_are_an_error_with_the_key(bench: Bench) -> None:
    record = bench.publish("a")
    bench.file(record).unlink()
    with pytest.raises(ObjectNotFound, match="adapters/a/1/adapter_model"):
        asyncio.run(bench.touch(record))


def test_what_is_on_disk_is_not_fetched_again(bench: Bench) -> None:
    record = bench.publish("a")
    bench.downloads.open(record).close()
    bench.file(record).unlink()
    bench.downloads.open(record).close()


def test_the_disk_budget_removes_the_longest_unused_and_spares_what_is_read(tmp_path: Path) -> None:
    bench = Bench(tmp_path, disk_bytes=250)  # each adapter takes 102 bytes
    a, b, c, d = (bench.publish(name) for name in "abcd")
    cache = bench.root / "cache"

    def kept() -> list[bool]:
        return [(cache / record.digest).exists() for record in (a, b, c, d)]

    reading = bench.downloads.open(a)
    bench.downloads.open(b).close()
    assert kept() == [True, True, False, False]
    bench.downloads.open(c).close()  # a is older than b, but is being read
    assert kept() == [True, False, True, False]
    reading.close()
    Downloads(cache, bench.store, 250).open(d).close()  # another process: the same rules by the same locks
    assert kept() == [False, False, True, True]


def test_a_real_engine_answers_for_each_adapter_as_peft_does(tmp_path: Path, tiny: Callable[[str], TinyModel]) -> None:
    """Four adapters take turns in two places; each answer is that adapter's, whoever was there before."""
    model = tiny("qwen3")
    store = FolderStore(tmp_path / "store")
    recipes = [LoraRecipe(200 + number) for number in range(4)]
    records = [
        registry.publish(store, f"a{number}", model.adapter(recipe), BASE, "run", number)
        for number, recipe in enumerate(recipes)
    ]
    engine = NativeEngine(model.folder, NativeOptions(max_adapters=2 + SPARE_SLOTS, kv_tokens=2048))
    cache = AdapterCache(engine, Downloads(tmp_path / "cache", store, 1 << 30), 2)
    prompt = model.prompt(3, 12)

    async def ask(number: int, turn: int) -> None:
        async with cache.hold(records[number]) as digest:
            request = GenerationRequest(f"{number}-{turn}", prompt, digest, SamplingParams(12, temperature=0.0))
            async with aclosing(engine.submit(request)) as events:
                tokens = [event.token_id async for event in events if event.token_id is not None]
        model.expected(recipes[number], prompt, 12).check(tokens)

    async def main() -> None:
        await asyncio.gather(*(ask(number, turn) for turn in range(3) for number in range(4)))

    engine.start()
    try:
        asyncio.run(main())
        assert set(engine.stats().adapters) == {record.digest for record in cache.loaded}
        assert len(cache.loaded) == 2
    finally:
        engine.stop()


@pytest.fixture(params=["cc", "no-such-compiler"])
def _products(request: pytest.FixtureRequest) -> Iterator[None]:
    """Adapters computed in place by our kernels, and from copies on shelves, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", request.param)
        kernels.library.cache_clear()
        yield
    kernels.library.cache_clear()


def lora_bytes() -> int:
    """Of all tensors that belong to any adapter or copy of one in this process, whoever counts them."""
    pairs = [each for each in gc.get_objects() if type(each) is LoraPair]
    return sum(each.nbytes for pair in pairs for each in vars(pair).values() if isinstance(each, torch.Tensor))


@pytest.mark.usefixtures("_products")
def test_the_bytes_of_a_real_engine_never_exceed_the_budget(tmp_path: Path, tiny: Callable[[str], TinyModel]) -> None:
    """Ten adapters of many ranks under random requests and departures. Beside the budget is the one that is read."""
    chance = random.Random(1)
    model = tiny("qwen3")
    store = FolderStore(tmp_path / "store")
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    recipes = [
        LoraRecipe(300 + number, r=rank, targets=everything if number % 3 else ("q_proj", "v_proj"))
        for number, rank in enumerate((1, 2, 3, 4, 6, 8, 9, 12, 16, 16))
    ]
    records = [
        registry.publish(store, f"a{number}", model.adapter(recipe), BASE, "run", number)
        for number, recipe in enumerate(recipes)
    ]
    broken = tmp_path / "broken"
    shutil.copytree(model.adapter(recipes[-1]), broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[max(tensors)].view(-1)[0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    records.append(registry.publish(store, "broken", broken, BASE, "run", 0))
    measure = load_core(model.folder, NativeOptions(max_rank=16))
    sizes = [measure.size_of(read_adapter("d", model.adapter(each), measure.target)) for each in recipes]
    budget = int(0.4 * sum(sizes))
    options = NativeOptions(
        max_adapters=8 + SPARE_SLOTS, max_rank=16, kv_tokens=4096, max_running=6, adapter_bytes=budget, num_threads=1
    )
    engine = NativeEngine(model.folder, options)
    gc.collect()
    others = lora_bytes()
    answered = 0

    def check() -> None:
        assert engine.stats().adapter_bytes <= budget
        if not chance.randrange(8):  # it takes a while to look at everything there is
            assert lora_bytes() - others <= budget + max(sizes)

    cache = AdapterCache(engine, Downloads(tmp_path / "cache", store, 1 << 30), 8, check, max_bytes=budget)

    async def ask(id_: str, number: int) -> None:
        nonlocal answered
        prompt = model.prompt(number, 6 + number)
        async with cache.hold(records[number]) as digest:
            request = GenerationRequest(id_, prompt, digest, SamplingParams(10, temperature=0.0))
            async with aclosing(engine.submit(request)) as events:
                tokens = []
                async for event in events:
                    assert engine.stats().adapter_bytes <= budget
                    if event.token_id is not None:
                        tokens.append(event.token_id)
        model.expected(recipes[number], prompt, 10).check(tokens)
        answered += 1

    async def main() -> None:
        for turn in range(8):
            tasks = [asyncio.create_task(ask(f"{turn}-{each}", chance.randrange(11))) for each in range(8)]
            leavers = chance.sample(tasks, 2)
            for each in leavers:
                for _ in range(chance.randrange(40)):
                    await asyncio.sleep(0)
                each.cancel()
            async with asyncio.timeout(60):
                results = await asyncio.gather(*tasks, return_exceptions=True)
            failed = [each for each in results if isinstance(each, Exception)]
            refused.extend(each for each in failed if isinstance(each, AdapterRefused))
            assert len(failed) == sum(isinstance(each, AdapterRefused) for each in failed)
        await settle()

    refused: list[AdapterRefused] = []  # which are kept, and must not keep what was read
    engine.start()
    try:
        asyncio.run(main())
        gc.collect()
        stats = engine.stats()
        assert lora_bytes() - others == stats.adapter_bytes <= budget
        assert set(stats.adapters) == {record.digest for record in cache.loaded}
        assert answered >= 30
        assert refused
        assert stats.adapter_loads > len(recipes), "nothing was ever evicted"
    finally:
        engine.stop()


def test_a_disk_that_cannot_be_written_is_told_and_tried_again(bench: Bench) -> None:
    record = bench.publish("a")
    (bench.root / "cache").write_text("in the way")

    async def main() -> None:
        with pytest.raises(NotServing, match="cannot keep adapters"):
            await bench.touch(record)
        (bench.root / "cache").unlink()
        await bench.touch(record)

    asyncio.run(main())


def test_a_pin_that_breaks_in_a_way_that_nobody_foresaw_is_tried_again(bench: Bench) -> None:
    record = bench.publish("named")
    registry.set_alias(bench.store, "named", registry.STABLE, 1, "a test")
    bench.engine.broken.add(record.digest)

    async def main() -> None:
        names = Resolver(bench.store, BASE, 0.01)
        pinning = asyncio.create_task(keep_pinned(["named"], names, bench.cache, 0.01))
        await until(lambda: bench.engine.loads[record.digest] > 2)
        bench.engine.broken.clear()
        await until(lambda: bench.names() == ["named"])
        pinning.cancel()

    asyncio.run(main())
