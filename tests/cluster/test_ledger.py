"""The cost ledger: sums that do not depend on how time is cut, entries that outlast outages, prices that are told."""

import json
import random
import threading
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import ledger, prices
from cluster.errors import ObjectExists, StoreUnreachable
from cluster.folder import FolderStore
from cluster.ledger import Entry, Line, Price, Spent
from cluster.meter import Meter
from cluster.objects import ObjectInfo
from cluster.place import ClusterConfig, Prices

NOON_MS = ledger.to_ms("2026-03-26T12:00:00.000Z")
DAY_MS = 24 * 3_600_000

PRICES = st.none() | st.builds(Price, usd_per_hour=st.decimals(0, 100, places=4), basis=st.just("test"))
LINES = st.lists(
    st.builds(
        Line,
        holder=st.sampled_from(["worker", "driver"]),
        resource=st.sampled_from(["GPU", "CPU"]),
        type=st.none(),
        market=st.sampled_from([None, "spot", "on-demand"]),
        amount=st.decimals("0.1", 512, places=1),
        price=PRICES,
    ),
    max_size=4,
)
HOURS = st.integers(0, 30 * 3_600_000)


class Clock:
    """Seconds that pass when it is told so."""

    def __init__(self) -> None:
        self.ms = 0

    def __call__(self) -> float:
        return self.ms / 1000


