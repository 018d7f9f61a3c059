"""Whose turn it is on a shared cluster: priority first, then whoever has had least, and whole jobs alone.

A job asks with what each of its workers needs; it is let in when all of them fit beside those that are in. Ray would
take every job at once and let it wait half-way, holding a driver and its data, in the order of chance.

The order: priority; then the user who has had the fewest resource-seconds (those of the jobs that run count as they
go); then who came first. A job that is next and does not fit yet holds up those behind it, or a large one would never
find room. A user who was away begins at the level of those who are there, so that nobody saves up turns.

`Queue` is one Ray actor on the head, without state that would be missed: whoever waits or runs asks again every few
seconds, so it is filled again soon after a head that has restarted, and forgets whoever has died.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

NAME, NAMESPACE = "queue", "luthier"
ASK_S = 2.0
LOST_S = 30.0
"""Without a word for so long, a job is taken for dead."""

NEW_S = 2 * ASK_S
"""For so long a queue lets nobody in, until it has heard from those that are in already."""

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Ticket:
    """What a job asks for.

    Attributes:
        workers: all of them at once, or none.
        each: what one worker needs, by Ray's names.
        priority: higher goes first.
    """

    id: str
    user: str
    workers: int
    each: Resources = field(hash=False)
    priority: int = 0

    @property
    def weight(self) -> float:
        """What it holds while it runs: GPUs, or CPUs where it takes none."""
        return self.workers * (self.each.get("GPU") or self.each.get("CPU", 0.0))


@dataclass(frozen=True)
class Answer:
    """Whether a job may start; if not, how many are before it and what it waits for."""

    is_in: bool
    ahead: int = 0
    why: str = ""


@dataclass(frozen=True)
class _Entry:
    ticket: Ticket
    number: int
    heard_at: float
    is_in: bool = False


class Queue:
    """The jobs that wait and those that are in."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._had: dict[str, float] = {}  # resource-seconds by user, of those who are here
        self._level = 0.0  # what the one let in last had had
        self._charged_at = clock()
        self._opens_at = clock() + NEW_S
        self._numbers = 0

    def ask(self, ticket: Ticket, nodes: Sequence[Resources] | None, is_in: bool = False) -> Answer:
        """A word of life from a job, and the answer to it.

        Args:
            nodes: what each node offers when it is empty, those that may yet come included; None: without end.
            is_in: it was let in before, and runs: by this it is known to a queue that has just been made.
        """
        self._tidy()
        now = self._clock()
        old = self._entries.get(ticket.id)
        if old is None:
            self._numbers += 1
            here = [self._had[entry.ticket.user] for entry in self._entries.values()]
            self._had[ticket.user] = max(self._had.get(ticket.user, 0.0), min(here, default=self._level))
        number = old.number if old else self._numbers
        self._entries[ticket.id] = _Entry(ticket, number, now, is_in or (old.is_in if old else False))
        self._let_in(nodes)
        if self._entries[ticket.id].is_in:
            return Answer(is_in=True)
        before = [entry.ticket for entry in self._order()]
        place = [each.id for each in before].index(ticket.id)
        if place:
            return Answer(False, place, f"before it: {', '.join(each.id for each in before[:place])}")
        if self._clock() < self._opens_at:
            return Answer(False, 0, "the queue is new, and listens for jobs that run already")
        running = ", ".join(entry.ticket.id for entry in self._entries.values() if entry.is_in) or "nothing"
        return Answer(False, 0, f"it is next, and its {ticket.workers} workers fit when one of these ends: {running}")

    def leave(self, ticket_id: str) -> None:
        """A job has ended, or no longer wants to start."""
        self._charge()
        self._entries.pop(ticket_id, None)

    def _let_in(self, nodes: Sequence[Resources] | None) -> None:
        if self._clock() < self._opens_at:
            return
        while waiting := self._order():  # anew after each: whoever was let in weighs for the next one's turn
            entry = waiting[0]
            inside = [each.ticket for each in self._entries.values() if each.is_in]
            if nodes is not None and not fits([*inside, entry.ticket], nodes):
                return
            self._level = self._had[entry.ticket.user]
            self._entries[entry.ticket.id] = replace(entry, is_in=True)

    def _order(self) -> list[_Entry]:
        """Those that wait. Of one user the jobs that are in weigh too, by a second each, or all would go in at once."""
        holds = dict.fromkeys(self._had, 0.0)
        for entry in self._entries.values():
            if entry.is_in:
                holds[entry.ticket.user] += entry.ticket.weight
        waiting = [entry for entry in self._entries.values() if not entry.is_in]
        return sorted(
            waiting,
            key=lambda entry: (
                -entry.ticket.priority,
                self._had[entry.ticket.user] + holds[entry.ticket.user],
                entry.number,
            ),
        )

    def _tidy(self) -> None:
        """Charge for the time that has passed, and forget the dead and those who are away."""
        self._charge()
        now = self._clock()
        self._entries = {name: entry for name, entry in self._entries.items() if now - entry.heard_at <= LOST_S}
        here = {entry.ticket.user for entry in self._entries.values()}
        self._had = {user: had for user, had in self._had.items() if user in here or had > self._level}

    def _charge(self) -> None:
        now = self._clock()
        passed_s, self._charged_at = now - self._charged_at, now
        for entry in self._entries.values():
            if entry.is_in:
                self._had[entry.ticket.user] += entry.ticket.weight * passed_s


def fits(tickets: Sequence[Ticket], nodes: Sequence[Resources]) -> bool:
    """Whether the workers of all these fit on the nodes: the largest first, each on the fullest node that takes it.

    Never wrong when it says yes; a packing that only a search would find is a no.
    """
    free = [dict(node) for node in nodes]
    workers = [ticket.each for ticket in tickets for _ in range(ticket.workers)]
    for each in sorted(workers, key=lambda each: (-each.get("GPU", 0.0), -each.get("CPU", 0.0))):
        able = [node for node in free if all(node.get(name, 0.0) >= amount for name, amount in each.items())]
        if not able:
            return False
        fullest = min(able, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
        for name, amount in each.items():
            fullest[name] = fullest.get(name, 0.0) - amount
    return True
