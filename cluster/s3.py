"""A store in an S3 bucket, and a secret of AWS Secrets Manager; the only file that imports boto3.

Credentials, endpoint and region come from the standard AWS variables and files, which boto3 reads itself
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_PROFILE,
AWS_CA_BUNDLE), so AWS, Ceph, MinIO and R2 work unchanged. With an endpoint set boto3 addresses buckets by
path, which needs no wildcard DNS.
"""

import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from itertools import count
from mmap import mmap
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import boto3.session
import botocore.loaders
import botocore.session
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoAuthTokenError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from cluster.errors import (
    ConfigError,
    Fault,
    LuthierError,
    ObjectDamaged,
    ObjectExists,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreUnfit,
    StoreUnreachable,
)
from cluster.objects import TEMPORARY, ObjectInfo, check_key


@dataclass(frozen=True)
class Patience:
    """How long to put up with a server that does not answer.

    The wait before attempt n + 1 is drawn evenly from 0 to min(2^(n-1), 20) seconds (full jitter).
    """

    max_attempts: int
    connect_timeout_s: float
    read_timeout_s: float


OPENING = Patience(max_attempts=3, connect_timeout_s=3.0, read_timeout_s=10.0)
"""A wrong address is reported after 1.5 s of waits on average, a black hole after 11 s."""

ALERT = Patience(max_attempts=3, connect_timeout_s=5.0, read_timeout_s=60.0)
"""For whoever tries again himself, and must tell how long the server was away."""

WORKING = Patience(max_attempts=8, connect_timeout_s=5.0, read_timeout_s=60.0)
"""Sits out an outage of half a minute on average (the waits add up to 36 s of at most 71 s)."""

# 16 MiB parts, eight at a time: a cut connection repeats one part, and eight failing parts stay within the 500
# tokens (5 a retry) that botocore grants the retries of one client. s3transfer enlarges the parts of a file that
# would need more than S3's 10,000. The `classic` client is chosen because the other (CRT) has retries of its own.
_TRANSFER = TransferConfig(
    multipart_threshold=16 << 20,
    multipart_chunksize=16 << 20,
    max_concurrency=8,
    preferred_transfer_client="classic",
)

_NO_CREDENTIALS = (
    CredentialRetrievalError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
_DENIED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}  # sent with status 400
_WRONG_REGION_CODES = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_NO_ANSWER = (HTTPClientError, NoConnectionError, IncompleteReadError)
_CHUNK = 256 << 10  # of a body, bytes
_WRITER = "luthier-writer"  # object metadata: which call of create() wrote it


Taken = TypeVar("Taken")


