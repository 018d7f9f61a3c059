"""What the HTTP tests need of a running endpoint: its address, its store, its model, and how to wait."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import openai

from cluster import models, registry
from cluster.folder import FolderStore
from cluster.models import ModelConfig
from cluster.records import BaseModelRef
from serving import deploy
from serving.calls import ReplicaStatus
from serving.config import AdaptersConfig, EngineConfig, HttpConfig, ReplicaConfig, ServingConfig
from tests.serving.conftest import LoraRecipe, TinyModel

APPLICATION = "tiny-serving"
BASE = "tiny"
NAMES = tuple(f"skill-{number}" for number in range(8))
ALIAS_REFRESH_S = 0.5
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Served:
    """A running endpoint and what is behind it."""

    url: str
    store: FolderStore
    base: BaseModelRef
    model: TinyModel
    recipes: dict[str, LoraRecipe]
    opened: ExitStack  # of the fixture: closes what is opened here

    def client(self) -> openai.OpenAI:
        """The official client, without retries: a refused request must be seen."""
        return self.opened.enter_context(
            openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=DEADLINE_S)
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=DEADLINE_S)

    def publish(self, name: str, recipe: LoraRecipe, base: BaseModelRef | None = None) -> int:
        record = registry.publish(
            self.store, name, self.model.adapter(recipe), base or self.base, f"run-{recipe.seed}", recipe.seed
        )
        return record.version

    def status(self) -> ReplicaStatus:
        (replica,) = self.replicas()
        return replica

    def replicas(self) -> list[ReplicaStatus]:
        return deploy.status(APPLICATION)[1]


@contextmanager
def deployed(model: TinyModel, folder: Path, num_replicas: int = 1) -> Iterator[Served]:
    """The application on the Ray that runs here, with eight adapters in a store in `folder`, each under `stable`."""
    store = FolderStore(folder / "store")
    model_config = ModelConfig(name=BASE, source=str(model.folder), licence="apache-2.0", dtype="fp32")
    base = models.pin(model_config, store)
    recipes = {name: LoraRecipe(100 + number, r=2 + number % 3) for number, name in enumerate(NAMES)}
    with ExitStack() as opened:
        unserved = Served("", store, base, model, recipes, opened)
        for name, recipe in recipes.items():
            registry.set_alias(store, name, "stable", unserved.publish(name, recipe), why="test")
        config = serving_config(model_config, store.url, free_port(), num_replicas)
        yield replace(unserved, url=deploy.deploy(config, DEADLINE_S * 3, lambda line: None))


def poll(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` holds. Only a failure takes the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def serving_config(model: ModelConfig, store: str, port: int, num_replicas: int = 1) -> ServingConfig:
    return ServingConfig(
        name=APPLICATION,
        model=model,
        store=store,
        engine=EngineConfig(max_adapters=8, max_rank=8, kv_tokens=8192, max_batch_tokens=256, max_running=48),
        replicas=ReplicaConfig(min=num_replicas, max=num_replicas, drain_timeout_s=30.0, cpus=0.5),
        http=HttpConfig(port=port),
        adapters=AdaptersConfig(alias_refresh_s=ALIAS_REFRESH_S, retry_failed_s=1.0),
    )
