"""The store's contract, on a folder and on two real S3 servers; then what only one kind of store can get wrong."""

import os
import pickle
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import records
from cluster.errors import (
    ConfigError,
    InputError,
    LuthierError,
    ObjectExists,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreUnfit,
    StoreUnreachable,
    exit_code,
)
from cluster.folder import FolderStore
from cluster.objects import TEMPORARY, check_key
from cluster.s3 import Patience, S3Store
from cluster.store import Store, open_existing, open_store
from tests.cluster.conftest import UseEnv
from tests.cluster.race import race
from tests.servers import S3Server, StubS3, aws_env, free_ports, shared

ODD_KEYS = [
    "plain",
    "with space/and  two",
    "plus+and%2Fpercent%",
    "query?a=b&c#fragment",
    "ünï/日本語/🦜",
    "quotes'\"<tag>;:,@$!*()[]{}|\\^`~",
    ".hidden/..dots../x..",
    "a=b/c=d",
]

BAD_KEYS = [
    "", "/", "/absolute", "trailing/", "double//slash", "..", "../up", "a/../../b", "a/./b", "a/..",
    "nul\0", "new\nline", "half\ud800", f"a/{TEMPORARY}x", "s" * 256, "/".join(["s" * 200] * 5),
]  # fmt: skip


# --- the contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "one byte", "1.2 MB"])
def test_what_is_written_is_read(store: Store, data: bytes) -> None:
    store.create("created", data)
    store.put("put", data)
    assert store.get("created") == store.get("put") == data


def test_create_refuses_a_taken_key_and_leaves_its_bytes(store: Store) -> None:
    store.create("a/b", b"first")
    for data in (b"second", b"first", b""):
        with pytest.raises(ObjectExists, match="a/b is already there"):
            store.create("a/b", data)
    assert store.get("a/b") == b"first"


def test_put_replaces_and_create_sees_what_put_wrote(store: Store) -> None:
    store.put("k", b"a long first version")
    store.put("k", b"second")
    with pytest.raises(ObjectExists):
        store.create("k", b"third")
    assert store.get("k") == b"second"


def test_a_deleted_key_is_free_again(store: Store) -> None:
    store.create("k", b"1")
    store.delete("k")
    store.delete("k")
    store.delete("never/was")
    assert not store.exists("k")
    store.create("k", b"2")
    assert store.get("k") == b"2"


def test_missing_objects(store: Store, tmp_path: Path) -> None:
    store.put("a/b", b"")
    target = tmp_path / "target"
    for key in ("missing", "a", "a/b/c", "a/bb"):
        assert not store.exists(key)
        with pytest.raises(ObjectNotFound, match=f"{key} does not exist"):
            store.get(key)
        with pytest.raises(ObjectNotFound, match=f"{key} does not exist"):
            store.download(key, target)
    assert not target.exists()
    assert list(tmp_path.glob(f"{TEMPORARY}*")) == []


def test_listing_is_in_key_order_and_by_plain_prefix(store: Store) -> None:
    keys = ["a", "ab", "b-c", "b.c/x", "b/a", "b/a0", "b/c/d", "b/c-d", "b0", "B", "é", "z/🦜", "z/\uffee"]
    for number, key in enumerate(keys):
        store.put(key, b"x" * number)
    assert [(info.key, info.size) for info in store.list("")] == sorted((key, n) for n, key in enumerate(keys))
    for prefix in ("a", "b", "b/", "b/c", "b/c/", "b/c/d", "b/c/d/", "b.", "z/", "nothing", "nothing/here"):
        assert [info.key for info in store.list(prefix)] == sorted(k for k in keys if k.startswith(prefix)), prefix


def test_odd_keys_are_kept_to_the_letter(store: Store, tmp_path: Path) -> None:
    for key in ODD_KEYS:
        store.create(key, key.encode())
    assert [info.key for info in store.list("")] == sorted(ODD_KEYS)
    for key in ODD_KEYS:
        with pytest.raises(ObjectExists):
            store.create(key, b"again")
        assert [info.key for info in store.list(key)] == [key]
        assert store.exists(key)
        store.download(key, tmp_path / "copy")
        store.upload(tmp_path / "copy", key)
        assert store.get(key) == key.encode()
        store.delete(key)
    assert list(store.list("")) == []


