"""Real S3 servers for tests: ministack (an emulator, 0.5 s to start) and Ceph's object gateway (the real thing, 15 s).

    with ministack() as server:                 # or ceph()
        subprocess.run(…, env={**os.environ, **server.env})

Both check credentials. `shared(name)` starts a server at its first use and keeps it until the process ends, so that
test modules in different folders use the same one.
"""

import atexit
import contextlib
import functools
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3.session
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

REPOSITORY = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 120.0
HOST = "127.0.0.1"
CEPH_PROGRAMS = (
    "ceph", "ceph-authtool", "ceph-mgr", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin",
)  # fmt: skip


@dataclass(frozen=True)
class S3Server:
    """A running server with one empty bucket, and a key that may do anything in it."""

    host: str
    port: int
    access_key: str
    secret_key: str
    bucket: str = "luthier"

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The standard AWS variables, and nothing of the AWS files of whoever runs the tests."""
        return aws_env(self.endpoint, self.access_key, self.secret_key)


def aws_env(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@functools.cache
def shared(name: str) -> S3Server:
    """The `ministack` or `ceph` of this process. Skips the test that asks if the server cannot run here."""
    kinds: dict[str, Callable[[], AbstractContextManager[S3Server]]] = {"ministack": ministack, "ceph": ceph}
    stack = contextlib.ExitStack()
    server = stack.enter_context(kinds[name]())
    atexit.register(stack.close)
    return server


@contextmanager
def ministack(services: str = "s3,iam,sts", host: str = HOST) -> Iterator[S3Server]:
    """An in-memory emulator whose conditional requests are right; refuses wrong, unknown and missing credentials."""
    with tempfile.TemporaryDirectory(prefix="ministack-") as folder:
        port = free_ports(1)
        settings = {
            "AUTH": "true",
            "BIND_HOST": host,
            "GATEWAY_PORT": str(port),
            "IOT_MTLS_ENABLED": "false",  # or it listens on every interface
            "SERVICES": services,
            "TMPDIR": folder,
        }
        with running([sys.executable, "-m", "ministack"], settings, Path(folder), port, host):
            # The root key's signature is not checked, so it only makes a user; tests use that user's key.
            iam = _client("iam", S3Server(host, port, "test", "test"))
            iam.create_user(UserName="luthier")
            allow = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
            iam.put_user_policy(UserName="luthier", PolicyName="s3", PolicyDocument=policy)
            key = iam.create_access_key(UserName="luthier")["AccessKey"]
            server = S3Server(host, port, key["AccessKeyId"], key["SecretAccessKey"])
            _make_bucket(server)
            yield server


@contextmanager
def ceph() -> Iterator[S3Server]:
    """Ceph's object gateway, started by scripts/ceph-rgw; skips the test where Ceph is not installed."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [program for program in CEPH_PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        packages = "ceph-mon ceph-osd ceph-mgr radosgw"
        pytest.skip(f"Ceph is not installed (no {', '.join(missing)}); Debian's packages are {packages}")
    # Not pytest's tmp_path: the path of a daemon's socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ceph-", ignore_cleanup_errors=True) as folder:
        port = free_ports(3)
        server = S3Server(HOST, port, "LUTHIERTESTKEY", "luthier-test-secret")
        script = str(REPOSITORY / "scripts" / "ceph-rgw")
        command = [script, f"{folder}/data", str(port), server.access_key, server.secret_key]
        with running(command, {}, Path(folder), port):
            _make_bucket(server)
            yield server


class StubS3(ThreadingHTTPServer):
    """The least of an S3 server that keeps objects. It ignores If-None-Match, as several real ones do."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.objects: dict[str, bytes] = {}
        self.answers: list[tuple[int, str]] = []  # status and code for the next PUTs; then they are served
        self.puts: list[str] = []


class StubHandler(BaseHTTPRequestHandler):
    server: StubS3
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.puts.append(self.path)
        if self.server.answers:
            self.answer(*self.server.answers.pop(0))
        else:
            self.server.objects[self.path] = data
            self.answer(200)

    def do_DELETE(self) -> None:
        self.server.objects.pop(self.path, None)
        self.answer(204)

    def answer(self, status: int, code: str = "") -> None:
        body = f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode() if code else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class names it)
        pass


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that are free on loopback.

    Below 32768, where Linux begins to hand out ports by itself, so nobody takes one by chance before we do.
    """
    for _ in range(200):
        first = random.randrange(20000, 32000)
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind((HOST, port))
            except OSError:
                continue
            return first
    raise RuntimeError(f"no {count} neighbouring free ports between 20000 and 32000")


@contextmanager
def running(command: list[str], settings: dict[str, str], folder: Path, port: int, host: str = HOST) -> Iterator[None]:
    """`command` in a process group of its own, from its first answer over HTTP until the block ends."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(host, port):
            if process.poll() is not None or time.monotonic() > deadline:
                end = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{command[0]} gives no answer on port {port}; its log ends:\n{end}")
            time.sleep(0.1)
        yield
    finally:
        # Nothing of it is kept, so there is nothing to shut down in order.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _make_bucket(server: S3Server) -> None:
    client = _client("s3", server)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            client.create_bucket(Bucket=server.bucket)
        except ClientError:  # a gateway may answer before its first user is known to it
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _client(service: str, server: S3Server) -> Any:
    return boto3.session.Session().client(
        service,
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(request_checksum_calculation="when_required"),
    )
