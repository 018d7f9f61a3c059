"""From a laptop that reaches a cluster's dashboard and nothing else."""

import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from cluster import ledger
from cluster.errors import PlanError
from cluster.nodes import LocalCluster
from cluster.processes import free_ports
from cluster.store import open_store
from cluster.submit import Cluster, Submission
from jobs import runs
from tests.conftest import TinyModels
from tests.e2e.submit import luthier, write_recipe
from tests.faults.proxy import Proxy

LINES = 400


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with jobs in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "count.py").write_text(
        f"import time\nfor number in range({LINES}):\n    print('line', number, flush=True)\n    time.sleep(0.02)\n"
    )
    (folder / "fail.py").write_text("import sys\nprint('no')\nsys.exit(2)\n")
    return folder


def job(name: str, *command: str) -> Submission:
    return Submission(name, ["python", *command], does="this", metadata={"user": "somebody"})


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate()
    return process.returncode, out, err


def test_two_submits_at_once_are_one_run_and_a_third_shows_it(
    ray_cluster: LocalCluster, tiny_models: TinyModels, rows: Path, tmp_path: Path
) -> None:
    store = f"file://{tmp_path}/store"
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="twice", store=store)
    same = ("submit", str(recipe), "train.steps=2", "cluster.shared=true", "cluster.driver_cpus=0.5")
    pair = [luthier(ray_cluster, *same, LOGNAME="ann") for _ in range(2)]
    results = [ended(process) for process in pair]
    assert [code for code, _, _ in results] == [0, 0], results
    (run_id,) = runs.run_ids(open_store(store))
    assert all(run_id in out for _, out, _ in results)  # both followed it
    assert sum("was submitted before" in out for _, out, _ in results) == 1
    code, out, _ = ended(luthier(ray_cluster, *same, LOGNAME="ann"))
    assert code == 0
    assert "was submitted before" in out
    assert out.startswith("ray job submit --address http://127.0.0.1:")
    assert len(runs.run_ids(open_store(store))) == 1
    alone, *_, last = ledger.read_all(open_store(store))
    assert {alone.user, last.user} == {"ann"}, "whoever submitted, not the driver's own user"
    assert [(line.holder, line.amount) for line in alone.lines] == [("driver", Decimal("0.5"))], "before its workers"
    assert {line.holder for line in last.lines} == {"driver"}
    other = ended(luthier(ray_cluster, "submit", str(recipe), "train.steps=3", "--detach"))
    assert other[0] == 0
    assert "was submitted before" not in other[1]


def test_the_log_is_whole_though_the_connection_breaks(
    laptop: LocalCluster, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = int(laptop.dashboard_url.rpartition(":")[2])
    with Proxy("127.0.0.1", port) as proxy:
        cluster = Cluster(f"http://127.0.0.1:{proxy.port}")
        submission_id, was_there = cluster.submit(job("count", "count.py"), work)
        assert not was_there
        proxy.cut("down", after_bytes=1500, times=4)
        assert cluster.follow(submission_id) == 0
        assert proxy.fired == 4
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("line")] == [f"line {n}" for n in range(LINES)]


def test_a_failure_has_the_drivers_exit_code_and_may_be_submitted_again(laptop: LocalCluster, work: Path) -> None:
    cluster = Cluster(laptop.dashboard_url)
    first, _ = cluster.submit(job("fail", "fail.py"), work)
    assert cluster.follow(first) == 2
    second, was_there = cluster.submit(job("fail", "fail.py"), work)
    assert not was_there
    assert second == f"{first}-2"
    cluster.follow(second)


def test_success_is_run_once_more_only_when_it_is_asked_for(laptop: LocalCluster, work: Path) -> None:
    (work / "count.py").write_text("print('done')")
    cluster = Cluster(laptop.dashboard_url)
    first, _ = cluster.submit(job("once", "count.py"), work)
    assert cluster.follow(first) == 0
    assert cluster.submit(job("once", "count.py"), work) == (first, True)
    assert cluster.submit(job("once", "count.py"), work, again=True) == (f"{first}-2", False)


def test_what_is_wrong_with_the_cluster_is_said_before_anything_is_sent(
    ray_cluster: LocalCluster, tiny_models: TinyModels, rows: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_models["qwen3"], [rows], name="refused", store=f"file://{tmp_path}/store")
    (closed,) = free_ports(1)
    wrong = tmp_path / "token"
    wrong.write_text("f" * 64)
    cases: list[tuple[Callable[[], subprocess.Popen[str]], str]] = [
        (lambda: luthier(ray_cluster, "submit", str(recipe), RAY_AUTH_TOKEN_PATH=str(wrong)), "refuses the token"),
        (lambda: luthier(ray_cluster, "submit", str(recipe), RAY_AUTH_MODE="disabled"), "refuses the token"),
        (
            lambda: luthier(ray_cluster, "submit", str(recipe), "--address", f"http://127.0.0.1:{closed}"),
            "does the cluster run",
        ),
        (lambda: luthier(ray_cluster, "submit", str(recipe), "--address", ray_cluster.address), "is not a dashboard"),
        (lambda: luthier(ray_cluster, "submit", str(recipe), RAY_ADDRESS=""), "--address"),
        (lambda: luthier(ray_cluster, "submit", str(recipe), "cluster.address=local"), "name a cluster"),
        (lambda: luthier(ray_cluster, "submit", str(recipe), 'data.train=["rows.jsonl"]'), "is not sent along"),
    ]
    for start, wanted in cases:
        code, out, err = ended(start())
        assert code == 2, (wanted, out, err)
        assert wanted in err
        assert "Traceback" not in err
    assert not (tmp_path / "store").exists()


def test_another_ray_is_refused(laptop: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.submit.version", lambda name: "2.59.0")
    with pytest.raises(PlanError, match=r"the cluster has Ray 2\.\d+\.\d+, and this is 2\.59\.0"):
        Cluster(laptop.dashboard_url)
