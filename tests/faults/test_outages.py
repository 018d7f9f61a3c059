"""A patient store in front of a server that goes away and comes back: nothing is lost, and each outage is told once."""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3.session
import pytest

from cluster.errors import (
    ConfigError,
    LuthierError,
    ObjectExists,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreUnreachable,
)
from cluster.folder import FolderStore
from cluster.objects import ObjectInfo
from cluster.patient import Outage, PatientStore
from cluster.s3 import Patience, S3Store
from tests.faults.proxy import Proxy
from tests.servers import S3Server, aws_env, shared

MIB = 1 << 20
ONCE = Patience(max_attempts=1, connect_timeout_s=5.0, read_timeout_s=30.0)
SHORT = (0.05, 0.2)
NEVER = (60.0, 60.0)  # a test in which such a pause is made fails by its clock
SOON_S = 20.0
THREADS = 4


class Line:
    """A proxy to a server, a patient store that sees it through the proxy, and the same store past it."""

    def __init__(self, server: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.proxy, self.prefix = server, proxy, f"outages/{uuid4().hex}"
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        self.direct = S3Store(server.bucket, self.prefix)
        endpoint = f"http://127.0.0.1:{proxy.port}"
        for name, value in aws_env(endpoint, server.access_key, server.secret_key).items():
            monkeypatch.setenv(name, value)
        self.told: list[Outage] = []
        self.store = self.patient()

    def patient(self, limit_s: float = 60.0, pauses: tuple[float, float] = SHORT, **more: Any) -> PatientStore:
        """A patient store that sees the AWS variables as they are now."""
        wrapped = S3Store(more.pop("bucket", self.server.bucket), self.prefix, ONCE)
        return PatientStore(wrapped, limit_s, self.told.append, pauses=pauses, **more)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    server = shared("ministack")
    with Proxy(server.host, server.port) as proxy:
        yield Line(server, proxy, monkeypatch)


@contextmanager
def after(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """`action` in a thread of its own, that long after the block has begun; it is done when the block is left."""
    timer = threading.Timer(seconds, action)
    timer.start()
    yield
    timer.join()


@contextmanager
def soon() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON_S


# --- the server is away ------------------------------------------------------------------------------------------


def memory_of(data: bytes) -> mmap:
    memory = mmap(-1, len(data))
    memory.write(data)
    return memory


BIG = random.Random(4).randbytes(20 * MIB)

CALLS: dict[str, Callable[[PatientStore, Path], object]] = {
    "create": lambda store, folder: store.create("new", b"created"),
    "put": lambda store, folder: store.put("new", b"put"),
    "get": lambda store, folder: store.get("old"),
    "list": lambda store, folder: [info.key for info in store.list("")],
    "delete": lambda store, folder: store.delete("old"),
    "exists": lambda store, folder: store.exists("old"),
    "upload": lambda store, folder: store.upload(folder / "source", "new"),
    "upload memory": lambda store, folder: store.upload(memory_of(BIG), "new"),
    "download": lambda store, folder: store.download("old", folder / "target"),
}

EFFECTS: dict[str, Callable[[S3Store, Path, object], bool]] = {
    "create": lambda store, folder, result: store.get("new") == b"created",
    "put": lambda store, folder, result: store.get("new") == b"put",
    "get": lambda store, folder, result: result == b"old",
    "list": lambda store, folder, result: result == ["old"],
    "delete": lambda store, folder, result: not store.exists("old"),
    "exists": lambda store, folder, result: result is True,
    "upload": lambda store, folder, result: store.get("new") == BIG,
    "upload memory": lambda store, folder, result: store.get("new") == BIG,
    "download": lambda store, folder, result: (folder / "target").read_bytes() == b"old",
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_sits_an_outage_out(line: Line, tmp_path: Path, name: str) -> None:
    line.direct.put("old", b"old")
    (tmp_path / "source").write_bytes(BIG)
    line.proxy.refuse()
    with after(0.6, line.proxy.heal):
        result = CALLS[name](line.store, tmp_path)
    assert EFFECTS[name](line.direct, tmp_path, result)
    (outage,) = line.told
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", outage.began_at)
    assert 0.3 < outage.seconds < SOON_S
    assert "no usable answer" in outage.error


def test_an_upload_that_breaks_in_the_middle_is_repeated(line: Line) -> None:
    memory = memory_of(BIG)
    line.proxy.cut("up", after_bytes=6 * MIB, times=2)
    line.store.upload(memory, "big")
    memory.close()
    assert line.proxy.fired == 2
    assert line.direct.get("big") == BIG
    assert len(line.told) == 1


def test_threads_share_an_outage_and_it_is_told_once(line: Line) -> None:
    together = threading.Barrier(THREADS)

    def work(thread: int) -> None:
        together.wait()
        for number in range(5):
            line.store.create(f"t/{thread}/{number}", f"{thread} {number}".encode())
            assert line.store.get(f"t/{thread}/{number}") == f"{thread} {number}".encode()

    line.proxy.refuse()
    with after(0.6, line.proxy.heal), ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    assert len(list(line.direct.list("t/"))) == THREADS * 5
    assert len(line.told) == 1

    line.proxy.refuse()
    with after(0.3, line.proxy.heal):
        assert line.store.exists("t/0/0")
    assert len(line.told) == 2, "the next outage is another"


def test_a_call_that_failed_before_the_outage_was_told_does_not_begin_a_new_one(tmp_path: Path) -> None:
    """Its answer was only slow to come."""
    is_failing, slow_failed, told = threading.Event(), threading.Event(), threading.Event()
    outages: list[Outage] = []

    class Scripted(FolderStore):
        def put(self, key: str, data: bytes) -> None:
            if key == "quick" and not is_failing.is_set():
                is_failing.set()
                raise StoreUnreachable("gone")
            if key == "slow" and not slow_failed.is_set():
                assert told.wait(SOON_S)
                slow_failed.set()
                raise StoreUnreachable("gone")
            super().put(key, data)

    def tell(outage: Outage) -> None:
        outages.append(outage)
        told.set()

    store = PatientStore(Scripted(tmp_path), 60.0, tell, pauses=SHORT)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda key: store.put(key, b""), ["slow", "quick"]))
    assert slow_failed.is_set()
    assert len(outages) == 1
    assert [info.key for info in store.list("")] == ["quick", "slow"]


def test_a_listing_that_breaks_off_is_repeated_and_gives_nothing_twice(tmp_path: Path) -> None:
    class Breaking(FolderStore):
        breaks = 2

        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            for number, info in enumerate(super().list(prefix)):
                if number == 3 and self.breaks:
                    self.breaks -= 1
                    raise StoreUnreachable("gone")
                yield info

    store = PatientStore(Breaking(tmp_path), 60.0, pauses=SHORT)
    for number in range(5):
        store.put(f"k{number}", b"")
    assert [info.key for info in store.list("")] == [f"k{number}" for number in range(5)]


# --- it stays away -----------------------------------------------------------------------------------------------


def test_an_outage_beyond_the_limit_is_reported_with_its_length(line: Line) -> None:
    line.proxy.refuse()
    began = time.monotonic()
    with pytest.raises(StoreUnreachable, match=r"no usable answer.*; it was tried for 1 s") as caught:
        line.patient(limit_s=1.0).get("k")
    assert 1.0 <= time.monotonic() - began < SOON_S
    assert type(caught.value) is StoreUnreachable
    assert line.told == []


def test_an_outage_on_which_all_gave_up_is_told_by_the_next_call(line: Line) -> None:
    store = line.patient(limit_s=0.2)
    line.proxy.refuse()
    for _ in range(2):
        with pytest.raises(StoreUnreachable):
            store.put("k", b"v")
    line.proxy.heal()
    store.put("k", b"v")
    store.put("k", b"w")
    (outage,) = line.told
    assert outage.seconds > 0.3, "it began with the first call"


def test_a_caller_can_stop_waiting(line: Line) -> None:
    cancelled = threading.Event()
    store = line.patient(pauses=NEVER, cancelled=cancelled)
    line.proxy.refuse()
    with soon(), after(0.3, cancelled.set), pytest.raises(StoreUnreachable, match="no usable answer"):
        store.get("k")
    with soon(), pytest.raises(StoreUnreachable):
        store.get("k")
    line.proxy.heal()
    store.put("k", b"v")
    assert len(line.told) == 1


# --- credentials and buckets -------------------------------------------------------------------------------------


def test_renewed_credentials_are_read(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an-expired-secret")
    store = line.patient()
    renew = lambda: monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", line.server.secret_key)  # noqa: E731
    with after(0.6, renew), ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda number: store.create(f"k{number}", b"v"), range(THREADS)))
    assert len(list(line.direct.list("k"))) == THREADS
    (outage,) = line.told
    assert "SignatureDoesNotMatch" in outage.error
    assert "secret" not in outage.error.lower().replace("aws_secret_access_key", "")


