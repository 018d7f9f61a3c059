"""The queue of a shared cluster, on a clock of our own: fair, whole, and never more than there is."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.queue import LOST_S, NEW_S, Queue, Ticket, fits

ONE = {"CPU": 1.0}


class World:
    """Jobs that ask every second, run for a while once they are in, and leave."""

    def __init__(self, nodes: list[dict[str, float]]) -> None:
        self.now = 0.0
        self.nodes = nodes
        self.queue = Queue(lambda: self.now)
        self.now = NEW_S  # it lets nobody in before
        self.jobs: dict[str, tuple[Ticket, float]] = {}  # with the seconds that are left to do
        self.running: set[str] = set()
        self.had: dict[str, float] = defaultdict(float)
        self.started: list[str] = []

    def submit(self, ticket: Ticket, seconds: float) -> None:
        self.jobs[ticket.id] = (ticket, seconds)

    def step(self) -> None:
        """A second."""
        for name, (ticket, _) in list(self.jobs.items()):
            if self.queue.ask(ticket, self.nodes, name in self.running).is_in and name not in self.running:
                self.running.add(name)
                self.started.append(name)
        assert fits([self.jobs[name][0] for name in self.running], self.nodes)
        self.now += 1
        for name in list(self.running):
            ticket, left = self.jobs[name]
            self.had[ticket.user] += ticket.weight
            self.jobs[name] = (ticket, left - 1)
            if left <= 1:
                del self.jobs[name]
                self.running.discard(name)
                self.queue.leave(name)


def test_two_users_with_three_jobs_each_get_the_same_whoever_came_first() -> None:
    world = World([{"CPU": 2.0}])
    for user in ("ann", "bob"):
        for number in range(3):
            world.submit(Ticket(f"{user}-{number}", user, 1, ONE), 60)
    shares = []
    while world.jobs:
        world.step()
        if {ticket.user for ticket, _ in world.jobs.values()} == {"ann", "bob"}:
            shares.append(world.had["ann"] / (world.had["ann"] + world.had["bob"]))
    assert world.now == NEW_S + 180
    assert shares[-1] == pytest.approx(0.5, abs=0.05)
    assert world.started == ["ann-0", "ann-1", "bob-0", "bob-1", "ann-2", "bob-2"]  # nobody else was there at first


def test_two_places_that_come_free_at_once_go_to_two_users() -> None:
    world = World([{"CPU": 2.0}])
    world.submit(Ticket("whole", "cat", 2, ONE), 5)
    world.step()
    for user in ("ann", "bob"):
        for number in range(2):
            world.submit(Ticket(f"{user}-{number}", user, 1, ONE), 5)
    while world.jobs:
        world.step()
    assert world.started == ["whole", "ann-0", "bob-0", "ann-1", "bob-1"]


def test_priority_goes_first_and_does_not_push_out_what_runs() -> None:
    world = World([ONE])
    world.submit(Ticket("first", "ann", 1, ONE), 5)
    world.step()
    world.submit(Ticket("usual", "bob", 1, ONE), 5)
    world.submit(Ticket("urgent", "ann", 1, ONE, priority=1), 5)
    while world.jobs:
        world.step()
    assert world.started == ["first", "urgent", "usual"]


def test_a_large_job_is_not_passed_by_small_ones_for_ever() -> None:
    world = World([{"CPU": 2.0}, {"CPU": 2.0}])
    for number in range(4):
        world.submit(Ticket(f"small-{number}", "ann", 1, ONE), 10 + number)
    world.step()
    world.submit(Ticket("large", "bob", 4, ONE), 5)
    world.step()
    for number in range(4, 40):
        world.submit(Ticket(f"small-{number}", "ann", 1, ONE), 10)
    for _ in range(30):
        world.step()
    assert world.started.index("large") == 4


def test_a_job_whose_driver_died_gives_its_place_back() -> None:
    world = World([ONE])
    assert world.queue.ask(Ticket("dead", "ann", 1, ONE), [ONE]).is_in
    waits = Ticket("waits", "bob", 1, ONE)
    answer = world.queue.ask(waits, [ONE])
    assert (answer.is_in, answer.ahead) == (False, 0)
    assert "dead" in answer.why
    for _ in range(int(LOST_S) + 2):
        world.now += 1
        answer = world.queue.ask(waits, [ONE])
    assert answer.is_in


def test_a_queue_that_has_restarted_learns_who_is_in_before_it_lets_others_in() -> None:
    now = [0.0]
    queue = Queue(lambda: now[0])
    waits, runs = Ticket("waits", "bob", 1, ONE), Ticket("runs", "ann", 1, ONE)
    assert not queue.ask(waits, [ONE]).is_in
    assert queue.ask(runs, [ONE], is_in=True).is_in
    now[0] = NEW_S
    assert not queue.ask(waits, [ONE]).is_in
    queue.leave("runs")
    assert queue.ask(waits, [ONE]).is_in


def test_who_was_away_has_not_saved_up_turns() -> None:
    world = World([ONE])
    for number in range(30):
        world.submit(Ticket(f"ann-{number}", "ann", 1, ONE), 10)
    for _ in range(100):
        world.step()
    for number in range(30):
        world.submit(Ticket(f"bob-{number}", "bob", 1, ONE), 10)
    before = dict(world.had)
    for _ in range(200):
        world.step()
    assert world.had["ann"] - before["ann"] == pytest.approx(100, abs=10)


Job = st.tuples(
    st.sampled_from("abc"), st.integers(1, 4), st.sampled_from([1.0, 2.0]), st.integers(1, 9), st.integers(0, 2)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(Job, max_size=2), max_size=25))
def test_whatever_comes_all_of_it_runs_and_never_more_than_fits(
    arrivals: list[list[tuple[str, int, float, int, int]]],
) -> None:
    world = World([{"CPU": 4.0}, {"CPU": 4.0}])
    count = 0
    for jobs in arrivals:
        for user, workers, cpus, seconds, priority in jobs:
            count += 1
            world.submit(Ticket(f"{user}-{count}", user, workers, {"CPU": cpus}, priority), seconds)
        world.step()
    while world.jobs:
        world.step()
        assert world.now < NEW_S + 100 + 10 * count
    assert len(world.started) == count


def test_workers_fit_only_where_a_node_has_room_for_each() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0}]
    assert fits([Ticket("a", "u", 1, {"CPU": 2.0, "GPU": 1.0}), Ticket("b", "u", 2, {"CPU": 2.0})], nodes)
    assert not fits([Ticket("a", "u", 1, {"CPU": 5.0})], nodes)
    assert not fits([Ticket("a", "u", 3, {"CPU": 3.0})], nodes)
    assert not fits([Ticket("a", "u", 2, {"GPU": 1.0})], nodes)
