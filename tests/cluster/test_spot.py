"""Notices of three clouds, told by a real HTTP service in each one's own words."""

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from cluster import spot

Answers = dict[tuple[str, str], Callable[[dict[str, str]], tuple[int, str]]]


@pytest.fixture
def answers() -> Answers:
    """(method, path) → what the service makes of the request's headers."""
    return {}


@pytest.fixture
def client(answers: Answers) -> Iterator[httpx.Client]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            found = answers.get((self.command, self.path.partition("?")[0]), lambda _: (404, ""))
            code, text = found({name.lower(): value for name, value in self.headers.items()})
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = answer  # noqa: N815 - http.server's names

        def log_message(self, *parts: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}") as opened:
        yield opened
    server.shutdown()
    server.server_close()


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(seconds=100)


def test_amazon(client: httpx.Client, answers: Answers) -> None:
    answers["PUT", "/latest/api/token"] = lambda headers: (
        (200, "t") if "x-aws-ec2-metadata-token-ttl-seconds" in headers else (400, "")
    )
    assert spot.aws(client) is None
    text = json.dumps({"action": "terminate", "time": f"{soon():%Y-%m-%dT%H:%M:%SZ}"})
    answers["GET", "/latest/meta-data/spot/instance-action"] = lambda headers: (
        (200, text) if headers.get("x-aws-ec2-metadata-token") == "t" else (401, "")
    )
    assert spot.aws(client) == pytest.approx(100, abs=5)


def test_google(client: httpx.Client, answers: Answers) -> None:
    said = ["FALSE"]
    answers["GET", "/computeMetadata/v1/instance/preempted"] = lambda headers: (
        (200, said[-1]) if headers.get("metadata-flavor") == "Google" else (403, "")
    )
    assert spot.gcp(client) is None
    said.append("TRUE")
    assert spot.gcp(client) == 30


def test_microsoft_tells_of_other_machines_too(client: httpx.Client, answers: Answers) -> None:
    events: list[dict[str, object]] = []
    answers["GET", "/metadata/scheduledevents"] = lambda headers: (
        (200, json.dumps({"Events": events})) if headers.get("metadata") == "true" else (400, "")
    )
    answers["GET", "/metadata/instance/compute/name"] = lambda _: (200, "ours")
    assert spot.azure(client) is None
    events += [
        {"EventType": "Preempt", "Resources": ["another"], "NotBefore": ""},
        {"EventType": "Reboot", "Resources": ["ours"], "NotBefore": ""},
    ]
    assert spot.azure(client) is None
    events.append({"EventType": "Preempt", "Resources": ["ours"], "NotBefore": format_datetime(soon(), usegmt=True)})
    assert spot.azure(client) == pytest.approx(100, abs=5)
    events.append({"EventType": "Preempt", "Resources": ["ours"], "NotBefore": ""})  # it has begun
    assert spot.azure(client) == 0


def test_a_service_that_does_not_answer_is_asked_again(
    client: httpx.Client, answers: Answers, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spot, "POLL_S", 0.01)
    asked = iter([(500, ""), (200, "no time"), (503, ""), (200, "TRUE")])
    answers["GET", "/computeMetadata/v1/instance/preempted"] = lambda _: next(asked)
    assert spot.watch(spot.gcp, str(client.base_url)) == 30
    assert capfd.readouterr().out.count("gives no answer to use") == 1
