"""Every family of models: greedy tokens of a mixed batch are those of peft and `generate`, one adapter at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss import GptOssConfig

from cluster.errors import ModelError
from serving.engine import attention
from serving.engine.native import NativeOptions, load_core
from serving.engine.protocol import SamplingParams

if TYPE_CHECKING:
    from tests.serving.conftest import CoreDriver, LoraRecipe, TinyModel

    Tiny = Callable[[str], TinyModel]
    Drive = Callable[..., CoreDriver]


FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gemma3_multimodal"]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_mixed_batch_equals_generate(
    architecture: str, tiny: Tiny, drive: Drive, every_recipe: tuple[LoraRecipe, ...]
) -> None:
    model = tiny(architecture)
    driver = drive(model)
    for adapter in every_recipe:
        driver.load(adapter)
    choices = (None, *every_recipe)
    wanted: dict[str, tuple[LoraRecipe | None, list[int], int]] = {}
    # Prompts from one token to longer than a whole step; arrivals one step apart, so that prefill meets decode.
    for index, length in enumerate((1, 5, 60, 33, 2, 110, 17, 40, 3, 70, 4, 25)):
        recipe = choices[index % len(choices)]
        prompt = model.prompt(index, length)
        wanted[str(index)] = (recipe, prompt, 12)
        driver.add(str(index), prompt, model.digest(recipe), SamplingParams(max_tokens=12, temperature=0))
        driver.step()
    driver.run()
    for id_, (asked, prompt, max_tokens) in wanted.items():
        model.expected(asked, prompt, max_tokens).check(driver.tokens(id_))
    stats = driver.core.stats()
    assert stats.max_adapters_in_step >= 3
    assert stats.kv_blocks_used == 0


def test_a_mixture_of_experts_serves_its_base_and_its_attention(
    tiny: Tiny, drive: Drive, recipes: tuple[LoraRecipe, ...]
) -> None:
    """Its experts are no linear layers, so only adapters of attention can be served with it."""
    model = tiny("qwen3_moe")
    driver = drive(model)
    driver.load(recipes[0])
    for index, recipe in enumerate((None, recipes[0]) * 3):
        prompt = model.prompt(index, 5 + 20 * index)
        driver.add(str(index), prompt, model.digest(recipe), SamplingParams(max_tokens=12, temperature=0))
    driver.run()
    for index, recipe in enumerate((None, recipes[0]) * 3):
        model.expected(recipe, model.prompt(index, 5 + 20 * index), 12).check(driver.tokens(str(index)))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type dynamic"),
        ("gemma3", {"use_bidirectional_attention": True}, "attention in both directions"),
    ],
)
def test_what_a_batch_would_get_wrong_is_refused(
    architecture: str, changes: dict[str, Any], message: str, tiny: Tiny, drive: Drive, tmp_path: Path
) -> None:
    model = tiny(architecture)
    shutil.copytree(model.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=message):
        load_core(tmp_path, NativeOptions())


def test_an_attention_that_asks_for_more_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """gpt-oss has attention sinks, a keyword of its own: ignoring it would change every answer."""
    shutil.copytree(tiny("llama").folder, tmp_path, dirs_exist_ok=True)
    config = GptOssConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GptOssAttention asks its attention for s_aux"):
        load_core(tmp_path, NativeOptions())


def test_a_folder_that_is_no_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_core(tmp_path, NativeOptions())
    with pytest.raises(ModelError, match="dtype is 'float8'"):
        load_core(tiny("llama").folder, NativeOptions(dtype="float8"))


def test_no_dense_mask_is_ever_built(tiny: Tiny, drive: Drive) -> None:
    """A contract with transformers: an attention without a mask function gets none (packed_attention refuses one)."""
    assert attention.NAME not in ALL_MASK_ATTENTION_FUNCTIONS
    driver = drive(tiny("gemma3"))
    driver.add("a", [5, 6, 7], None, SamplingParams(max_tokens=2, temperature=0))
    driver.run()
    assert driver.finish("a") in {"length", "stop"}


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_half_precision_runs(
    quantization: str | None, tiny: Tiny, drive: Drive, recipes: tuple[LoraRecipe, ...]
) -> None:
    """bfloat16 cannot equal float32's tokens; its first logits are near, and mixed batches come to an end."""
    model = tiny("qwen3")
    driver, exact = (drive(model, dtype=dtype, quantization=quantization) for dtype in ("bfloat16", "float32"))
    for each in (driver, exact):
        for recipe in recipes:
            each.load(recipe)
        for index, digest in enumerate((None, *map(model.digest, recipes))):
            params = SamplingParams(max_tokens=3, temperature=0, logprobs=1)
            each.add(str(index), model.prompt(1, 40), digest, params)
        each.run()
    for index in range(6):
        ours, theirs = driver.events[str(index)][0].top_logprobs[0], exact.events[str(index)][0].top_logprobs[0]
        assert ours.logprob == pytest.approx(theirs.logprob, abs=0.5)


def test_half_precision_runs_dora(tiny: Tiny, drive: Drive, every_recipe: tuple[LoraRecipe, ...]) -> None:
    """Prompts short and long, beside plain LoRA: the first logits are near those of float32."""
    model, recipes = tiny("llama"), every_recipe[-3:]
    driver, exact = drive(model, dtype="bfloat16"), drive(model)
    for each in (driver, exact):
        for recipe in recipes:
            each.load(recipe)
            for length in (4, 40):
                params = SamplingParams(max_tokens=3, temperature=0, logprobs=1)
                each.add(f"{recipe.seed} {length}", model.prompt(1, length), model.digest(recipe), params)
        each.run()
    for id_ in exact.events:
        ours, theirs = driver.events[id_][0].top_logprobs[0], exact.events[id_][0].top_logprobs[0]
        assert ours.logprob == pytest.approx(theirs.logprob, abs=0.5)
