"""A packed row computes exactly what each of its samples would alone, in every family that we ship."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, MistralConfig

from cluster.errors import ModelError
from jobs.config import FullConfig, LoraConfig
from jobs.kernels import summed_cross_entropy
from jobs.lora import check_targets, prepare
from jobs.model import load_model, load_tokenizer, skeleton
from jobs.objectives import PackedRow, supervised_logits
from tests.conftest import TinyModels

LENGTHS = [7, 1, 30, 12]
TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def row(lengths: list[int], vocabulary: int) -> PackedRow:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    predicts = torch.arange(sum(lengths))
    return PackedRow(tokens[None], positions[None], lengths, predicts, tokens, 0, 1.0)


def check(folder: Path) -> None:
    """Packed logits against transformers' own attention, one sample at a time."""
    model = load_model(folder, "fp32")
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    packed = row(LENGTHS, 200)
    with torch.no_grad():
        found = supervised_logits(model, packed)
        alone = [stock(input_ids=part[None]).logits[0] for part in packed.input_ids[0].split(LENGTHS)]
    torch.testing.assert_close(found, torch.cat(alone), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral", "gemma3"])
def test_packed_equals_alone(tiny_models: TinyModels, architecture: Any) -> None:
    check(tiny_models[architecture])


def test_packed_equals_alone_with_a_sliding_window(tmp_path: Path) -> None:
    config = MistralConfig(**TEXT, sliding_window=9)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check(tmp_path)


def multimodal(folder: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**TEXT, "sliding_window": 9}, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_a_model_with_a_vision_tower_trains_its_language_model_alone(tmp_path: Path) -> None:
    multimodal(tmp_path)
    check(tmp_path)
    lora = prepare(load_model(tmp_path, "fp32"), LoraConfig(kind="lora", rank=4), seed=0)
    trained = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("language_model" in name for name in trained)
    full = prepare(load_model(tmp_path, "fp32"), FullConfig(kind="full"), seed=0)
    assert not any(parameter.requires_grad for name, parameter in full.named_parameters() if "vision" in name)
    lora.train()
    packed = row(LENGTHS, 200)
    summed_cross_entropy(supervised_logits(lora, packed), packed.targets).backward()
    assert all(parameter.grad is not None for parameter in lora.parameters() if parameter.requires_grad)


def test_unknown_targets_are_refused_with_what_there_is(tiny_models: TinyModels) -> None:
    model = skeleton(tiny_models["qwen3"])
    check_targets(model, LoraConfig(kind="lora", targets=("q_proj", "down_proj")))
    with pytest.raises(ModelError, match=r"no linear layer called w_pack; it has: down_proj, gate_proj"):
        check_targets(model, LoraConfig(kind="lora", targets=("q_proj", "w_pack")))


def test_the_same_seed_gives_the_same_adapter(tiny_models: TinyModels) -> None:
    def factors(seed: int) -> list[np.ndarray[Any, Any]]:
        lora = prepare(load_model(tiny_models["qwen3"], "fp32"), LoraConfig(kind="lora"), seed)
        return [parameter.detach().numpy() for parameter in lora.parameters() if parameter.requires_grad]

    same = zip(factors(1), factors(1), strict=True)
    assert all(np.array_equal(one, other) for one, other in same)
    assert any(not np.array_equal(one, other) for one, other in zip(factors(1), factors(2), strict=True))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_model(tmp_path, "fp32")
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
