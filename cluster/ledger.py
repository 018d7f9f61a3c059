"""The cost ledger: what runs have held, for how long and at what price, as entries in the store that never change.

    usage/<day>/runs/<run_id>/<driver>-<number>.json

An entry says what one driver's run held, the same all the time from `since` to `until`. Times are whole milliseconds
and sums are fractions, so that it makes no difference how a time is cut into entries: the total is the same to the
last digit. Money is made of the prices in the entries when it is asked for, so a price that changes later changes
nothing of what was spent.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, Self

from pydantic import Field

from cluster import keys, records
from cluster.records import Record
from cluster.store import Store

MS_PER_HOUR = 3_600_000
UNLABELLED = "unlabelled"
"""The market of nodes that do not say theirs."""

_READERS = 16

Holder = Literal["worker", "driver"]
Resource = Literal["GPU", "CPU"]
By = Literal["run", "user", "project", "day"]


class Price(Record):
    """US dollars for an hour of one GPU or one core, and where the figure is from."""

    usd_per_hour: Decimal = Field(ge=0)
    basis: str


class Line(Record):
    """So many of a resource on nodes of one kind. `type` is a GPU's; `market` is None on nodes without that label."""

    holder: Holder
    resource: Resource
    type: str | None
    market: str | None
    amount: Decimal = Field(gt=0)
    price: Price | None


class Entry(Record):
    """What a run held from `since` to `until` (UTC, to the millisecond), which lie on one day. `driver` is random."""

    run: str
    user: str
    project: str | None
    driver: str
    since: str
    until: str
    lines: tuple[Line, ...]

    @property
    def day(self) -> str:
        return self.since[:10]

    @property
    def ms(self) -> int:
        return to_ms(self.until) - to_ms(self.since)


def to_ms(at: str) -> int:
    """Milliseconds since 1970 of a time in a record."""
    return (datetime.fromisoformat(at) - datetime.fromtimestamp(0, UTC)) // timedelta(milliseconds=1)


def from_ms(at_ms: int) -> str:
    """The time as entries hold it."""
    at = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=at_ms)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at_ms % 1000:03d}Z"


@dataclass(frozen=True)
class Spent:
    """A sum over entries: time and money, exact.

    Attributes:
        held_ms: for how long workers were held, however many.
        gpu_ms, cpu_ms: one resource for a millisecond each; unpriced: those of them whose price is not known.
        known_usd: what all others cost.
    """

    held_ms: int = 0
    gpu_ms: Fraction = Fraction(0)
    cpu_ms: Fraction = Fraction(0)
    unpriced_gpu_ms: Fraction = Fraction(0)
    unpriced_cpu_ms: Fraction = Fraction(0)
    known_usd: Fraction = Fraction(0)

    def __add__(self, other: Self) -> "Spent":
        return Spent(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Spent)})

    @property
    def hours(self) -> float:
        return self.held_ms / MS_PER_HOUR

    @property
    def usd(self) -> float | None:
        """Of what has a price; None when nothing has one, though something was held."""
        held, unpriced = self.gpu_ms + self.cpu_ms, self.unpriced_gpu_ms + self.unpriced_cpu_ms
        return None if held and unpriced == held else float(self.known_usd)

    @property
    def is_whole(self) -> bool:
        """Whether everything has a price."""
        return not self.unpriced_gpu_ms and not self.unpriced_cpu_ms

    def to_dict(self) -> dict[str, Any]:
        """For scripts and tables; `unpriced` is the share of its hours, by resource."""
        return {
            "hours": self.hours,
            "gpu_hours": float(self.gpu_ms / MS_PER_HOUR),
            "cpu_hours": float(self.cpu_ms / MS_PER_HOUR),
            "usd": self.usd,
            "unpriced": {
                "gpu": float(self.unpriced_gpu_ms / self.gpu_ms) if self.gpu_ms else 0.0,
                "cpu": float(self.unpriced_cpu_ms / self.cpu_ms) if self.cpu_ms else 0.0,
            },
        }


def spent_in(ms: int, lines: Sequence[Line]) -> Spent:
    """What holding these lines for so long takes."""
    total = Spent(held_ms=ms if any(line.holder == "worker" for line in lines) else 0)
    for line in lines:
        amount = Fraction(line.amount) * ms
        unpriced = Fraction(0) if line.price else amount
        usd = amount * Fraction(line.price.usd_per_hour) / MS_PER_HOUR if line.price else Fraction(0)
        if line.resource == "GPU":
            total += Spent(gpu_ms=amount, unpriced_gpu_ms=unpriced, known_usd=usd)
        else:
            total += Spent(cpu_ms=amount, unpriced_cpu_ms=unpriced, known_usd=usd)
    return total


