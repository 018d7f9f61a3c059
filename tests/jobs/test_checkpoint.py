"""Checkpoints that somebody changed by hand, or that the model would not fit: passed over, with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import keys
from cluster.errors import InputError, RunFailed
from cluster.folder import FolderStore
from cluster.records import BaseModelRef, RunRecord, now
from cluster.store import Store
from jobs import checkpoint, runs
from jobs.checkpoint import Retention
from tests.jobs.savers import save, value_of

RUN = "changed"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    made = FolderStore(tmp_path / "store")
    for step in (2, 4):
        save(made, RUN, step, float(step))
    return made


def change(store: Store, **fields: Any) -> None:
    key = keys.checkpoint_manifest(RUN, 4)
    store.put(key, json.dumps({**json.loads(store.get(key)), **fields}).encode())


CHANGES: dict[str, tuple[Callable[[Store], None], str]] = {
    "another step": (lambda store: change(store, step=999), "is of run changed, step 999"),
    "another run": (lambda store: change(store, run_id="other"), "is of run other, step 4"),
    "no shards": (lambda store: change(store, files=[]), "weight of w has 0 elements, and the model trains 64"),
    "no JSON": (lambda store: store.put(keys.checkpoint_manifest(RUN, 4), b"{"), "Invalid JSON"),
    "a key too few": (lambda store: store.put(keys.checkpoint_manifest(RUN, 4), b"{}"), "run_id: Field required"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_changed_manifest_is_passed_over_and_says_why(store: Store, changed: str) -> None:
    do, why = CHANGES[changed]
    do(store)
    found = checkpoint.newest_whole(store, RUN, {"w": 64})
    assert found.restored
    assert value_of(found.restored) == 2.0
    (reason,) = found.passed_over
    assert reason.startswith("checkpoint 4 cannot be used: ")
    assert why in reason
    assert "\n" not in reason


def test_a_checkpoint_that_lacks_something_is_passed_over(store: Store) -> None:
    found = checkpoint.newest_whole(store, RUN, {"w": 65})
    assert found.restored is None
    assert len(found.passed_over) == 2


@pytest.mark.parametrize("trained", [{"v": 64}, {"w": 32}, {}])
def test_a_checkpoint_of_another_model_ends_the_attempt(store: Store, trained: dict[str, int]) -> None:
    """Passed over, it was collected after the new attempt's first commit: a night's work, because of an upgrade."""
    with pytest.raises(RunFailed, match=r"checkpoint 4: weight of w has 64 .* another model, method or release"):
        checkpoint.newest_whole(store, RUN, trained)


@pytest.mark.parametrize("damage", ["shard", "manifest"])
def test_what_was_passed_over_takes_no_place_of_those_to_come(store: Store, damage: str) -> None:
    """Every new checkpoint once went at once, because the damaged newer one was kept in its stead."""
    key = next(
        item.key for item in store.list(keys.checkpoint_prefix(RUN, 4)) if damage.removesuffix("shard") in item.key
    )
    store.put(key, store.get(key)[:-1])
    save(store, RUN, 3, 3.0, retention=Retention(last=1))
    assert runs.checkpoint_steps(store, RUN) == [3]
    found = checkpoint.newest_whole(store, RUN).restored
    assert found
    assert value_of(found) == 3.0


def test_a_damaged_start_is_refused_before_there_is_a_run(store: Store) -> None:
    base = BaseModelRef(name="m", revision="r", licence="apache-2.0")
    record = RunRecord(
        run_id=RUN, recipe={}, dataset="d", evaluation=None, code_revision="c", versions={}, base=base, created_at=now()
    )
    store.create(keys.run_record(RUN), record.to_bytes())
    key = next(item.key for item in store.list(keys.checkpoint_prefix(RUN, 4)) if "state" in item.key)
    store.put(key, store.get(key)[:-1])
    with pytest.raises(InputError, match=f"has .* bytes, and its manifest says .*; name another: from={RUN}@2"):
        runs.find_checkpoint(store, RUN)
    assert runs.find_checkpoint(store, f"{RUN}@2").step == 2


def test_an_id_that_can_be_none_is_no_run(store: Store) -> None:
    for run_id in ("a\nb", "a\x01", "x" * 300, "../x", "..", ""):
        with pytest.raises(InputError, match="no run"):
            runs.find(store, run_id)
