"""Which version answers for a name, and since when: an alias that moves is live in time, and loaded before it is."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path

import pytest

from cluster import registry
from cluster.errors import UnknownModel
from cluster.folder import FolderStore
from cluster.records import AdapterRecord, BaseModelRef
from serving.resolver import Resolver

BASE = BaseModelRef(name="base", revision="r1", licence="apache-2.0")
REFRESH_S = 2.0


class Desk:
    """A resolver over a store with two versions of one adapter, a clock to be turned, and a load to be let through."""

    def __init__(self, root: Path) -> None:
        self.now = 100.0
        self.store = FolderStore(root / "store")
        self.versions = [self.publish(root, number) for number in (1, 2)]
        self.prepared: list[AdapterRecord] = []
        self.is_loaded = asyncio.Event()
        self.resolver = Resolver(self.store, BASE, REFRESH_S, self._prepare, clock=lambda: self.now)
        self.promote(1)

    def publish(self, root: Path, number: int, base: BaseModelRef = BASE) -> AdapterRecord:
        folder = root / f"made-{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(bytes([number]) * 100)
        return registry.publish(self.store, "a", folder, base, "run", number)

    def promote(self, version: int) -> None:
        registry.set_alias(self.store, "a", registry.STABLE, version, "a test")

    async def _prepare(self, record: AdapterRecord) -> None:
        self.prepared.append(record)
        await self.is_loaded.wait()

    async def version(self) -> int:
        record = await self.resolver.resolve("a")
        assert record
        return record.version


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_moved_alias_is_prepared_while_the_old_version_answers(tmp_path: Path) -> None:
    async def main() -> None:
        desk = Desk(tmp_path)
        assert await desk.version() == 1
        desk.promote(2)
        desk.now += REFRESH_S / 2 - 0.01
        assert await desk.version() == 1
        assert desk.prepared == []
        desk.now += 0.02
        assert await desk.version() == 1
        await settle()
        assert desk.prepared == desk.versions[1:]
        assert await desk.version() == 1
        desk.is_loaded.set()
        await settle()
        assert await desk.version() == 2
        desk.promote(1)  # and the way back is no longer
        desk.now += REFRESH_S / 2
        await desk.version()
        await settle()
        assert await desk.version() == 1

    asyncio.run(main())


def test_a_load_that_takes_too_long_is_not_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        desk = Desk(tmp_path)
        assert await desk.version() == 1
        desk.promote(2)
        desk.now += REFRESH_S - 0.05
        assert await desk.version() == 1
        async with asyncio.timeout(30):
            while await desk.version() != 2:  # noqa: ASYNC110 - what is waited for is a state, not an event
                await asyncio.sleep(0.01)
        assert not desk.is_loaded.is_set()

    asyncio.run(main())


def test_a_name_that_nobody_asked_for_lately_is_never_stale(tmp_path: Path) -> None:
    async def main() -> None:
        desk = Desk(tmp_path)
        assert await desk.version() == 1
        desk.promote(2)
        desk.now += REFRESH_S
        assert await desk.version() == 2

    asyncio.run(main())


def test_what_was_not_there_is_there_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        desk = Desk(tmp_path)
        with pytest.raises(UnknownModel, match=r"base: base; adapters: a"):
            await desk.resolver.resolve("a@mine")
        registry.set_alias(desk.store, "a", "mine", 2, "a test")
        desk.now += REFRESH_S
        record = await desk.resolver.resolve("a@mine")
        assert record == desk.versions[1]

    asyncio.run(main())


def test_an_alias_without_its_version_takes_no_other_name_along(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    last = max(desk.store.list("aliases/a/"), key=lambda item: item.key).key
    entry = json.loads(desk.store.get(last))
    desk.store.create("aliases/lost/00000001.json", json.dumps({**entry, "stable": 9}).encode())
    registry.publish(desk.store, "lost", tmp_path / "made-1", BASE, "run", 1)

    async def main() -> None:
        assert [model.id for model in await desk.resolver.models()] == ["base", "a"]
        with pytest.raises(UnknownModel, match=r"no model 'lost' here; base: base; adapters: a$"):
            await desk.resolver.resolve("lost")

    asyncio.run(main())


def test_a_version_of_another_base_is_refused_and_never_loaded(tmp_path: Path) -> None:
    async def main() -> None:
        desk = Desk(tmp_path)
        assert await desk.version() == 1
        desk.publish(tmp_path, 3, BaseModelRef(name="base", revision="r2", licence="apache-2.0"))
        desk.promote(3)
        desk.now += REFRESH_S / 2 + 0.01
        with suppress(UnknownModel):  # now, or with the next look
            await desk.version()
        await settle()
        with pytest.raises(UnknownModel, match="belongs to base"):
            await desk.version()
        assert desk.prepared == []

    asyncio.run(main())
