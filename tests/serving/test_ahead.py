"""What a new replica loads ahead of requests, over adapter caches and their engines in memory."""

import asyncio
from pathlib import Path

import pytest

from cluster.errors import NotServing
from serving.ahead import fill, warm
from serving.demand import Stock, Wanted
from tests.serving.test_adapters import Bench, settle


def test_free_places_are_filled_by_the_most_wanted_and_nothing_is_evicted_for_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=3)
    asked, refused, first, second, third = (bench.publish(name) for name in ("asked", "bad", "1st", "2nd", "3rd"))
    bench.engine.refused.add(refused.digest)

    async def main() -> None:
        await bench.touch(asked)
        wanted = enumerate([refused, first, asked, second, third])
        await warm(bench.cache, [Wanted(record, 100 - place) for place, record in wanted], set())
        assert bench.names() == ["asked", "1st", "2nd"]
        await bench.touch(third)  # what is expected the least leaves first
        assert bench.names() == ["asked", "1st", "3rd"]

    asyncio.run(main())
    assert bench.engine.loads[asked.digest] == 1
    assert bench.engine.loads[third.digest] == 1


def test_replicas_that_start_together_fill_evenly_and_seldom_load_the_same(tmp_path: Path) -> None:
    benches = [Bench(tmp_path / str(number), max_adapters=8) for number in range(3)]
    stable, *_ = ([bench.publish(f"a{number}") for number in range(20)] for bench in benches)

    async def ask() -> list[Stock]:
        await asyncio.sleep(0)
        return [Stock([], bench.cache.digests) for bench in benches]

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for number, bench in enumerate(benches):
                group.create_task(fill(bench.cache, stable, ask, f"replica{number}", min_replicas=3, failed=set()))

    asyncio.run(main())
    assert {len(bench.names()) for bench in benches} <= {6, 7}
    assert len({name for bench in benches for name in bench.names()}) >= 18


def test_who_comes_later_takes_what_nobody_holds_while_it_has_room(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=3)
    stable = [bench.publish(f"a{number}") for number in range(12)]
    elsewhere = frozenset(record.digest for record in stable[:6])

    async def ask() -> list[Stock]:
        return [Stock([], elsewhere)]

    async def main() -> None:
        await bench.touch(stable[0])
        await fill(bench.cache, stable, ask, "replica", min_replicas=1, failed=set())

    asyncio.run(main())
    assert len(bench.names()) == 3
    assert bench.names()[0] == "a0"
    assert set(bench.names()[1:]) <= {f"a{number}" for number in range(6, 12)}


def test_bytes_that_are_taken_are_no_room(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=8, max_bytes=250)
    stable = [bench.publish(f"a{number}", size=100) for number in range(6)]

    async def ask() -> list[Stock]:
        return []

    async def main() -> None:
        await bench.touch(stable[0])
        await fill(bench.cache, stable, ask, "replica", min_replicas=1, failed=set())

    asyncio.run(main())
    assert len(bench.names()) == 2
    assert bench.names()[0] == "a0"


def test_a_request_that_joins_a_load_ahead_has_others_leave_for_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=1)
    here, ahead = bench.publish("here"), bench.publish("ahead")

    async def main() -> None:
        await bench.touch(here)
        assert not await bench.cache.load_into_room(ahead)
        assert bench.names() == ["here"]
        loading = asyncio.create_task(bench.cache.load_into_room(ahead))
        await asyncio.sleep(0)  # it is on its way to the disk
        await bench.touch(ahead)
        assert await loading
        assert bench.names() == ["ahead"]
        await settle()

    asyncio.run(main())


def test_what_cannot_be_loaded_is_passed_over_whatever_it_has_and_not_tried_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=4)
    stable = [bench.publish(f"a{number}") for number in range(3)]
    bench.engine.broken.add(stable[1].digest)
    failed: set[str] = set()

    async def ask() -> list[Stock]:
        return []

    async def main() -> None:
        for _ in range(2):
            await fill(bench.cache, stable, ask, "replica", 1, failed)

    asyncio.run(main())
    assert set(bench.names()) == {"a0", "a2"}
    assert failed == {stable[1].digest}
    assert bench.engine.loads[stable[1].digest] == 1


def test_a_request_that_joined_a_load_ahead_and_left_has_nobody_leave_for_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=1)
    here, ahead = bench.publish("here"), bench.publish("ahead")

    async def main() -> None:
        await bench.touch(here)
        loading = asyncio.create_task(bench.cache.load_into_room(ahead))
        await asyncio.sleep(0)
        request = asyncio.create_task(bench.touch(ahead))
        await asyncio.sleep(0)
        request.cancel()
        assert not await loading
        assert bench.names() == ["here"]

    asyncio.run(main())


def test_what_the_nodes_disk_kept_from_loading_is_loaded_when_that_is_mended(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_adapters=4)
    stable = [bench.publish(f"a{number}") for number in range(3)]
    (tmp_path / "cache").write_text("in the way")
    failed: set[str] = set()

    async def ask() -> list[Stock]:
        return []

    async def main() -> None:
        with pytest.raises(NotServing):
            await fill(bench.cache, stable, ask, "replica", 1, failed)
        (tmp_path / "cache").unlink()
        await fill(bench.cache, stable, ask, "replica", 1, failed)

    asyncio.run(main())
    assert len(bench.names()) == 3
