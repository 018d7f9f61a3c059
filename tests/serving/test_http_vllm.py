"""The whole serving side over real HTTP with `engine: vllm`: a client gets what the native engine would give it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jsonschema
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


@pytest.fixture(scope="module")
def served(unserved: Served) -> Served:
    return deployed(unserved, VllmConfig(python=str(PYTHON), kv_bytes=2**26, max_adapters=2, max_rank=8))


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


def test_the_base_and_its_adapters_answer_over_http(served: Served) -> None:
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


def test_an_answer_is_held_to_its_schema_and_what_cannot_be_held_to_is_a_400(served: Served) -> None:
    client = served.client()
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }

    def ask(schema: dict[str, Any], **given: Any) -> Any:
        form: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
        # 450 tokens hold the longest answer there is, all its whitespace included.
        return client.chat.completions.create(
            model="plain", messages=MESSAGES, max_tokens=450, seed=3, response_format=form, **given
        )

    answer = ask(schema, n=3, presence_penalty=0.5)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), schema)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(schema, presence_penalty=0.5, stream=True))
    assert streamed == answer.choices[0].message.content
    word = client.completions.create(
        model=BASE, prompt="a", max_tokens=16, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert word.choices[0].text in ("yes", "no")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            ask({"type": "array", "uniqueItems": True}, stream=stream)
        assert caught.value.param == "response_format"
        by_vllm: Any = {"model": BASE, "prompt": "a", "extra_body": {"structured_outputs": {"regex": "a\0b"}}}
        with pytest.raises(openai.BadRequestError, match=r"by vLLM: .*NUL") as caught:
            client.completions.create(**by_vllm, stream=stream)
        assert caught.value.param == "structured_outputs"
        with pytest.raises(openai.BadRequestError, match="native engine") as caught:
            ask(schema, logprobs=True, stream=stream)
        assert caught.value.param == "logprobs"
