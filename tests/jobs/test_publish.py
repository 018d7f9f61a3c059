"""What must never be published: each broken adapter is refused by name, a sound one passes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cluster.errors import AdapterRefused
from jobs.config import LoraConfig
from jobs.lora import prepare
from jobs.model import load_model
from jobs.publish import check_probe, check_weights
from tests.conftest import TinyModels

KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def adapted(tiny_models: TinyModels) -> tuple[torch.nn.Module, Weights]:
    model = prepare(load_model(tiny_models["qwen3"], "fp32"), LoraConfig(kind="lora", rank=4), seed=0)
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


def test_an_adapter_that_changes_nothing_is_refused() -> None:
    logits = torch.randn(50)
    check_probe(logits + 1e-4, logits, "support")
    with pytest.raises(AdapterRefused, match="it learned nothing"):
        check_probe(logits.clone(), logits, "support")
    with pytest.raises(AdapterRefused, match="not finite"):
        check_probe(logits.log(), logits, "support")