def total(entries: Iterable[Entry]) -> Spent:
    """The sum of all."""
    return sum((spent_in(entry.ms, entry.lines) for entry in entries), Spent())


def by(entries: Iterable[Entry], what: By) -> dict[str, Spent]:
    """Sums by run, user, project ("" without one) or day, in order."""
    sums: dict[str, Spent] = {}
    for entry in entries:
        name = getattr(entry, what) or ""
        sums[name] = sums.get(name, Spent()) + spent_in(entry.ms, entry.lines)
    return dict(sorted(sums.items()))


def by_line(entries: Iterable[Entry]) -> list[tuple[Line, Spent]]:
    """Sums of what is alike: holder, resource, type, market and price. The lines' amounts are of the first one."""
    sums: dict[tuple[Any, ...], tuple[Line, Spent]] = {}
    for entry in entries:
        for line in entry.lines:
            alike = (line.holder, line.resource, line.type, line.market, line.price)
            first, before = sums.get(alike, (line, Spent()))
            sums[alike] = first, before + spent_in(entry.ms, [line])
    return list(sums.values())


def by_market(entries: Iterable[Entry]) -> dict[str, Spent]:
    """Sums by market; "unlabelled" is what was held on nodes that do not say theirs."""
    sums: dict[str, Spent] = {}
    for entry in entries:
        for market in {line.market for line in entry.lines}:
            name = market or UNLABELLED
            there = [line for line in entry.lines if line.market == market]
            sums[name] = sums.get(name, Spent()) + spent_in(entry.ms, there)
    return dict(sorted(sums.items()))


def usd_per_hour(lines: Iterable[Line]) -> float | None:
    """What is being spent now; None when nothing of it has a price."""
    return spent_in(MS_PER_HOUR, list(lines)).usd


def in_words(spent: Spent) -> str:
    """A sum for a person, in one line."""
    figures = spent.to_dict()
    hours = {"GPU": figures["gpu_hours"], "CPU": figures["cpu_hours"]}
    held = [f"{figure(amount)} {resource}-hours" for resource, amount in hours.items() if amount]
    return f"{', '.join(held) or 'nothing was held'}; {money(spent)}"


def money(spent: Spent) -> str:
    """Dollars for a person, with what of it is not known."""
    if spent.usd is None:
        return "USD not known: no price (`prices:` of the cluster's file)"
    return f"${figure(spent.usd)}" + ("" if spent.is_whole else " and what has no price")


def figure(value: float) -> str:
    """Hours or dollars for a person: to a hundredth, or two digits where that would be nothing."""
    return f"{value:.2g}" if 0.0 < value < 0.1 else f"{value:,.2f}"


def days(since: str, until: str) -> Iterator[str]:
    """Each day from one to another, both among them."""
    first, last = date.fromisoformat(since), date.fromisoformat(until)
    return (str(first + timedelta(days=number)) for number in range((last - first).days + 1))


def read_run(store: Store, run_id: str, since: str, until: str) -> list[Entry]:
    """A run's entries from one day to another, both among them, in the order of time. Raises ObjectDamaged."""
    prefixes = [keys.run_usage_prefix(day, run_id) for day in days(since, until)]
    return _read(store, (item.key for prefix in prefixes for item in store.list(prefix)))


def read_all(store: Store, since: str | None = None, until: str | None = None) -> list[Entry]:
    """Every run's entries, from one day to another where these are given, in the order of time."""
    last = until or f"{datetime.now(UTC):%Y-%m-%d}"
    # With a first day the days before it are not even listed.
    prefixes = [keys.day_usage_prefix(day) for day in days(since, last)] if since else [keys.usage_prefix()]
    found = [(item.key, keys.run_of_usage(item.key)) for prefix in prefixes for item in store.list(prefix)]
    return _read(store, (key for key, of in found if of and (until is None or of[0] <= until)))


def _read(store: Store, found: Iterable[str]) -> list[Entry]:
    with ThreadPoolExecutor(_READERS, "ledger") as pool:
        entries = list(pool.map(lambda key: records.read(store, key, Entry), found))
    return sorted(entries, key=lambda entry: entry.since)
