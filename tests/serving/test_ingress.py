"""What the ingress must mind of Serve, where only a busy machine would show it over HTTP."""

import asyncio
from pathlib import Path
from typing import Any

from ray.serve import context

from cluster import registry
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


def test_an_adapter_is_loaded_ahead_under_an_id_of_its_own(tmp_path: Path) -> None:
    """Under the id of the request that saw the alias move, Serve's router forgot one of the two, for ever."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "adapter_config.json").write_text("{}")
    (tmp_path / "made" / "adapter_model.safetensors").write_bytes(b"1")
    store = FolderStore(tmp_path / "store")
    record = registry.publish(store, "a", tmp_path / "made", BASE, "run", 1)
    model = ModelConfig(name="base", source=str(tmp_path), licence="apache-2.0", dtype="fp32")
    replicas = Replicas()

    async def main() -> None:
        handle: Any = replicas
        ingress = Ingress(serving_config(model, store.url, free_port()), BASE, handle)
        context._serve_request_context.set(context._RequestContext(_internal_request_id="the request's"))
        await ingress._prefetch(record)

    asyncio.run(main())
    assert replicas.asked == [(record, "")]
