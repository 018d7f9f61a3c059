"""What the ingress must mind of Serve, where only a busy machine would show it over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.serve import context
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.types import Message

from cluster import registry
from cluster.errors import InputError
from cluster.folder import FolderStore
from cluster.models import ModelConfig
from cluster.records import AdapterRecord, BaseModelRef
from serving.ingress import Ingress
from tests.serving.endpoint import free_port, serving_config

BASE = BaseModelRef(name="base", revision="r1", licence="apache-2.0")


class Replicas:
    """A handle that notes under which of Serve's request ids it is called."""

    def __init__(self) -> None:
        self.asked: list[tuple[AdapterRecord, str]] = []
        self.prefetch = self

    def options(self, **_: Any) -> "Replicas":
        return self

    def remote(self, record: AdapterRecord) -> "asyncio.Future[None]":
        self.asked.append((record, context._get_serve_request_context()._internal_request_id))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


def ingress_of(store: FolderStore, root: Path, replicas: Any) -> Ingress:
    model = ModelConfig(name="base", source=str(root), licence="apache-2.0", dtype="fp32")
    return Ingress(serving_config(model, store.url, free_port()), BASE, replicas)


def test_an_adapter_is_loaded_ahead_under_an_id_of_its_own(tmp_path: Path) -> None:
    """Under the id of the request that saw the alias move, Serve's router forgot one of the two, for ever."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "adapter_config.json").write_text("{}")
    (tmp_path / "made" / "adapter_model.safetensors").write_bytes(b"1")
    store = FolderStore(tmp_path / "store")
    record = registry.publish(store, "a", tmp_path / "made", BASE, "run", 1)
    replicas = Replicas()

    async def main() -> None:
        ingress = ingress_of(store, tmp_path, replicas)
        context._serve_request_context.set(context._RequestContext(_internal_request_id="the request's"))
        await ingress._prefetch(record)

    asyncio.run(main())
    assert replicas.asked == [(record, "")]


def test_a_store_that_is_away_is_not_made_anew_and_empty(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "away")
    with pytest.raises(InputError, match="there is no store at"):
        ingress_of(store, tmp_path, Replicas())
    assert not (tmp_path / "store").exists()


class Full:
    """A handle whose queue is full."""

    def __init__(self) -> None:
        self.generate = self

    def options(self, **_: Any) -> "Full":
        return self

    def remote(self, call: Any) -> "Full":
        return self

    async def __aiter__(self) -> AsyncIterator[None]:
        raise BackPressureError(num_queued_requests=256, max_queued_requests=256)
        yield

    def cancel(self) -> None: ...


def test_a_full_queue_in_front_of_the_replicas_is_a_429(tmp_path: Path) -> None:
    async def body() -> Message:
        said = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}
        return {"type": "http.request", "body": json.dumps(said).encode()}

    async def main() -> None:
        ingress = ingress_of(FolderStore(tmp_path / "store"), tmp_path, Full())
        answer = await ingress.chat(Request({"type": "http", "method": "POST", "headers": []}, body))
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert "256 requests wait already" in bytes(answer.body).decode()

    asyncio.run(main())
