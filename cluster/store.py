"""The object store: eight methods, one atomic primitive.

A store holds immutable objects under `/`-separated keys. The only operation that may race is `create`
(create if absent): of any number of writers, exactly one wins and the others get ObjectExists.
Everything in Luthier that must not be lost or doubled is built on it, so a store that only pretends
to have it is found out and refused when it is opened.

    store = open_store("s3://bucket/prefix")     # or file:///folder
    store.create("runs/r1/run.json", b"…")

A store pickles to its address, so it may be sent to a Ray worker; there it is not proved a second time.
"""

from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, unquote, urlsplit
from uuid import uuid4

from cluster.errors import ConfigError, Fault, InputError, ObjectExists, StoreUnfit
from cluster.keys import probe_key
from cluster.objects import ObjectInfo


class Store(Protocol):
    """What Luthier needs of a store. Keys are relative to the store's own prefix and obey `check_key`.

    Any method may raise StoreUnreachable and StoreDenied, and StoreError for what fits no other class.
    """

    url: str

    def impatient(self) -> "Store":
        """The same store, whose calls report within seconds that it does not answer, for who tries again himself."""

    def create(self, key: str, data: bytes) -> None:
        """Write if absent. Raises ObjectExists, leaving the winner's bytes untouched.

        After StoreUnreachable the object may or may not be there: the request or its answer was lost.
        """

    def put(self, key: str, data: bytes) -> None:
        """Write, replacing what is there. For objects that have one writer."""

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFound."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix`, in the order of their keys (by code point)."""

    def delete(self, key: str) -> None:
        """Remove; a key that is not there is no error."""

    def exists(self, key: str) -> bool:
        """Whether an object is there."""

    def upload(self, source: Path | mmap, key: str) -> None:
        """Write a local file, or all of an anonymous mmap, replacing what is there; large ones in parts, in parallel.

        Memory is copied part by part at most, its position is left alone, and nobody may change or close it
        meanwhile. Raises ObjectDamaged if the stored size is not the source's.
        """

    def download(self, key: str, path: Path) -> str:
        """Fetch into a local file, which appears only when whole; missing folders are made.

        Returns the SHA-256 in hex of what was written. Raises ObjectNotFound, and ObjectDamaged if
        it is not one whole object that came.
        """


def open_store(url: str) -> Store:
    """Open `s3://bucket/prefix` or `file:///folder` and prove that create-if-absent holds.

    Raises ConfigError for any other address, StoreUnreachable, StoreDenied, StoreUnfit.
    """
    try:
        parts = check_url(url)
    except ValueError as error:
        raise ConfigError([Fault("store", "", str(error))]) from None
    if parts.scheme == "file":
        from cluster.folder import FolderStore

        folder = FolderStore(Path(unquote(parts.path)))
        _prove_create_if_absent(folder)
        return folder
    from cluster.s3 import OPENING, S3Store  # boto3 takes 0.3 s to import

    bucket, prefix = parts.netloc, parts.path.strip("/")
    # A wrong address should be reported in seconds; a running job should sit out a minute's outage.
    _prove_create_if_absent(S3Store(bucket, prefix, OPENING))
    return S3Store(bucket, prefix)


def open_existing(url: str) -> Store:
    """As `open_store`, for whoever only looks: a folder that is not there is a mistake, and is not made.

    Raises InputError besides.
    """
    parts = urlsplit(url)
    folder = Path(unquote(parts.path))
    if parts.scheme == "file" and not parts.netloc and not folder.is_dir():
        raise InputError(f"there is no store at {url}: {folder} is no folder; correct the address")
    return open_store(url)


def check_url(url: str) -> SplitResult:
    """The parts of a store's address. Raises ValueError for what is none, with what to write instead."""
    parts = urlsplit(url)
    if "@" in parts.netloc:  # the address is not repeated: what stands before the @ may be a secret
        raise ValueError("an address holds no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    is_s3 = parts.scheme == "s3" and bool(parts.netloc)
    is_folder = parts.scheme == "file" and not parts.netloc and parts.path.startswith("/")
    if not is_s3 and not is_folder:
        raise ValueError(f"store {url!r}: write s3://bucket/prefix or file:///absolute/folder")
    if parts.query or parts.fragment:
        raise ValueError(f"store {url!r}: write ? as %3F and # as %23 in a file:// address; s3:// has neither")
    return parts


def _prove_create_if_absent(store: Store) -> None:
    """Create one object twice; only a store that refuses the second can be trusted with a race."""
    key = probe_key(uuid4().hex)
    store.create(key, b"first")
    try:
        store.create(key, b"second")
    except ObjectExists:
        return
    finally:
        store.delete(key)
    raise StoreUnfit(
        f"{store.url} let two writers create the same object: it ignores `If-None-Match: *`, so runs and adapter "
        "versions could overwrite each other. Use a server that honours it (AWS S3, Ceph, MinIO, R2) or a folder"
    )
