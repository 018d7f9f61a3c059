"""What must never be published: each broken adapter is refused by name, a sound one passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.errors import AdapterRefused
from cluster.records import BaseModelRef
from jobs.config import LoraConfig
from jobs.export import write_adapter
from jobs.lora import prepare
from jobs.model import load_model
from jobs.publish import check_probe, check_weights
from tests.conftest import TinyModels

KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
Weights = dict[str, Tensor]


LENGTHS = KEY.replace("lora_B", "lora_magnitude_vector")


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def adapted(request: pytest.FixtureRequest, tiny_models: TinyModels) -> tuple[torch.nn.Module, Weights]:
    method = LoraConfig(kind="lora", rank=4, dora=request.param)
    model = prepare(load_model(tiny_models["qwen3"], "fp32"), method, seed=0)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return model, weights


def test_a_sound_adapter_passes(adapted: tuple[torch.nn.Module, Weights]) -> None:
    check_weights(*adapted, "support")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tensor: torch.empty(0), "is empty"),
        (lambda tensor: torch.zeros_like(tensor), "is all zeros"),
        (lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan")), "is not finite"),
        (lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("inf")), "is not finite"),
        (lambda tensor: tensor[:-1], r"has shape \(191, 4\), the base needs \(192, 4\)"),
        (lambda tensor: tensor.T, r"has shape \(4, 192\)"),
    ],
    ids=["empty", "zero", "nan", "inf", "short", "transposed"],
)
def test_a_broken_tensor_is_refused_by_name(
    adapted: tuple[torch.nn.Module, Weights], spoil: Callable[[Tensor], Tensor], reason: str
) -> None:
    model, weights = adapted
    with pytest.raises(AdapterRefused, match=rf"support: tensor {KEY} {reason}"):
        check_weights(model, {**weights, KEY: spoil(weights[KEY])}, "support")


def test_a_missing_or_foreign_tensor_is_refused(adapted: tuple[torch.nn.Module, Weights]) -> None:
    model, weights = adapted
    with pytest.raises(AdapterRefused, match=f"{KEY} is empty"):
        check_weights(model, {name: tensor for name, tensor in weights.items() if name != KEY}, "support")
    with pytest.raises(AdapterRefused, match="other belongs to no adapted layer"):
        check_weights(model, {**weights, "other": weights[KEY]}, "support")


def test_plain_peft_loads_what_is_written(
    adapted: tuple[torch.nn.Module, Weights], tiny_models: TinyModels, tmp_path: Path
) -> None:
    model, weights = adapted
    assert isinstance(model, PeftModel)
    base = BaseModelRef(name="tiny", revision="0" * 40, licence="apache-2.0")
    write_adapter(model, weights, base, "tiny", tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert any(name.endswith("lora_magnitude_vector") for name in names) == (LENGTHS in weights)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"]), tmp_path)
    found = {name: parameter for name, parameter in loaded.named_parameters() if "lora_" in name}
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


def test_lengths_of_dora_are_wanted_with_dora_alone(adapted: tuple[torch.nn.Module, Weights]) -> None:
    model, weights = adapted
    if LENGTHS in weights:
        with pytest.raises(AdapterRefused, match=f"{LENGTHS} is empty"):
            check_weights(model, {name: tensor for name, tensor in weights.items() if name != LENGTHS}, "support")
        with pytest.raises(AdapterRefused, match=r"has shape \(191,\), the base needs \(192,\)"):
            check_weights(model, {**weights, LENGTHS: weights[LENGTHS][1:]}, "support")
    else:
        with pytest.raises(AdapterRefused, match=f"{LENGTHS} belongs to no adapted layer"):
            check_weights(model, {**weights, LENGTHS: torch.ones(192)}, "support")


def test_an_adapter_that_changes_nothing_is_refused() -> None:
    logits = torch.randn(50)
    check_probe(logits + 1e-4, logits, "support")
    with pytest.raises(AdapterRefused, match="it learned nothing"):
        check_probe(logits.clone(), logits, "support")
    with pytest.raises(AdapterRefused, match="not finite"):
        check_probe(logits.log(), logits, "support")
