"""A quantised base over real HTTP: every answer says so, and an update that changes it never answers with the other."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
from ray import serve

from cluster import models, registry
from cluster.errors import Overloaded
from cluster.folder import FolderStore
from cluster.models import ModelConfig
from serving import deploy
from serving.app import REPLICA
from serving.calls import Call, ReplicaStatus
from serving.engine.protocol import SamplingParams
from tests.serving.conftest import NEAR_TIE, LoraRecipe, TinyModel, make_tokenizer
from tests.serving.endpoint import APPLICATION, BASE, DEADLINE_S, Served, free_port, poll, serving_config
from tests.serving.quantized import SHAPE, QuantizedTiny

SKILL = LoraRecipe(31)
PROMPT = [41, 52, 63, 74, 85, 96, 107, 118]  # on it the two bases answer differently


@pytest.fixture(scope="module")
def served(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One replica in nf4, and an adapter that was made on the base in full precision."""
    root = tmp_path_factory.mktemp("quantized")
    model = QuantizedTiny(root, "qwen3", "nf4")
    store = FolderStore(root / "store")
    config = ModelConfig(name=BASE, source=str(model.folder), licence="apache-2.0", dtype="fp32")
    with ExitStack() as opened:
        unserved = Served("", store, models.pin(config, store), model, {"skill": SKILL}, opened)
        registry.set_alias(store, "skill", "stable", unserved.publish("skill", SKILL), why="test")
        plain = serving_config(config, store.url, free_port())
        quantised = plain.model_copy(update={"engine": plain.engine.model_copy(update={"quantization": "nf4"})})
        yield replace(unserved, url=deploy.deploy(quantised, DEADLINE_S * 3, lambda line: None))


def ask(served: Served, name: str) -> httpx.Response:
    body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    return httpx.post(f"{served.url}/completions", content=json.dumps(body), timeout=60)


def text_of(model: TinyModel, recipe: LoraRecipe | None) -> str:
    expected = model.expected(recipe, PROMPT, 12)
    assert min(expected.margins) > NEAR_TIE, "this prompt lies on a near tie, choose another"
    return str(make_tokenizer().decode(expected.tokens, skip_special_tokens=True))


def test_answers_models_and_status_say_that_the_base_is_quantised(served: Served) -> None:
    for name, recipe in ((BASE, None), ("skill", SKILL)):
        answer = ask(served, name)
        assert answer.json()["choices"][0]["text"] == text_of(served.model, recipe)
        assert answer.headers["x-luthier-quantization"] == "nf4"
    listed = httpx.get(f"{served.url}/models").json()["data"]
    assert {each["id"]: each["quantization"] for each in listed} == {BASE: "nf4", "skill": "nf4"}
    status = served.status()
    assert status.quantization == "nf4"
    assert 0 < status.weight_bytes < TinyModel.load(served.model).get_memory_footprint() / 2


def test_a_replica_refuses_what_is_meant_for_the_base_in_full_precision(served: Served) -> None:
    """In the middle of an update that changes quantization alone, an ingress may still be of the other side."""
    params = SamplingParams(max_tokens=2)
    call = Call("other", served.base, None, (tuple(PROMPT),), None, 1, params, 2, stream=False)
    handle: Any = serve.get_deployment_handle(REPLICA, app_name=APPLICATION)
    with pytest.raises(Overloaded, match=r"the served base is being changed to tiny at .* in full precision"):
        list(handle.options(stream=True).generate.remote(call))


def test_an_update_takes_the_base_back_to_full_precision(served: Served, tmp_path: Any) -> None:
    config = ModelConfig(name=BASE, source=str(served.model.folder), licence="apache-2.0", dtype="fp32")
    deploy.deploy(serving_config(config, served.store.url, httpx.URL(served.url).port or 0), DEADLINE_S * 3, print)

    def statuses() -> list[ReplicaStatus]:
        return served.replicas()

    poll(lambda: [each.quantization for each in statuses()] == [None], "the new replica alone")
    poll(lambda: "x-luthier-quantization" not in ask(served, BASE).headers, "the new ingress answers")
    exact = TinyModel(tmp_path, "qwen3", **SHAPE)
    assert ask(served, BASE).json()["choices"][0]["text"] == text_of(exact, None)
    assert "quantization" not in httpx.get(f"{served.url}/models").json()["data"][0]
