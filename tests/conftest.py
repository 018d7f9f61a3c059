"""What all tests share: authentication for every Ray, one Ray cluster of separate nodes, tiny models, S3 servers.

Set before anything imports ray, which reads its variables once.
"""

import os
import secrets
import shutil

os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ["RAY_metrics_report_interval_ms"] = "1000"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from cluster.nodes import LocalCluster
from scripts.demo import tasks
from scripts.demo.model import Architecture, make_model
from tests.e2e.submit import started, write_rows
from tests.servers import S3Server, shared

hypothesis.settings.register_profile("unhurried", deadline=None)  # no test fails for a busy machine
hypothesis.settings.register_profile("guard", deadline=None, derandomize=True)  # a commit is judged by its own changes
hypothesis.settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first: what submits jobs or serves comes at the end."""
    slow = ("faults", "serving", "e2e")
    items.sort(key=lambda item: slow.index(item.path.parent.name) if item.path.parent.name in slow else -1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every test session starts with an empty cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LUTHIER_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """No process that a test module started outlives it, whatever became of the test."""
    yield
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
    started.clear()


@pytest.fixture(scope="session")
def s3() -> S3Server:
    """Ceph's object gateway where it is installed (in CI it is), else an emulator."""
    return shared("ceph" if shutil.which("radosgw") else "ministack")


@pytest.fixture(scope="session")
def ray_cluster(cache: Path, s3: S3Server) -> Iterator[LocalCluster]:
    """A head and two more nodes, each a Ray node of its own; started once for all tests that submit jobs."""
    # Ray Train looks at its workers every 2 s otherwise, and each job waits for that at its start and at its end.
    variables = {"LUTHIER_CACHE": str(cache), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", **s3.env}
    with LocalCluster(head_cpus=2, variables=variables) as cluster:
        cluster.add_node(cpus=1)
        cluster.add_node(cpus=1)
        yield cluster


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> "TinyModels":
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 chats of the quickstart's own text."""
    folder = tmp_path_factory.mktemp("rows")
    return write_rows(folder / "orders.jsonl", list(tasks.rows("orders-json", "train"))[:300])


class TinyModels:
    """Model folders with random weights, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, architecture: Architecture) -> Path:
        path = self._folder / architecture
        if not path.exists():
            make_model(path, architecture=architecture, hidden_size=64, layers=2)
        return path
