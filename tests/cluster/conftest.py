"""The stores that the contract is tested on: a folder, an emulated S3 server and Ceph."""

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from cluster.folder import FolderStore
from cluster.s3 import S3Store
from cluster.store import Store
from tests.servers import S3Server, shared

AWS_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE",
    "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE",
)  # fmt: skip

UseEnv = Callable[[dict[str, str]], None]


@pytest.fixture
def use_env(monkeypatch: pytest.MonkeyPatch) -> UseEnv:
    """Set these AWS variables and no others, until the test ends."""

    def use(env: dict[str, str]) -> None:
        for name in AWS_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture(params=["ministack", "ceph"])
def server(request: pytest.FixtureRequest, use_env: UseEnv) -> S3Server:
    """A real S3 server, with its variables set."""
    started = shared(request.param)
    use_env(started.env)
    return started


@pytest.fixture(params=["folder", "ministack", "ceph"])
def store(request: pytest.FixtureRequest, tmp_path: Path, use_env: UseEnv) -> Store:
    """An empty store of each kind; not opened by open_store, whose proof would take most of the suite's time."""
    if request.param == "folder":
        return FolderStore(tmp_path / "the store")
    started = shared(request.param)
    use_env(started.env)
    return S3Store(started.bucket, f"tests/{uuid4().hex}")