def test_credentials_that_nobody_renews_are_reported(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an-expired-secret")
    with pytest.raises(StoreDenied, match=r"AWS_SECRET_ACCESS_KEY.*; it was tried for 1 s"):
        line.patient(limit_s=0.6).put("k", b"v")


def test_a_profile_that_is_being_replaced_is_read_again(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the old credentials and the new ones the file cannot be read at all."""
    profile = f"[default]\naws_access_key_id = {line.server.access_key}\naws_secret_access_key = "
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file.write_text(profile + "an-expired-secret\n")
    store = line.patient()
    with (
        after(0.3, lambda: file.write_text("[default\n")),
        after(0.9, lambda: file.write_text(f"{profile}{line.server.secret_key}\n")),
    ):
        store.put("k", b"v")
    assert line.direct.get("k") == b"v"
    assert len(line.told) == 1


def test_a_bucket_that_is_made_again_is_used_again(line: Line) -> None:
    s3 = boto3.session.Session().client("s3", region_name="us-east-1")
    bucket = f"b{uuid4().hex}"
    s3.create_bucket(Bucket=bucket)
    store = line.patient(bucket=bucket)
    store.put("lost", b"")
    store.delete("lost")
    s3.delete_bucket(Bucket=bucket)
    with after(0.6, lambda: s3.create_bucket(Bucket=bucket)), ThreadPoolExecutor(THREADS) as pool:
        attempts: list[Callable[[], object]] = [
            lambda: store.put("put", b"v"),
            lambda: store.create("created", b"v"),
            lambda: store.upload(memory_of(BIG), "big"),
            lambda: list(store.list("lost")),
        ]
        list(pool.map(lambda attempt: attempt(), attempts))
    assert [info.key for info in store.list("")] == ["big", "created", "put"]
    (outage,) = line.told
    assert f"bucket {bucket} does not exist" in outage.error

    for key in ("big", "created", "put"):
        store.delete(key)
    s3.delete_bucket(Bucket=bucket)
    with pytest.raises(ConfigError, match=r"does not exist.*; it was tried for 0 s"):
        line.patient(limit_s=0.2, bucket=bucket).put("k", b"")


# --- answers are no outages --------------------------------------------------------------------------------------


def test_answers_are_passed_on_at_once(line: Line, tmp_path: Path) -> None:
    store = line.patient(pauses=NEVER)
    store.create("k", b"v")
    refusals: list[tuple[type[LuthierError], Callable[[], object]]] = [
        (ObjectNotFound, lambda: store.get("missing")),
        (ObjectNotFound, lambda: store.download("missing", tmp_path / "target")),
        (ObjectExists, lambda: store.create("k", b"v")),
        (StoreError, lambda: store.put("../up", b"")),
        (StoreError, lambda: store.list("a//b")),
    ]
    with soon():
        for kind, attempt in refusals:
            with pytest.raises(kind) as caught:
                attempt()
            assert type(caught.value) is kind
            assert "tried for" not in str(caught.value)
    assert line.told == []


def test_an_answer_ends_an_outage_whatever_it_is(line: Line) -> None:
    line.proxy.refuse()
    with after(0.3, line.proxy.heal), pytest.raises(ObjectNotFound):
        line.store.get("missing")
    assert len(line.told) == 1


# --- create ------------------------------------------------------------------------------------------------------


def test_a_create_that_won_unheard_is_no_loss(line: Line) -> None:
    line.proxy.lose_answer()
    line.store.create("k", b"mine")
    assert line.proxy.fired == 1
    assert line.direct.get("k") == b"mine"
    with pytest.raises(ObjectExists):
        line.store.create("k", b"mine")


def test_a_create_that_won_unheard_is_no_loss_when_the_look_at_it_fails_too(tmp_path: Path) -> None:
    class Failing(FolderStore):
        failing = ["create", "get"]  # noqa: RUF012 (one store, one test)

        def create(self, key: str, data: bytes) -> None:
            super().create(key, data)
            if "create" in self.failing:
                self.failing.remove("create")
                raise StoreUnreachable("gone")

        def get(self, key: str) -> bytes:
            if "get" in self.failing:
                self.failing.remove("get")
                raise StoreUnreachable("gone")
            return super().get(key)

    store = PatientStore(Failing(tmp_path), 60.0, pauses=SHORT)
    store.create("k", b"mine")
    assert Failing.failing == []
    assert store.get("k") == b"mine"


def test_a_create_that_lost_while_it_could_not_be_heard_is_a_loss(line: Line) -> None:
    line.proxy.lose_request(then=lambda: line.direct.create("k", b"theirs"))
    with pytest.raises(ObjectExists):
        line.store.create("k", b"mine")
    assert line.proxy.fired == 1
    assert line.direct.get("k") == b"theirs"
    assert len(line.told) == 1
