"""Two people on a shared cluster, real jobs of both: what each had of it while both wanted it.

All six jobs wait before the first is let in, ann's three ahead of bob's. In the order of their coming, ann would have
had three of the first four.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from cluster.nodes import LocalCluster
from cluster.records import ENDED
from cluster.store import Store, open_store
from jobs import runs
from tests.conftest import TinyModels
from tests.e2e.submit import DEADLINE_S, luthier, start, until, write_recipe

pytestmark = pytest.mark.long
USERS = ("ann", "bob")
ROUNDED_S = 1.0  # the store's times are whole seconds


@dataclass(frozen=True)
class Held:
    """A job's time on the cluster, from its turn to its end, in seconds since the epoch."""

    user: str
    began: float
    ended: float
    cpus: int

    def until(self, when: float) -> float:
        """CPU-seconds that it has had by then."""
        return self.cpus * max(0.0, min(self.ended, when) - self.began)


class Shared:
    """A cluster of two CPUs that is held until six jobs of two people wait for it."""

    def __init__(self, cluster: LocalCluster, recipe: Path, folder: Path) -> None:
        self._cluster = cluster
        self._recipe = recipe
        self._file = folder / "go"
        self.store: Store = open_store(f"file://{folder}/store")

    def run(self, cpus: int, steps: dict[str, int]) -> list[Held]:
        """Three jobs of each, ann's first, to their ends."""
        holder = start(self._cluster, "tests.e2e.holder", str(self._file))
        assert holder.stdout
        assert any(line == "holds\n" for line in holder.stdout)  # until then it reads on
        for user in USERS:
            for number in range(3):
                self._submit(user, number, cpus, steps[user])
            until(lambda user=user: self._count(user, "waiting for its turn") == 3, holder)  # type: ignore[misc]
        self._file.touch()
        holder.communicate()
        assert holder.returncode == 0
        deadline = time.monotonic() + 2 * DEADLINE_S
        while not all(found.state in ENDED for found in self._runs()):
            assert time.monotonic() < deadline, [found.events[-1].text for found in self._runs()]
            time.sleep(0.5)
        assert [found.state for found in self._runs()] == ["succeeded"] * 6
        return sorted((_held(found) for found in self._runs()), key=lambda held: held.began)

    def _submit(self, user: str, number: int, cpus: int, steps: int) -> None:
        settings = [f"store={self.store.url}", f"train.steps={steps}", f"train.seed={number}", "publish=null"]
        places = ["cluster.shared=true", f"cluster.cpus_per_worker={cpus}"]
        process = luthier(self._cluster, "submit", str(self._recipe), *settings, *places, "--detach", LOGNAME=user)
        out, err = process.communicate()
        assert process.returncode == 0, out + err

    def _runs(self) -> list[runs.Run]:
        return [runs.find(self.store, run_id) for run_id in runs.run_ids(self.store)]

    def _count(self, user: str, text: str) -> int:
        return sum(
            _user(found) == user and any(event.text.startswith(text) for event in found.events)
            for found in self._runs()
        )


def _user(run: runs.Run) -> str:
    return next(event.text for event in run.events if event.text.startswith("submitted by")).split()[2].rstrip(";")


def _held(run: runs.Run) -> Held:
    began = next(event.at for event in run.events if event.text.startswith("its turn came"))
    ended = next(event.at for event in run.events if event.state in ENDED)
    seconds = [datetime.fromisoformat(at).timestamp() for at in (began, ended)]
    return Held(_user(run), *seconds, run.record.recipe["cluster"]["cpus_per_worker"])


def had(held: list[Held], when: float) -> dict[str, float]:
    """CPU-seconds of each by then."""
    return {user: sum(each.until(when) for each in held if each.user == user) for user in USERS}


def contended_until(held: list[Held]) -> float:
    """When one of them had nothing left that waited or ran."""
    return min(max(each.ended for each in held if each.user == user) for user in USERS)


@pytest.fixture(scope="module")
def cluster(cache: Path) -> Iterator[LocalCluster]:
    variables = {"LUTHIER_CACHE": str(cache), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    with LocalCluster(head_cpus=2, variables=variables) as cluster:
        yield cluster


@pytest.fixture
def shared(cluster: LocalCluster, tiny_models: TinyModels, rows: Path, tmp_path: Path) -> Shared:
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="shares", store=f"file://{tmp_path}/store")
    return Shared(cluster, recipe, tmp_path)


def test_two_people_with_three_jobs_each_have_the_same(shared: Shared) -> None:
    """Two jobs at a time."""
    held = shared.run(cpus=1, steps={"ann": 40, "bob": 40})
    print([(each.user, each.began - held[0].began, each.ended - held[0].began) for each in held])
    seconds = had(held, contended_until(held))
    print(seconds)
    assert {each.user for each in held[:2]} == set(USERS)
    assert min(seconds.values()) >= 0.9 * max(seconds.values()), seconds


def test_jobs_of_other_lengths_never_put_one_ahead_by_more_than_a_job(shared: Shared) -> None:
    """One job at a time, on both CPUs. Nothing that runs is interrupted: a job's length is all that can be kept to."""
    held = shared.run(cpus=2, steps={"ann": 340, "bob": 40})
    print([(each.user, each.began - held[0].began, each.ended - held[0].began) for each in held])
    lengths = {user: [each.cpus * (each.ended - each.began) for each in held if each.user == user] for user in USERS}
    assert sum(lengths["ann"]) > 1.5 * sum(lengths["bob"]), lengths
    allowed = max(lengths["ann"]) + 2 * ROUNDED_S * len(held)
    for when in [each.ended for each in held if each.ended <= contended_until(held)]:
        seconds = had(held, when)
        print(f"after {when - held[0].began:.0f} s:", seconds)
        assert abs(seconds["ann"] - seconds["bob"]) <= allowed, (seconds, lengths)