class S3Store:
    """The objects of `bucket` whose keys begin with `prefix`/. Threads may share it; it pickles to its address."""

    def __init__(self, bucket: str, prefix: str, patience: Patience = WORKING) -> None:
        """Reads the AWS variables; sends nothing. Raises ConfigError or StoreDenied if they cannot be used."""
        self._bucket, self._prefix, self._patience = bucket, prefix, patience
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        if prefix:
            check_key(prefix)
        try:
            self._client: Any = _session().client("s3", config=_config(patience))
        except _NO_CREDENTIALS as error:
            raise StoreDenied(f"{self.url} cannot be opened: {error}; check AWS_PROFILE and ~/.aws") from error
        except (BotoCoreError, ValueError) as error:
            message = f"{error}; check AWS_ENDPOINT_URL (write http://host:port), AWS_REGION and ~/.aws/config"
            raise ConfigError([Fault("store", self.url, message)]) from error
        self._endpoint = str(self._client.meta.endpoint_url)

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str, str, Patience]]:
        return S3Store, (self._bucket, self._prefix, self._patience)

    def impatient(self) -> "S3Store":
        return S3Store(self._bucket, self._prefix, ALERT)

    def create(self, key: str, data: bytes) -> None:
        # If the answer to a create that won is lost, its retry, by botocore or by a proxy on the way, is told 412. So
        # each call leaves a mark of its own on the object, and a 412 is a loss only if the winner's mark is another.
        # (Comparing the bytes instead would make winners of two writers who send the same bytes.)
        name, mark = self._name(key), uuid4().hex
        with self._errors_named("create", key):
            for attempt in count(1):
                try:
                    self._client.put_object(
                        Bucket=self._bucket, Key=name, Body=data, IfNoneMatch="*", Metadata={_WRITER: mark}
                    )
                    return
                except ClientError as error:
                    if _status(error) == 412:
                        head = self._head(name)
                        if head is not None and head["Metadata"].get(_WRITER) == mark:
                            return
                        raise ObjectExists(f"{self.url}/{key} is already there") from None
                    # AWS says so when two creates of a key overlap, and that neither was done.
                    if _code(error) != "ConditionalRequestConflict" or attempt >= self._patience.max_attempts:
                        raise
                    _pause(attempt)

    def put(self, key: str, data: bytes) -> None:
        with self._errors_named("write", key):
            self._client.put_object(Bucket=self._bucket, Key=self._name(key), Body=data)

    def get(self, key: str) -> bytes:
        with self._errors_named("read", key):
            return self._read(lambda body: bytes(body.read()), Key=self._name(key))

    def _read(self, take: Callable[[Any], Taken], **request: str) -> Taken:
        """What `take` makes of the body that answers a GET; again, when it breaks off."""
        for attempt in count(1):
            body = self._client.get_object(Bucket=self._bucket, **request)["Body"]
            try:
                with body:
                    return take(body)  # raises if fewer bytes come than were announced
            except _NO_ANSWER:  # botocore's own retries end where the body begins
                if attempt >= self._patience.max_attempts:
                    raise
                _pause(attempt)
        raise AssertionError("count() does not end")

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        above = f"{self._prefix}/" if self._prefix else ""
        with self._errors_named("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=above + prefix)
            for page in pages:
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # a console's marker of an empty folder
                        yield ObjectInfo(item["Key"].removeprefix(above), item["Size"])

    def delete(self, key: str) -> None:
        with self._errors_named("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def exists(self, key: str) -> bool:
        with self._errors_named("look for", key):
            return self._head(self._name(key)) is not None

    def upload(self, source: Path | mmap, key: str) -> None:
        name = self._name(key)
        body: _MemoryFile | str
        if isinstance(source, mmap):
            body, size, what = _MemoryFile(source), len(source), "memory"
        else:
            body, size, what = str(source), source.stat().st_size, str(source)
        with self._errors_named("write", key):
            with create_transfer_manager(self._client, _TRANSFER) as transfers:
                transfers.upload(body, self._bucket, name).result()
            head = self._head(name)
        stored = None if head is None else head["ContentLength"]
        if stored != size:
            raise ObjectDamaged(f"{self.url}/{key} holds {stored} bytes after uploading the {size} of {what}")

    def download(self, key: str, path: Path) -> str:
        name = self._name(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{uuid4().hex}")
        try:
            with self._errors_named("read", key), temporary.open("x+b", buffering=0) as file:  # reads nothing ahead
                digest = self._fetch(name, file)
            os.replace(temporary, path)
            return digest
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch(self, name: str, file: FileIO) -> str:
        """Write an object's parts where they belong, several at a time, and hash each when those before it are there.

        s3transfer would not say which parts it has written; into a file that cannot seek it writes them in order, but
        waits for ever beyond ten.
        """
        head = self._client.head_object(Bucket=self._bucket, Key=name)
        size, step = int(head["ContentLength"]), int(_TRANSFER.multipart_chunksize)
        hashed = sha256()

        def fetch(start: int) -> int:
            end = min(start + step, size)

            def write(body: Any) -> None:
                at = start
                for chunk in body.iter_chunks(_CHUNK):
                    at += os.pwrite(file.fileno(), chunk, at)
                if at != end:
                    raise ObjectDamaged(f"{self.url}/{name}: bytes {start} to {at} came when {end} was asked for")

            self._read(write, Key=name, Range=f"bytes={start}-{end - 1}", IfMatch=head["ETag"])
            return end - start

        with ThreadPoolExecutor(_TRANSFER.max_concurrency) as pool:
            for length in pool.map(fetch, range(0, size, step)):
                for at in range(0, length, _CHUNK):
                    hashed.update(file.read(min(_CHUNK, length - at)))
        return hashed.hexdigest()

    def _name(self, key: str) -> str:
        """The key within the bucket."""
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _head(self, name: str) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = self._client.head_object(Bucket=self._bucket, Key=name)
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise
        return head

    @contextmanager
    def _errors_named(self, doing: str, key: str) -> Iterator[None]:
        """Turn boto3's errors into the store's. No message holds a secret: none of boto3's does."""
        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise self._named(error, doing, key) from error

    def _named(self, error: Exception, doing: str, key: str) -> LuthierError:
        what = f"cannot {doing} {self.url}/{key} at {self._endpoint}"
        if isinstance(error, ClientError):
            return self._named_answer(error, what, key)
        if isinstance(error, _NO_CREDENTIALS):
            return StoreDenied(f"{what}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
        if isinstance(error, ParamValidationError):  # in practice a bucket's name
            return ConfigError([Fault("store", self.url, str(error))])
        if isinstance(error, _NO_ANSWER):
            return StoreUnreachable(
                f"{what}: no usable answer, attempts made: {self._patience.max_attempts} ({error}); "
                "is the server up, and is AWS_ENDPOINT_URL right?"
            )
        return StoreError(f"{what}: {error}")

    def _named_answer(self, error: ClientError, what: str, key: str) -> LuthierError:
        code, status = _code(error), _status(error)
        said = f"{code} {error.response['Error'].get('Message', '')}".strip()
        if code == "NoSuchBucket":
            message = f"bucket {self._bucket} does not exist at {self._endpoint}; create it or correct `store:`"
            return ConfigError([Fault("store", self.url, message)])
        if code in _WRONG_REGION_CODES:
            message = f"{self._endpoint} answers {said}; set AWS_REGION to the region of bucket {self._bucket}"
            return ConfigError([Fault("store", self.url, message)])
        if status in (401, 403) or code in _DENIED_CODES:
            return StoreDenied(
                f"{what}: refused ({said}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, "
                f"and that this key may do so in bucket {self._bucket}"
            )
        if status == 404:
            return ObjectNotFound(f"{self.url}/{key} does not exist at {self._endpoint}")
        if status == 412:
            return ObjectDamaged(f"{what}: it was replaced while it was read; try again")
        if status == 501:
            return StoreUnfit(f"{what}: the server does not implement it ({said}); use AWS S3, Ceph, MinIO or R2")
        if status >= 500 or status == 429 or code in ("SlowDown", "ConditionalRequestConflict"):
            return StoreUnreachable(
                f"{what}: the server still answers {status} ({said}), attempts made: {self._patience.max_attempts}; "
                "look at the server, or try again later"
            )
        return StoreError(f"{what}: the server answers {status} ({said})")


class _MemoryFile:
    """An mmap as a file to upload from, with a position of its own.

    s3transfer would take the mmap itself, but closes what it has sent in one piece. It reads a large one in parts of
    16 MiB, of which it holds ten at a time. A slice is a copy, so nothing here keeps the mmap from being closed.
    """

    def __init__(self, data: mmap) -> None:
        self._data = data
        self._position = 0

    def read(self, amount: int | None = None) -> bytes:
        start = self._position
        self._position = len(self._data) if amount is None else min(start + amount, len(self._data))
        return self._data[start : self._position]

    def seek(self, where: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._data)}[whence]
        self._position = start + where
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def secret(name: str) -> str:
    """The value of a secret of AWS Secrets Manager, by its name or ARN. Raises StoreError, which does not tell it."""
    try:
        client = _session().client("secretsmanager", config=_config(OPENING))
        return str(client.get_secret_value(SecretId=name)["SecretString"])
    except (BotoCoreError, ClientError, ValueError) as error:
        raise StoreError(f"AWS Secrets Manager does not give {name}: {error}") from None
    except KeyError:
        raise StoreError(f"the secret {name} is binary; keep it as text") from None


def _session() -> Any:
    """A session of its own, which reads the AWS variables as they are now, with the model files read only once."""
    core = botocore.session.get_session()
    core.register_component("data_loader", _loader())
    return boto3.session.Session(botocore_session=core)


@functools.cache
def _loader() -> Any:
    # Parsing the description of S3 takes most of a client's 0.1 s of CPU time, and a process opens several stores.
    return botocore.loaders.create_loader()


def _config(patience: Patience) -> Config:
    return Config(
        connect_timeout=patience.connect_timeout_s,
        read_timeout=patience.read_timeout_s,
        tcp_keepalive=True,
        max_pool_connections=32,  # threads of one store beyond this number wait for each other
        # botocore's own retries, because only they can repeat a single part of a transfer. `standard` retries
        # connection errors, 500, 502, 503, 504 and SlowDown with full jitter. `adaptive` would also hold back
        # requests before they fail, on a guess of the server's rate shared by all threads: one slow burst
        # would then stall a checkpoint.
        retries={"mode": "standard", "total_max_attempts": patience.max_attempts},
        # The newer checksum trailers are not understood by every S3-compatible server. Without them botocore signs
        # the SHA-256 of every body, over TLS too, and the server refuses a body that arrived changed.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _pause(attempt: int) -> None:
    time.sleep(random.uniform(0.0, min(2.0 ** (attempt - 1), 20.0)))  # noqa: S311 (spreads load, hides nothing)


def _code(error: ClientError) -> str:
    return str(error.response["Error"].get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