def test_bad_keys_are_refused_by_every_method(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    methods: list[Callable[[str], object]] = [
        lambda key: store.create(key, b""),
        lambda key: store.put(key, b""),
        store.get,
        store.exists,
        store.delete,
        lambda key: store.upload(source, key),
        lambda key: store.download(key, tmp_path / "target"),
    ]
    for key in BAD_KEYS:
        for method in methods:
            with pytest.raises(StoreError, match="cannot be a key"):
                method(key)
    assert list(store.list("")) == []
    assert not (tmp_path / "target").exists()


def test_a_race_of_16_writers_has_one_winner(store: Store) -> None:
    rounds = 100 if isinstance(store, FolderStore) else 8  # a folder is fast, and its window for a mistake short
    keys = [f"race/{n:03d}" for n in range(rounds)]
    for key, winners in race(store, keys).items():
        assert len(winners) == 1, f"{key}: {len(winners)} winners"
        assert store.get(key) == winners[0]
    assert [info.key for info in store.list("race/")] == keys


def test_a_big_file_goes_up_and_comes_down_whole(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new folder" / "target"
    source.write_bytes(random.Random(7).randbytes((200 << 20) + 12345))
    store.upload(source, "big/file")
    digest = store.download("big/file", target)
    assert digest == sha256(target.read_bytes()).hexdigest()
    assert target.read_bytes() == source.read_bytes()
    assert [info.size for info in store.list("big/")] == [(200 << 20) + 12345]

    source.write_bytes(b"smaller now")
    store.upload(source, "big/file")
    digest = store.download("big/file", target)
    assert digest == sha256(target.read_bytes()).hexdigest()
    assert target.read_bytes() == b"smaller now"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("size", [1, 12345, (40 << 20) + 12345], ids=["one byte", "12 kB", "40 MiB"])
def test_memory_goes_up_as_a_file_does(store: Store, tmp_path: Path, size: int) -> None:
    data = random.Random(8).randbytes(size)
    memory = mmap(-1, size)
    memory.write(data)  # which leaves its position at the end
    for _ in range(2):
        store.upload(memory, "from/memory")
        assert memory.tell() == size
    store.download("from/memory", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert [info.size for info in store.list("from/")] == [size]
    assert records.describe_memory(memory, "f") == records.describe_file(tmp_path / "copy", "f")

    store.put("from/memory", b"old")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda key: store.upload(memory, key), ["from/memory", "from/too"]))
    assert store.get("from/memory") == store.get("from/too") == data
    memory.close()  # raises if anything still looks into it


def test_memory_that_cannot_be_uploaded_can_be_closed(server: S3Server, use_env: UseEnv, tmp_path: Path) -> None:
    use_env(server.env | {"AWS_SECRET_ACCESS_KEY": "not-the-secret"})
    memory = mmap(-1, 20 << 20)
    with pytest.raises(StoreDenied):
        S3Store("luthier", "p").upload(memory, "k")
    FolderStore(tmp_path).put("a", b"")
    with pytest.raises(StoreError, match="one key must not be the beginning of another"):
        FolderStore(tmp_path).upload(memory, "a/b")
    memory.close()


def test_an_empty_file_goes_up_and_comes_down(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    store.upload(tmp_path / "empty", "empty")
    store.download("empty", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_threads_share_a_store(store: Store) -> None:
    def write_and_read(number: int) -> bytes:
        store.create(f"t/{number}", str(number).encode())
        return store.get(f"t/{number}")

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(write_and_read, range(64))) == [str(number).encode() for number in range(64)]


def test_a_pickled_store_is_the_same_store_and_holds_no_secret(store: Store) -> None:
    store.create("k", b"v")
    sent = pickle.dumps(store)
    again: Store = pickle.loads(sent)
    assert again.url == store.url
    assert again.get("k") == b"v"
    with pytest.raises(ObjectExists):
        again.create("k", b"w")
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret").encode() not in sent


def test_opening_leaves_nothing_behind(store: Store) -> None:
    assert list(open_store(store.url).list("")) == []


def test_who_only_looks_makes_no_folder(tmp_path: Path) -> None:
    for url in ((tmp_path / "mistyped").as_uri(), "file:///etc/passwd"):
        with pytest.raises(InputError, match="there is no store at"):
            open_existing(url)
    assert list(tmp_path.iterdir()) == []
    open_store(tmp_path.as_uri()).create("k", b"v")
    assert open_existing(tmp_path.as_uri()).get("k") == b"v"


def test_a_store_opened_again_by_its_url_holds_the_same(store: Store) -> None:
    store.create("k", b"v")
    assert open_store(store.url).get("k") == b"v"


# --- keys and addresses ------------------------------------------------------------------------------------------


@given(st.text(max_size=40))
def test_an_accepted_key_never_leaves_the_folder(key: str) -> None:
    root = Path("/store/root")
    try:
        check_key(key)
    except StoreError:
        return
    assert os.path.normpath(root / key) == f"/store/root/{key}"


@pytest.mark.parametrize(
    "url",
    ["", "bucket/prefix", "s3:bucket", "s3://", "s3:///prefix", "http://h/b", "file://relative/x", "file:relative",
     "s3://bucket/a?versionId=1", "s3://bucket/a#b", "file:///a?b"],
)  # fmt: skip
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="write "):
        open_store(url)


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="holds no credentials") as caught:
        open_store("s3://AKIAKEY:hunter2@bucket/prefix")
    assert "hunter2" not in str(caught.value)


