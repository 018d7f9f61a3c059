"""An S3 store behind a network that breaks: what must be sat out, what must be reported, and what must not be left."""

import random
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from cluster.errors import ObjectDamaged, ObjectExists, StoreUnreachable, exit_code
from cluster.s3 import Patience, S3Store
from cluster.store import open_store
from tests.faults.proxy import Proxy
from tests.servers import S3Server, aws_env, shared

MIB = 1 << 20
HASTY = Patience(max_attempts=2, connect_timeout_s=5.0, read_timeout_s=30.0)
ONCE = Patience(max_attempts=1, connect_timeout_s=5.0, read_timeout_s=0.2)


@pytest.fixture(params=["ministack", "ceph"])
def server(request: pytest.FixtureRequest) -> S3Server:
    return shared(request.param)


@pytest.fixture
def emulator() -> S3Server:
    """For faults that end before the server matters."""
    return shared("ministack")


class Line:
    """A proxy to a server, and the same store seen through it and past it."""

    def __init__(self, server: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proxy = proxy
        self.endpoint = f"http://127.0.0.1:{proxy.port}"
        self.prefix = f"faults/{uuid4().hex}"
        self.url = f"s3://{server.bucket}/{self.prefix}"
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        self.direct = S3Store(server.bucket, self.prefix)
        for name, value in aws_env(self.endpoint, server.access_key, server.secret_key).items():
            monkeypatch.setenv(name, value)
        self.store = S3Store(server.bucket, self.prefix)
        self.hasty = S3Store(server.bucket, self.prefix, HASTY)
        self.once = S3Store(server.bucket, self.prefix, ONCE)


@pytest.fixture
def line(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    with Proxy(server.host, server.port) as proxy:
        yield Line(server, proxy, monkeypatch)


@pytest.fixture
def short_line(emulator: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    with Proxy(emulator.host, emulator.port) as proxy:
        yield Line(emulator, proxy, monkeypatch)


# --- create ------------------------------------------------------------------------------------------------------


def test_a_create_whose_answer_is_lost_has_won(line: Line) -> None:
    """Its retry is told 412 by a server that holds our own bytes."""
    stored: list[bytes] = []
    line.proxy.lose_answer(then=lambda: stored.append(line.direct.get("k")))
    line.store.create("k", b"mine")
    assert stored == [b"mine"], "the fault must come after the server has written"
    assert line.proxy.fired == 1
    assert line.direct.get("k") == b"mine"
    with pytest.raises(ObjectExists):
        line.store.create("k", b"mine")


def test_a_create_whose_request_is_lost_has_not_won_if_another_wrote_the_same_bytes(line: Line) -> None:
    """Equal bytes are no proof: two claims on one thing may read the same."""
    line.proxy.lose_request(then=lambda: line.direct.create("k", b"claimed"))
    with pytest.raises(ObjectExists):
        line.store.create("k", b"claimed")
    assert line.proxy.fired == 1


def test_a_create_whose_every_answer_is_lost_is_reported(short_line: Line) -> None:
    short_line.proxy.lose_answer(times=None)
    with pytest.raises(StoreUnreachable, match="attempts made: 2"):
        short_line.hasty.create("k", b"v")
    assert short_line.direct.get("k") == b"v", "that it may be there is what Store.create says"


# --- transfers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_cut_upload_goes_on(line: Line, tmp_path: Path, reset: bool) -> None:
    data = random.Random(1).randbytes(40 * MIB)
    (tmp_path / "source").write_bytes(data)
    line.proxy.cut("up", after_bytes=6 * MIB, times=3, reset=reset)
    line.store.upload(tmp_path / "source", "big")
    assert line.proxy.fired == 3
    line.direct.download("big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_cut_download_goes_on(line: Line, tmp_path: Path, reset: bool) -> None:
    data = random.Random(2).randbytes(40 * MIB)
    (tmp_path / "source").write_bytes(data)
    line.direct.upload(tmp_path / "source", "big")
    line.proxy.cut("down", after_bytes=6 * MIB, times=3, reset=reset)
    line.store.download("big", tmp_path / "copy")
    assert line.proxy.fired == 3
    assert (tmp_path / "copy").read_bytes() == data


def test_a_file_replaced_while_it_is_fetched_is_never_half_of_each(line: Line, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(40 * MIB))
    line.direct.upload(tmp_path / "source", "big")
    line.proxy.cut("down", after_bytes=6 * MIB, then=lambda: line.direct.put("big", b"1" * (40 * MIB)))
    with pytest.raises(ObjectDamaged, match="it was replaced while it was read; try again"):
        line.store.download("big", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_download_that_always_breaks_leaves_what_was_there(short_line: Line, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(3 * MIB))
    short_line.direct.upload(tmp_path / "source", "big")
    (tmp_path / "source").unlink()
    (tmp_path / "old").write_bytes(b"old")
    short_line.proxy.cut("down", after_bytes=MIB, times=None)
    for target in ("old", "new"):
        with pytest.raises(StoreUnreachable, match="big"):
            short_line.hasty.download("big", tmp_path / target)
    assert short_line.proxy.fired > 2
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_an_upload_that_always_breaks_leaves_what_was_there(short_line: Line, tmp_path: Path) -> None:
    short_line.direct.put("big", b"old")
    (tmp_path / "source").write_bytes(bytes(20 * MIB))
    short_line.proxy.cut("up", after_bytes=MIB, times=None)
    with pytest.raises(StoreUnreachable, match="big"):
        short_line.hasty.upload(tmp_path / "source", "big")
    short_line.proxy.heal()
    assert short_line.store.get("big") == b"old"
    assert [info.key for info in short_line.store.list("")] == ["big"]


# --- small requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_body_that_breaks_off_is_read_again(line: Line, reset: bool) -> None:
    data = random.Random(3).randbytes(MIB)
    line.direct.put("k", data)
    line.proxy.cut("down", after_bytes=MIB // 2, times=2, reset=reset)
    assert line.store.get("k") == data
    assert line.proxy.fired == 2


def test_lost_requests_and_answers_are_sent_again(line: Line) -> None:
    line.direct.put("old", b"v")
    line.proxy.lose_request()
    line.store.put("k", b"v")
    line.proxy.lose_answer()
    assert line.store.exists("k")
    line.proxy.lose_answer()
    assert [info.key for info in line.store.list("")] == ["k", "old"]
    line.proxy.lose_answer()
    line.store.delete("old")
    assert line.proxy.fired == 4
    assert not line.direct.exists("old")


def test_a_slow_network_is_no_fault(short_line: Line) -> None:
    short_line.proxy.delay(0.05)
    short_line.store.create("k", b"v")
    assert short_line.store.get("k") == b"v"


# --- no answer at all --------------------------------------------------------------------------------------------


def test_a_black_hole_is_reported(short_line: Line, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    short_line.proxy.black_hole()
    for attempt in (
        lambda: short_line.once.create("k", b"v"),
        lambda: short_line.once.get("k"),
        lambda: short_line.once.exists("k"),
        lambda: list(short_line.once.list("")),
        lambda: short_line.once.upload(tmp_path / "source", "k"),
        lambda: short_line.once.download("k", tmp_path / "target"),
    ):
        with pytest.raises(StoreUnreachable, match="no usable answer, attempts made: 1") as caught:
            attempt()
        assert short_line.endpoint in str(caught.value)
        assert exit_code(caught.value) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_store_that_is_down_is_reported_and_used_again_when_up(short_line: Line) -> None:
    short_line.store.put("k", b"v")
    short_line.proxy.refuse()
    with pytest.raises(StoreUnreachable, match="AWS_ENDPOINT_URL"):
        open_store(short_line.url)
    with pytest.raises(StoreUnreachable):
        short_line.hasty.get("k")
    short_line.proxy.heal()
    assert short_line.hasty.get("k") == b"v"
    assert open_store(short_line.url).get("k") == b"v"
