"""The S3 server that ours and the peers are measured on: one of its own, on loopback, gone when the benchmark ends.

    with started() as server:        # Ceph's object gateway where it is installed (20 s), else an emulator
        os.environ |= server.variables

An emulator answers as a real server does, but at another speed, so `server.name` belongs into what is printed.
"""

import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3.session
from botocore.exceptions import BotoCoreError, ClientError

from cluster.errors import RunFailed
from scripts.benchmarks.report import REPOSITORY

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
CEPH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
CEPH_PROGRAMS = ("ceph", "ceph-mgr", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_ACCESS_KEY, _SECRET_KEY = "LUTHIERBENCHKEY", "luthier-bench-secret"


@dataclass(frozen=True)
class ObjectServer:
    """A running server with one empty bucket."""

    name: str
    port: int
    bucket: str = "luthier"

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def variables(self) -> dict[str, str]:
        """The standard AWS variables, and nothing of the AWS files of whoever runs this."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def is_ceph_installed() -> bool:
    """Whether `started` gives a real server."""
    return all(shutil.which(program, path=CEPH_PATH) for program in CEPH_PROGRAMS)


@contextmanager
def started() -> Iterator[ObjectServer]:
    """A server until the block ends. Raises RunFailed."""
    # A short path: that of a daemon's socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="luthier-s3-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port = _free_ports(3)
        if is_ceph_installed():
            command = [str(REPOSITORY / "scripts" / "ceph-rgw"), f"{folder}/data", str(port), _ACCESS_KEY, _SECRET_KEY]
            settings = {}
            server = ObjectServer(_ceph_version(), port)
        else:
            command = [sys.executable, "-m", "ministack"]
            settings = {
                "BIND_HOST": HOST,
                "GATEWAY_PORT": str(port),
                "IOT_MTLS_ENABLED": "false",  # or it listens on every interface
                "SERVICES": "s3",
                "TMPDIR": name,
            }
            server = ObjectServer("ministack, an emulator", port)
        with _running(command, settings, folder / "server.log", server):
            yield server


@contextmanager
def _running(command: list[str], settings: dict[str, str], log: Path, server: ObjectServer) -> Iterator[None]:
    """`command` in a process group of its own, from the moment that it has made the bucket until the block ends."""
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
        while not (_answers(server.port) and _has_bucket(server)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunFailed(
                    f"{command[0]} serves nothing; its log ends:\n{log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.2)
        yield
    finally:
        # Nothing of it is kept, so there is nothing to shut down in order.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ceph_version() -> str:
    program = shutil.which("radosgw", path=CEPH_PATH) or "radosgw"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.split()
    return f"Ceph {said[2]}'s object gateway" if len(said) > 2 else "Ceph's object gateway"


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _has_bucket(server: ObjectServer) -> bool:
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=_ACCESS_KEY,
        aws_secret_access_key=_SECRET_KEY,
    )
    try:
        client.create_bucket(Bucket=server.bucket)
    except (BotoCoreError, ClientError):  # a gateway may answer before its first user is known to it
        return False
    return True


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that are free, below those that Linux hands out by itself."""
    for _ in range(200):
        first = random.randrange(20_000, 32_000)
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind((HOST, port))
            except OSError:
                continue
            return first
    raise RunFailed(f"no {count} neighbouring free ports between 20000 and 32000")