# --- folders -----------------------------------------------------------------------------------------------------


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom file permissions bind: root gives its rights up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder in which one may look but not write (not below tmp_path, where another user may not even look)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "taken").write_bytes(b"readable")
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def test_a_folder_without_the_right_to_write(closed_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    with without_rights():
        store = FolderStore(closed_folder)
        assert store.get("taken") == b"readable"
        for attempt in (
            lambda: store.create("k", b""),
            lambda: store.put("taken", b""),
            lambda: store.put("new/k", b""),
            lambda: store.delete("taken"),
            lambda: open_store(closed_folder.as_uri()),
            lambda: FolderStore(closed_folder / "below"),
        ):
            with pytest.raises(StoreDenied, match=str(closed_folder)) as caught:
                attempt()
            assert exit_code(caught.value) == 2
    assert [path.name for path in closed_folder.iterdir()] == ["taken"]


def test_a_folder_that_is_a_file_cannot_be_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreUnreachable, match=f"{root} cannot be made"):
            open_store(root.as_uri())


def test_half_written_files_are_never_listed(tmp_path: Path) -> None:
    """What a writer that was killed leaves behind."""
    store = FolderStore(tmp_path)
    store.put("a/b", b"1")
    (tmp_path / "a" / f"{TEMPORARY}1234").write_bytes(b"half")
    assert [info.key for info in store.list("")] == ["a/b"]
    assert [info.key for info in store.list(f"a/{TEMPORARY}")] == []


def test_a_key_below_an_object_is_refused_plainly(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("a/b", b"1")
    for key in ("a/b/c", "a/b/c/d", "a"):
        for write in (store.create, store.put):
            with pytest.raises(StoreError, match="one key must not be the beginning of another") as caught:
                write(key, b"2")
            assert not isinstance(caught.value, ObjectExists)
    assert [(info.key, info.size) for info in store.list("")] == [("a/b", 1)]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


# --- S3: who may, and where --------------------------------------------------------------------------------------


def refusal(url: str, kind: type[LuthierError], env: dict[str, str]) -> str:
    """The message with which `url` does not open; every secret in `env` stays out of it."""
    with pytest.raises(kind) as caught:
        open_store(url)
    message = str(caught.value)
    assert env.get("AWS_SECRET_ACCESS_KEY", "no secret") not in message
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    return message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "AKIANOBODYKNOWSTHISX"}, "InvalidAccessKeyId"),
    ],
)
def test_wrong_credentials(server: S3Server, use_env: UseEnv, change: dict[str, str], code: str) -> None:
    env = server.env | change
    use_env(env)
    message = refusal("s3://luthier/p", StoreDenied, env)
    for part in (code, server.endpoint, "s3://luthier/p", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert part in message
    assert server.secret_key not in message


def test_wrong_credentials_are_told_by_every_method(server: S3Server, use_env: UseEnv, tmp_path: Path) -> None:
    use_env(server.env | {"AWS_SECRET_ACCESS_KEY": "not-the-secret"})
    store = S3Store("luthier", "p")
    (tmp_path / "source").write_bytes(b"x")
    for attempt in (
        lambda: store.create("k", b""),
        lambda: store.put("k", b""),
        lambda: store.get("k"),
        lambda: store.exists("k"),
        lambda: store.delete("k"),
        lambda: list(store.list("")),
        lambda: store.upload(tmp_path / "source", "k"),
        lambda: store.download("k", tmp_path / "target"),
    ):
        with pytest.raises(StoreDenied, match="AWS_SECRET_ACCESS_KEY") as caught:
            attempt()
        assert exit_code(caught.value) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_credentials(server: S3Server, use_env: UseEnv) -> None:
    use_env({key: value for key, value in server.env.items() if "KEY" not in key})
    message = refusal("s3://luthier/p", StoreDenied, {})
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message
    assert server.endpoint in message


def test_unknown_profile(server: S3Server, use_env: UseEnv) -> None:
    use_env(server.env | {"AWS_PROFILE": "nobody"})
    assert "AWS_PROFILE" in refusal("s3://luthier/p", StoreDenied, server.env)


def test_missing_bucket(server: S3Server) -> None:
    message = refusal("s3://no-such-bucket/p", ConfigError, server.env)
    assert f"bucket no-such-bucket does not exist at {server.endpoint}; create it or correct `store:`" in message


def test_a_name_that_no_bucket_can_have(server: S3Server) -> None:
    assert "Invalid bucket name" in refusal("s3://No~Such/p", ConfigError, server.env)


def test_unreachable_endpoint(use_env: UseEnv) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)}"
    env = aws_env(endpoint, "some-key", "some-secret")
    use_env(env)
    message = refusal("s3://luthier/p", StoreUnreachable, env)
    for part in (endpoint, "s3://luthier/p", "AWS_ENDPOINT_URL", "attempts made: 3"):
        assert part in message


