"""The whole serving side over real HTTP with `engine: vllm`: a client gets what the native engine would give it."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import openai
import pytest
from ray import serve

from cluster import models, registry
from cluster.errors import ModelError, RunFailed
from cluster.folder import FolderStore
from cluster.models import ModelConfig
from serving import deploy
from serving.config import VllmConfig
from serving.engine.vllm_command import find_python
from tests.serving.conftest import NEAR_TIE, RECIPES, LoraRecipe, TinyModel, make_tokenizer
from tests.serving.endpoint import APPLICATION, BASE, Served, free_port, serving_config

try:
    PYTHON = find_python(None)
except ModelError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

MESSAGES: list[Any] = [{"role": "user", "content": "Sort the numbers 3 1 2."}]
PROMPT = "<|user|>Sort the numbers 3 1 2.<|end|><|assistant|>"


@pytest.fixture(scope="module")
def unserved(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A store with a base and two adapters, each under `stable`; nothing is deployed yet."""
    model = TinyModel(tmp_path_factory.mktemp("vllm"), "qwen3", head_dim=32)
    store = FolderStore(tmp_path_factory.mktemp("serving") / "store")
    config = ModelConfig(name=BASE, source=str(model.folder), licence="apache-2.0", dtype="fp32")
    recipes = {"plain": RECIPES[0], "patterns": RECIPES[4]}
    with ExitStack() as opened:
        made = Served("", store, models.pin(config, store), model, recipes, opened)
        for name, recipe in recipes.items():
            registry.set_alias(store, name, "stable", made.publish(name, recipe), why="test")
        yield made


def deployed(unserved: Served, engine: VllmConfig) -> Served:
    model = ModelConfig(name=BASE, source=str(unserved.model.folder), licence="apache-2.0", dtype="fp32")
    config = serving_config(model, unserved.store.url, free_port()).model_copy(update={"engine": engine})
    return replace(unserved, url=deploy.deploy(config, 600.0, lambda line: None))


def expected_answer(served: Served, recipe: LoraRecipe | None) -> tuple[str, str, int]:
    """What peft and `generate` answer: the text, why it ends, and its tokens."""
    prompt = list(make_tokenizer()(PROMPT, add_special_tokens=False)["input_ids"])
    expected = served.model.expected(recipe, prompt, 8)
    assert min(expected.margins) > NEAR_TIE, "this prompt lies on a near tie, choose another"
    text = str(make_tokenizer().decode(expected.tokens, skip_special_tokens=True))
    return text, "stop" if expected.tokens[-1] == 1 else "length", len(expected.tokens)


def test_a_node_without_the_environment_is_told_before_anything_is_served(unserved: Served) -> None:
    with pytest.raises(RunFailed, match=r"no vLLM environment on this node: /nowhere/python .* scripts/setup-vllm"):
        deployed(unserved, VllmConfig(python="/nowhere/python"))
    serve.shutdown()


def test_the_base_and_its_adapters_answer_over_http(unserved: Served) -> None:
    served = deployed(unserved, VllmConfig(python=str(PYTHON), kv_bytes=2**26, max_adapters=2, max_rank=8))
    client = served.client()
    generated = 0
    for name, recipe in (("base", None), *served.recipes.items()):
        model = BASE if recipe is None else name
        answer = client.chat.completions.with_raw_response.create(
            model=model, messages=MESSAGES, max_tokens=8, temperature=0
        )
        choice = answer.parse().choices[0]
        text, end, tokens = expected_answer(served, recipe)
        assert (choice.message.content, choice.finish_reason) == (text, end)
        generated += 2 * tokens
        assert answer.headers["x-luthier-adapter"] == (BASE if recipe is None else f"{name}@1")
        pieces = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text
    with pytest.raises(openai.NotFoundError, match="patterns"):
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    (replica,) = deploy.status(APPLICATION)[1]
    assert replica.alive
    assert set(replica.adapters) == {"plain@1", "patterns@1"}
    assert replica.generated_tokens == generated
