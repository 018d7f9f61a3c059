"""Checkpoints cut off, damaged or half deleted: a run goes on from the last one that is whole, and says why."""

import random
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from cluster import keys, records
from cluster.errors import RunFailed, StoreUnreachable
from cluster.folder import FolderStore
from cluster.patient import PatientStore
from cluster.records import CheckpointManifest
from cluster.s3 import Patience, S3Store
from cluster.store import Store
from jobs import checkpoint, runs
from jobs.checkpoint import Retention
from jobs.progress import Board
from jobs.saver import Position, Saver
from tests.faults.proxy import Proxy
from tests.jobs.savers import EVERYTHING, Share, save, value_of
from tests.servers import S3Server, aws_env

ONCE = Patience(max_attempts=1, connect_timeout_s=5.0, read_timeout_s=30.0)
COUNT = 40_000


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[Proxy]:
    with Proxy(s3.host, s3.port) as opened:
        yield opened


def test_an_upload_cut_anywhere_leaves_the_last_commit(
    s3: S3Server, proxy: Proxy, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 random offsets over shards, attempt and manifest; every connection is cut there, so no retry helps."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    direct = S3Store(s3.bucket, "torn")
    endpoint = f"http://127.0.0.1:{proxy.port}"
    for name, value in aws_env(endpoint, s3.access_key, s3.secret_key).items():
        monkeypatch.setenv(name, value)
    through = PatientStore(S3Store(s3.bucket, "torn", ONCE), limit_s=0.0)
    save(direct, run_id, 1, 1.0, world_size=2, count=COUNT)
    chance = random.Random(3)
    bytes_of_a_shard = 12 * COUNT // 2
    for trial in range(50):
        proxy.cut("up", after_bytes=chance.randrange(bytes_of_a_shard), times=None)
        with pytest.raises(StoreUnreachable):
            save(through, run_id, 2, 2.0, world_size=2, count=COUNT)
        assert proxy.fired > trial
        found = checkpoint.newest_whole(direct, run_id)
        assert found.restored
        assert (found.restored.next_step, value_of(found.restored, COUNT)) == (1, 1.0)
    proxy.heal()
    save(through, run_id, 2, 2.0, world_size=2, count=COUNT)
    found = checkpoint.newest_whole(direct, run_id)
    assert found.restored
    assert (found.restored.next_step, value_of(found.restored, COUNT)) == (2, 2.0)
    checkpoint.collect(direct, run_id, Retention(last=1))
    left = [item.key for item in direct.list(keys.checkpoints_prefix(run_id))]
    assert len(left) == 3, "two shards and a manifest, and nothing of the attempts that were cut"


def shards(store: Store, run_id: str, step: int) -> list[str]:
    manifest = records.read(store, keys.checkpoint_manifest(run_id, step), CheckpointManifest)
    return [keys.checkpoint_prefix(run_id, step) + file.file for file in manifest.files]


@pytest.mark.parametrize("fault", ["a byte changed", "cut short", "gone", "another's bytes"])
def test_each_damaged_shard_sends_the_run_back_to_the_one_before(anywhere: Store, run_id: str, fault: str) -> None:
    for step in (1, 2, 3):
        save(anywhere, run_id, step, float(step), world_size=2)
    for step, expected in ((3, 2), (2, 1), (1, None)):
        for key in shards(anywhere, run_id, step):
            whole = anywhere.get(key)
            if fault == "gone":
                anywhere.delete(key)
            else:
                changed = whole[:-1] + bytes([whole[-1] ^ 1])
                other = whole[:-4] + b"\x00\x00\xc0\x7f"
                anywhere.put(key, {"a byte changed": changed, "cut short": whole[:-5]}.get(fault, other))
            found = checkpoint.newest_whole(anywhere, run_id)
            assert (found.restored.next_step if found.restored else None) == expected
            assert any(key.split("/")[-1] in reason and f"checkpoint {step}" in reason for reason in found.passed_over)
            if key != shards(anywhere, run_id, step)[-1]:
                anywhere.put(key, whole)


def test_a_manifest_that_cannot_be_read_is_passed_over_and_deletes_nothing(anywhere: Store, run_id: str) -> None:
    for step in (1, 2):
        save(anywhere, run_id, step, float(step))
    anywhere.put(keys.checkpoint_manifest(run_id, 2), b"{")
    found = checkpoint.newest_whole(anywhere, run_id)
    assert found.restored
    assert found.restored.next_step == 1
    assert "checkpoint 2 cannot be used" in found.passed_over[0]
    assert checkpoint.collect(anywhere, run_id, Retention(last=1)) == []


def test_an_attempt_that_was_replaced_commits_nothing(anywhere: Store, run_id: str) -> None:
    old = runs.begin_attempt(anywhere, run_id, 0, 1, 1)
    saver = Saver(Share(0, 1, 64, 1.0), anywhere, run_id, old, 0, Board(), EVERYTHING)
    runs.begin_attempt(anywhere, run_id, 0, 1, 1)
    saver.begin(Position(1, 1, 1, None))
    with pytest.raises(RunFailed, match="a later one has taken its place"):
        saver.close()
    assert runs.checkpoint_steps(anywhere, run_id) == []


def test_retention_keeps_the_last_the_best_and_every_nth(anywhere: Store, run_id: str) -> None:
    keep = Retention(last=2, best=1, every=4)
    for step, loss in enumerate([5.0, 3.0, 1.0, 2.0, 4.0, 3.5, 3.6, 3.7, 3.8], start=1):
        save(anywhere, run_id, step, loss, retention=keep)
    assert runs.checkpoint_steps(anywhere, run_id) == [3, 4, 8, 9]
    assert {item.key.split("/")[3] for item in anywhere.list(keys.checkpoints_prefix(run_id))} == {
        f"{step:08d}" for step in (3, 4, 8, 9)
    }


@pytest.fixture
def run_id() -> str:
    """Another one for each test, as for each run: a node keeps what it has verified of a run's checkpoints."""
    return uuid4().hex


@pytest.fixture
def anywhere(tmp_path: Path) -> Store:
    """A folder will do where no network is in the way."""
    return FolderStore(tmp_path / "store")