@pytest.mark.parametrize("endpoint", ["localhost:9000", "not a url", "http://"])
def test_an_endpoint_that_is_no_address(use_env: UseEnv, endpoint: str) -> None:
    env = aws_env(endpoint, "some-key", "some-secret")
    use_env(env)
    assert "AWS_ENDPOINT_URL" in refusal("s3://luthier/p", ConfigError, env)


def test_a_listing_of_several_pages(use_env: UseEnv) -> None:
    server = shared("ministack")
    use_env(server.env)
    store = S3Store(server.bucket, uuid4().hex)
    keys = [f"n/{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert [info.key for info in store.list("n/")] == keys


# --- S3: servers that misbehave ----------------------------------------------------------------------------------


@pytest.fixture
def stub(use_env: UseEnv) -> Iterator[StubS3]:
    with StubS3() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        use_env(aws_env(f"http://localhost:{server.server_port}", "some-key", "some-secret"))
        yield server
        server.shutdown()


def test_a_server_that_ignores_conditions_is_refused(stub: StubS3) -> None:
    with pytest.raises(StoreUnfit, match="let two writers create the same object") as caught:
        open_store("s3://bucket/p")
    assert "s3://bucket/p" in str(caught.value)
    assert exit_code(caught.value) == 2
    assert stub.objects == {}, "the probe was left behind"


def test_a_server_that_does_not_know_conditions_is_refused(stub: StubS3) -> None:
    stub.answers = [(501, "NotImplemented")]
    with pytest.raises(StoreUnfit, match="does not implement it"):
        open_store("s3://bucket/p")


def test_buckets_are_addressed_by_path(stub: StubS3) -> None:
    """`bucket.localhost` would need a DNS entry for every bucket."""
    S3Store("bucket", "p").put("k", b"v")
    assert stub.puts == ["/bucket/p/k"]


@pytest.mark.parametrize(
    "answers",
    [
        [(503, "SlowDown")],
        [(500, "InternalError"), (503, "ServiceUnavailable")],
        [(409, "ConditionalRequestConflict")],
        [(409, "ConditionalRequestConflict"), (503, "SlowDown")],
    ],
)
def test_passing_troubles_are_sat_out(stub: StubS3, answers: list[tuple[int, str]]) -> None:
    stub.answers = list(answers)
    S3Store("bucket", "").create("k", b"v")
    assert stub.puts == ["/bucket/k"] * (len(answers) + 1)
    assert stub.objects == {"/bucket/k": b"v"}


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (409, "ConditionalRequestConflict")])
def test_lasting_troubles_are_reported_after_the_last_attempt(stub: StubS3, status: int, code: str) -> None:
    stub.answers = [(status, code)] * 3
    with pytest.raises(StoreUnreachable, match=f"still answers {status} .{code} scripted., attempts made: 2"):
        S3Store("bucket", "", Patience(max_attempts=2, connect_timeout_s=1, read_timeout_s=1)).create("k", b"v")
    assert len(stub.puts) == 2
    assert stub.objects == {}


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "ExpiredToken", StoreDenied),
        (401, "Unauthorized", StoreDenied),
        (403, "RequestTimeTooSkewed", StoreDenied),
        (400, "AuthorizationHeaderMalformed", ConfigError),
        (400, "EntityTooLarge", StoreError),
    ],
)
def test_refusals_are_not_repeated(stub: StubS3, status: int, code: str, kind: type[LuthierError]) -> None:
    stub.answers = [(status, code)] * 2
    with pytest.raises(kind, match=code) as caught:
        S3Store("bucket", "").put("k", b"v")
    assert type(caught.value) is kind
    assert len(stub.puts) == 1


def test_a_folder_that_has_gone_is_an_outage_and_is_not_made_again(tmp_path: Path) -> None:
    """As when a disk is no longer mounted: whoever made the folder anew would write a second, empty store."""
    root = tmp_path / "store"
    store = open_store(root.as_uri())
    store.create("a/b", b"kept")
    root.rename(tmp_path / "elsewhere")
    copy = pickle.loads(pickle.dumps(store))
    for each in (store, copy):
        for call in (
            lambda each=each: each.create("a/c", b""),
            lambda each=each: each.put("a/c", b""),
            lambda each=each: each.get("a/b"),
            lambda each=each: each.exists("a/b"),
            lambda each=each: list(each.list("")),
        ):
            with pytest.raises(StoreUnreachable, match="not there any more"):
                call()
    assert not root.exists()
    (tmp_path / "elsewhere").rename(root)
    copy.create("a/c", b"")
    assert [item.key for item in store.list("")] == ["a/b", "a/c"]
