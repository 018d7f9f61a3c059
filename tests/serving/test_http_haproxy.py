"""Serve's HAProxy mode: what clients see behind Serve's own proxy, they see behind HAProxy.

The mode is Ray's, for a whole cluster, by its environment: HAProxy hands connections to the ingresses, which route to
the replicas as they always do.
"""

import asyncio
import json
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.servers import REPOSITORY
from tests.serving.conftest import TinyModel
from tests.serving.endpoint import BASE, NAMES, Served, deployed, free_port, poll
from tests.serving.test_http import LONG, chat_body, expected_text, post


@pytest.fixture(scope="module", autouse=True)
def haproxy() -> Iterator[int]:
    """Set before Ray starts, whose processes inherit it. Gives the port of HAProxy's own metrics."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
        patch.setenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
        patch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(REPOSITORY / "scripts" / "haproxy"))
        patch.setenv("RAY_SERVE_HAPROXY_METRICS_PORT", str(port))
        patch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(free_port()))
        patch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")  # 30 s, of the fixture's end
        yield port


@pytest.fixture(scope="module")
def served(
    local_ray: None, tiny: Callable[[str], TinyModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with deployed(tiny("qwen3"), tmp_path_factory.mktemp("serving"), num_replicas=2) as served:
        yield served


def frontend_requests(port: int) -> int:
    """Requests that HAProxy has taken for Serve so far."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    (count,) = re.findall(r'^haproxy_frontend_http_requests_total\{proxy="http_frontend"\} (\S+)', text, re.MULTILINE)
    return int(float(count))


def total(served: Served, count: str) -> int:
    return sum(int(getattr(replica, count)) for replica in served.replicas())


def held(served: Served) -> list[str]:
    return [name for replica in served.replicas() for name in replica.adapters]


def test_each_adapter_stays_with_one_replica(served: Served, haproxy: int) -> None:
    """Mixed traffic, eight at a time over eight connections: each adapter is loaded once, and its answers are its own.

    Without affinity it would have to fall on the same one of two replicas six times, eight times over.
    """
    stable = {f"{name}@1" for name in NAMES}
    poll(lambda: set(held(served)) == stable, "what is stable is loaded before anybody asks for it")
    before = frontend_requests(haproxy)
    jobs = [(name, served.model.prompt(700 + turn, 5)) for turn in range(6) for name in (*NAMES, BASE)]

    async def main() -> list[str]:
        at_once = asyncio.Semaphore(8)

        async def ask(name: str, prompt: list[int]) -> str:
            async with at_once, served.async_client() as client:
                answer = await client.completions.create(model=name, prompt=prompt, max_tokens=4, temperature=0)
            return answer.choices[0].text

        return await asyncio.gather(*(ask(*job) for job in jobs))

    for (name, prompt), answer in zip(jobs, asyncio.run(main()), strict=True):
        assert answer == expected_text(served, name, prompt, 4)
    assert frontend_requests(haproxy) - before == len(jobs), "all of it went through HAProxy"
    assert set(held(served)) == stable
    # A replica tells what it has loaded a little later than it answers; on a busy machine one slips through meanwhile.
    assert len(held(served)) <= len(NAMES) + 2, "without affinity nearly all would be in both"
    assert total(served, "adapter_loads") == len(held(served))


def test_a_stream_comes_as_it_is_made(served: Served) -> None:
    given: dict[str, Any] = {"model": "skill-1", "prompt": [7] * 9, "max_tokens": LONG, "temperature": 1, "seed": 3}
    client = served.client()
    with client.completions.create(**given, stream=True, stream_options={"include_usage": True}) as stream:
        first = next(iter(stream))
        assert total(served, "running") == 1, "the first piece is here before the last is made"
        pieces = [first, *stream]
    whole = client.completions.create(**given)
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_everything(served: Served, haproxy: int, stream: bool) -> None:
    """Its body comes in a packet of its own, as the openai package sends it: see scripts/haproxy."""
    poll(lambda: total(served, "running") == 0, "idle engines")
    before = {each: total(served, each) for each in ("cancelled", "generated_tokens")}
    body = {"model": "skill-5", "prompt": [7] * 20, "max_tokens": LONG, "ignore_eos": True, "n": 4, "stream": stream}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n"
    seen = frontend_requests(haproxy)
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port), timeout=60) as client:
        client.sendall(head.encode())
        poll(lambda: frontend_requests(haproxy) > seen, "HAProxy has read the head")
        client.sendall(content)
        if stream:
            assert client.recv(1)
        poll(lambda: total(served, "running") == 4, "it runs")
    poll(lambda: total(served, "cancelled") == before["cancelled"] + 1, "the request is cancelled")
    poll(lambda: total(served, "kv_blocks_used") == 0, "all blocks are free")
    assert total(served, "running") == 0
    assert total(served, "generated_tokens") - before["generated_tokens"] < 4 * LONG


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/chat/completions", chat_body(temprature=1), 400, "unknown_parameter", "temprature"),
        ("/chat/completions", chat_body(max_tokens=512, stream=True), 400, "context_length_exceeded", "messages"),
        ("/chat/completions", b"{not json", 400, None, None),
        ("/completions", {"model": "nobody", "prompt": "a"}, 404, "model_not_found", "model"),
        ("/nothing", {}, 404, None, None),
        ("/models", {}, 405, None, None),
    ],
)
def test_errors_keep_openais_shape(
    served: Served, path: str, body: Any, status: int, code: str | None, param: str | None
) -> None:
    refused = post(served, path, body)
    assert refused.status_code == status
    assert set(refused.json()) == {"error"}
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)


def test_openais_client_reads_them_and_the_headers_arrive(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody' here"):
        served.client().models.retrieve("nobody")
    answer = post(served, "/chat/completions", json.dumps(chat_body(model="skill-2")).encode())
    assert answer.headers["x-luthier-adapter"] == "skill-2@1"
    root = served.url.removesuffix("/v1")
    assert httpx.get(f"{root}/readyz").json() == {"ready": True, "model": BASE}