class Unsteady(FolderStore):
    """A folder whose writes fail half the time, before or after they were done, until it is mended."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        super().__init__(folder)
        self.chance: random.Random | None = chance

    def create(self, key: str, data: bytes) -> None:
        fate = self.chance.random() if self.chance else 1.0
        if fate < 0.25:
            raise StoreUnreachable("before it was written")
        super().create(key, data)
        if fate < 0.5:
            raise StoreUnreachable("after it was written")


def meter(clock: Clock, driver: str = "d") -> Meter:
    return Meter("r", "ann", None, driver, clock=clock, started_ms=NOON_MS)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(LINES, HOURS, st.lists(HOURS, max_size=4)), max_size=5),
    st.randoms(use_true_random=False),
)
def test_however_time_is_cut_and_the_store_fails_the_total_is_the_same(
    held: list[tuple[list[Line], int, list[int]]], chance: random.Random
) -> None:
    """Periods of what is held, each with its length and cuts; entries that are on one day, without gap or overlap."""
    with TemporaryDirectory() as folder:
        clock, store = Clock(), Unsteady(Path(folder), chance)
        metered = meter(clock)
        began, expected = 0, Spent()
        for lines, length, cuts in held:
            metered.hold(lines)
            expected += ledger.spent_in(length, lines) if lines else Spent()
            for cut in sorted(cut for cut in cuts if cut < length):
                clock.ms = began + cut
                metered.cut()
                try_to_save(metered, store)
            began = clock.ms = began + length
        assert metered.spent() == expected
        metered.hold([])
        store.chance = None
        metered.save(store)
        entries = ledger.read_all(store)
        assert ledger.total(entries) == expected == metered.spent()
        assert all(entry.ms > 0 for entry in entries)
        assert all(one.until <= other.since for one, other in pairwise(entries))
        ends = [(ledger.to_ms(entry.since), ledger.to_ms(entry.until) - 1) for entry in entries]
        assert all(first // DAY_MS == last // DAY_MS for first, last in ends)
        assert sum(ledger.by(entries, "day").values(), Spent()) == expected
        assert sum((spent for _, spent in ledger.by_line(entries)), Spent()).known_usd == expected.known_usd


def try_to_save(metered: Meter, store: Unsteady) -> None:
    try:
        metered.save(store)
    except StoreUnreachable:
        return


def test_money_is_exact() -> None:
    """A third of a cent and its like: binary fractions and rounded entries would both be off."""
    line = one(price=Price(usd_per_hour=Decimal("0.01"), basis="test"))
    thirds = sum((ledger.spent_in(1_200_000, [line]) for _ in range(3)), Spent())
    assert thirds.known_usd == Fraction(1, 100)
    assert sum((ledger.spent_in(1, [line]) for _ in range(3_600)), Spent()).known_usd == Fraction(1, 100_000)


def one(**changes: object) -> Line:
    plain = Line(holder="worker", resource="GPU", type="H100", market="spot", amount=Decimal(1), price=None)
    return plain.model_copy(update=changes)


def test_drivers_of_one_run_never_write_the_same_entry(tmp_path: Path) -> None:
    """As when a driver is taken for lost, and goes on for a while beside the one that took its run."""
    store = FolderStore(tmp_path)
    line = one()

    def drive(name: str) -> None:
        clock = Clock()
        metered = meter(clock, name)
        metered.hold([line])
        for second in range(1, 51):
            clock.ms = 1000 * second
            metered.cut()
            metered.save(store)

    threads = [threading.Thread(target=drive, args=(f"driver-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = ledger.read_run(store, "r", "2026-03-26", "2026-03-26")
    assert len(entries) == 200
    assert ledger.total(entries).gpu_ms == 200_000
    with pytest.raises(ObjectExists):
        store.create(next(store.list("usage/")).key, b"changed")


def test_workers_count_from_their_placement_but_never_from_before_what_was_counted_already() -> None:
    clock = Clock()
    metered = meter(clock)
    clock.ms = 10_000
    metered.hold([one()], NOON_MS + 4_000)  # seen six seconds late
    clock.ms = 20_000
    metered.hold([])
    assert metered.spent().held_ms == 16_000
    metered.hold([one()], NOON_MS + 15_000)  # another machine's clock is behind
    clock.ms = 30_000
    assert metered.spent().held_ms == 26_000
    metered.hold([one()], NOON_MS + 99_000)  # or before
    assert metered.spent().held_ms == 26_000


def test_what_has_no_price_is_unknown_and_not_free() -> None:
    free, unknown, dear = (
        ledger.spent_in(3_600_000, lines)
        for lines in ([one(price=Price(usd_per_hour=Decimal(0), basis="own"))], [one()], [one(), priced(2, "3.5")])
    )
    assert (free.usd, free.is_whole) == (0.0, True)
    assert (unknown.usd, unknown.is_whole) == (None, False)
    assert (dear.usd, dear.is_whole) == (7.0, False)
    assert dear.to_dict()["unpriced"] == {"gpu": pytest.approx(1 / 3), "cpu": 0.0}
    assert ledger.in_words(unknown).startswith("1.00 GPU-hours; USD not known")
    assert ledger.in_words(dear) == "3.00 GPU-hours; $7.00 and what has no price"
    assert Spent().usd == 0.0


def priced(amount: int, usd: str) -> Line:
    return one(amount=Decimal(amount), price=Price(usd_per_hour=Decimal(usd), basis="test"))


GPU = ClusterConfig(name="fast", accelerator="gpu", gpu="h100-80gb", cpus_per_worker=8, memory_gb_per_worker=79)
WORKER = {"GPU": 1.0, "CPU": 8.0}
NODES = [{"ray.io/market-type": "spot", "ray.io/accelerator-type": "H100"}, {"ray.io/market-type": "on-demand"}, {}]


def paid(own: Prices, nodes: Sequence[dict[str, str]] = NODES) -> dict[str | None, str]:
    """Of a GPU on each market: its price, and where that is from."""
    lines = prices.lines("worker", [(WORKER, node) for node in nodes], GPU.model_copy(update={"prices": own}))
    return {
        line.market: f"{line.price.usd_per_hour} {line.price.basis}" if line.price else "unknown"
        for line in lines
        if line.resource == "GPU"
    }


def test_a_price_is_the_clusters_own_or_the_dearest_list_price_and_says_so() -> None:
    listed = paid(Prices())
    assert listed[None].startswith("6.88 h100-80gb: AWS p5.48xlarge us-east-1, list price read on 2026-11-09 at https:")
    assert listed["spot"] == f"{listed[None]}, since no spot price is known"
    own = paid(Prices(gpu=2.5, gpu_spot=1.25))
    assert own["on-demand"] == own[None] == "2.5 prices of cluster fast: gpu"
    assert own["spot"] == "1.25 prices of cluster fast: gpu_spot"
    assert paid(Prices(gpu=0.1))["spot"] == "0.1 prices of cluster fast: gpu, since no spot price is known"


def test_the_cores_of_a_gpu_worker_are_in_its_price_and_no_others() -> None:
    lines = prices.lines("worker", [(WORKER, NODES[0])] * 2, GPU)
    assert [(line.resource, line.type, line.amount) for line in lines] == [("GPU", "H100", 2), ("CPU", "H100", 16)]
    assert ledger.spent_in(3_600_000, lines).known_usd == Fraction("13.76")
    assert ledger.spent_in(3_600_000, lines).is_whole
    alone = prices.lines("driver", [({"CPU": 1.0}, {})], GPU)
    assert [(line.resource, line.price) for line in alone] == [("CPU", None)]
    assert prices.lines("driver", [({"CPU": 0.0}, {})], GPU) == []
    unlisted = GPU.model_copy(update={"gpu": None})
    assert not any(line.price for line in prices.lines("worker", [(WORKER, {})], unlisted))


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, []),
        ({"gpu": "l4-24gb"}, ["cluster.prices.gpu"]),  # in the table, without a price
        ({"gpu": None, "prices": Prices(gpu=1)}, []),
        ({"gpu": None, "prices": Prices(gpu_spot=1)}, ["cluster.prices.gpu"]),
        ({"driver_cpus": 1.0}, ["cluster.prices.cpu"]),
        ({"accelerator": "cpu"}, ["cluster.prices.cpu"]),
        ({"accelerator": "cpu", "prices": Prices(cpu=0.0)}, []),
    ],
)
def test_what_a_limit_in_money_would_miss_is_known_beforehand(changes: dict[str, object], missing: list[str]) -> None:
    assert prices.unknown(GPU.model_copy(update=changes)) == missing


def write(store: FolderStore, run: str, user: str, project: str | None, day: int, lines: Sequence[Line]) -> None:
    clock = Clock()
    metered = Meter(run, user, project, "d", clock=clock, started_ms=NOON_MS + day * DAY_MS)
    metered.hold(lines)
    clock.ms = 3_600_000
    metered.hold([])
    metered.save(store)


def test_the_command_sums_by_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.cli import app

    store = FolderStore(tmp_path)
    write(store, "one", "ann", "acme", 0, [priced(8, "2")])
    write(store, "two", "ann", None, 1, [one(amount=Decimal(3))])
    write(store, "three", "bob", "acme", 2, [priced(1, "4"), one(resource="CPU", amount=Decimal(2))])
    store.create("usage/2026-03-26/tenants/t/0001.json", b"not ours")

    def asked(*options: str) -> dict[str, tuple[float, float | None]]:
        app(["costs", "--store", store.url, "--json", *options], standalone_mode=False)
        rows = json.loads(capsys.readouterr().out)
        return {next(iter(row.values())): (row["gpu_hours"], row["usd"]) for row in rows}

    assert asked() == {"one": (8.0, 16.0), "three": (1.0, 4.0), "two": (3.0, None)}
    assert asked("--by", "user") == {"ann": (11.0, 16.0), "bob": (1.0, 4.0)}
    assert asked("--by", "project") == {"": (3.0, None), "acme": (9.0, 20.0)}
    assert asked("--by", "day", "--since", "2026-03-27") == {"2026-03-27": (3.0, None), "2026-03-28": (1.0, 4.0)}
    assert asked("--until", "2026-03-26") == {"one": (8.0, 16.0)}
    app(["costs", "--store", store.url, "--by", "user"], standalone_mode=False)
    assert "100% of CPU" in capsys.readouterr().out


def test_entries_of_other_days_are_not_read(tmp_path: Path) -> None:
    """A run's entries are looked for by day, so that reading one run does not read all."""

    listed = []

    class Counting(FolderStore):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            listed.append(prefix)
            return super().list(prefix)

    store = Counting(tmp_path)
    write(store, "one", "ann", None, 0, [one()])
    write(store, "one", "ann", None, 3, [one()])
    assert len(ledger.read_run(store, "one", "2026-03-26", "2026-03-27")) == 1
    assert listed == ["usage/2026-03-26/runs/one/", "usage/2026-03-27/runs/one/"]


def test_an_entry_reads_as_what_it_is(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    write(store, "one", "ann", "acme", 0, [priced(8, "2.50")])
    (item,) = store.list("usage/")
    assert item.key == "usage/2026-03-26/runs/one/d-000001.json"
    told = json.loads(store.get(item.key))
    assert (told["since"], told["until"]) == ("2026-03-26T12:00:00.000Z", "2026-03-26T13:00:00.000Z")
    assert (told["user"], told["project"], told["lines"][0]["price"]["usd_per_hour"]) == ("ann", "acme", "2.50")
    assert Entry.model_validate_json(json.dumps(told)).ms == 3_600_000
