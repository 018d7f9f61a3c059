"""Following a job that has ended unseen: its log has gone with its node, or the dashboard knows it no longer.

tests/e2e/test_autoscaling.py has the same from a real cluster.
"""

import asyncio
import threading
from collections.abc import Iterator
from importlib.metadata import version
from platform import python_version

import pytest
from aiohttp import web

from cluster.submit import Cluster, Submission

pytestmark = pytest.mark.timeout(60)

ENDED = {"status": "FAILED", "message": "no", "driver_exit_code": 2}
PRINTED = "step 1\nstep 2\n"


class Dashboard:
    """Answers as Ray's does. The log ends after what is left of it."""

    def __init__(self) -> None:
        self.tails = [PRINTED, PRINTED[:7]]
        self.closes_in_order = False
        self.node: str | None = "gone"
        self.knows_the_job = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.address = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()

    async def _serve(self) -> str:
        app = web.Application()
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/v0/cluster_metadata", self._metadata)
        app.router.add_get("/api/jobs/{id}", self._job)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"ray_version": version("ray"), "version": "4"})

    async def _metadata(self, _: web.Request) -> web.Response:
        return web.json_response({"data": {"pythonVersion": python_version()}})

    async def _job(self, _: web.Request) -> web.Response:
        if not self.knows_the_job:
            raise web.HTTPNotFound
        return web.json_response({**ENDED, "driver_node_id": self.node})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        if not self.knows_the_job:
            raise web.HTTPNotFound
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if self.tails:
            await socket.send_str(self.tails.pop(0))
        if not self.closes_in_order:
            assert request.transport
            request.transport.close()
        return socket

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    made = Dashboard()
    yield made
    made.close()


@pytest.mark.parametrize("closes_in_order", [True, False])
def test_a_job_whose_log_is_gone_has_its_exit_code(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str], closes_in_order: bool
) -> None:
    if closes_in_order:
        dashboard.closes_in_order = True
        dashboard.tails = []
    assert Cluster(dashboard.address).follow("some-job") == 2
    out, err = capsys.readouterr()
    assert out == ("" if closes_in_order else PRINTED)
    assert "the node that has it may be gone" in err


def test_a_job_that_nobody_knows_any_more_has_failed(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.knows_the_job = False
    assert Cluster(dashboard.address).follow("some-job") == 1
    assert "knows it no longer" in capsys.readouterr().err


def test_a_job_that_never_had_a_node_has_no_log(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.node, dashboard.tails, dashboard.closes_in_order = None, [], True
    assert Cluster(dashboard.address).follow("some-job") == 2
    assert capsys.readouterr().err == "job some-job: FAILED: no\n"


def test_the_address_that_is_given_goes_before_that_of_the_environment(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own client has it the other way round: a job would go to another cluster than the one that was checked."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert Cluster(dashboard.address)._client()._address == dashboard.address
    line = Submission("name", ["python", "-m", "x"], "").line(dashboard.address, "id")
    assert line.startswith(f"RAY_ADDRESS={dashboard.address} ray job submit --address {dashboard.address}")
    monkeypatch.setenv("RAY_ADDRESS", f"{dashboard.address}/")
    assert Submission("name", ["python", "-m", "x"], "").line(dashboard.address, "id").startswith("ray job submit")
