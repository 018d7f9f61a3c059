"""The fused functions against the plain expressions that they replace: values and gradients."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

from jobs.config import LoraConfig
from jobs.kernels import FusedLoraLinear, summed_cross_entropy
from jobs.lora import prepare
from jobs.model import load_model
from tests.conftest import TinyModels


def layers(folder: Path, **method: Any) -> tuple[FusedLoraLinear, PeftLinear]:
    """The same layer of the same model, ours and peft's, with weights that are not zero."""
    given = LoraConfig(kind="lora", rank=4, alpha=6, **method)
    ours = prepare(load_model(folder, "fp32"), given, seed=0, fused=True).get_submodule(
        "base_model.model.model.layers.1.mlp.down_proj"
    )
    theirs = prepare(load_model(folder, "fp32"), given, seed=0, fused=False).get_submodule(
        "base_model.model.model.layers.1.mlp.down_proj"
    )
    assert type(ours) is FusedLoraLinear
    assert type(theirs) is PeftLinear
    for layer in (ours, theirs):
        torch.manual_seed(1)
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    return ours, theirs


def passed(layer: PeftLinear, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of both factors."""
    x = x.clone().requires_grad_()
    factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    output = layer(x)
    return [output.detach(), *torch.autograd.grad(output, (x, *factors), gradient)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [{}, {"rslora": True}])
def test_the_lora_layer_is_pefts(tiny_models: TinyModels, dtype: torch.dtype, method: dict[str, Any]) -> None:
    ours, theirs = (layer.to(dtype) for layer in layers(tiny_models["qwen3"], **method))
    x = torch.randn(1, 37, ours.in_features, dtype=dtype)
    gradient = torch.randn(1, 37, ours.out_features, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for one, other in zip(passed(ours, x, gradient), passed(theirs, x, gradient), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance * float(other.abs().max()), rtol=0)


def test_its_gradient_is_the_numerical_one(tiny_models: TinyModels) -> None:
    layer = copy.deepcopy(layers(tiny_models["qwen3"])[0]).double()
    factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    x = torch.randn(1, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given, *_: layer(given), (x, *factors), fast_mode=True)


def test_what_is_not_the_plain_case_is_pefts(tiny_models: TinyModels) -> None:
    ours, theirs = layers(tiny_models["qwen3"], dropout=0.5)
    x = torch.randn(1, 11, ours.in_features)
    for layer in (ours, theirs):
        layer.train()
    torch.manual_seed(2)
    dropped = ours(x)
    torch.manual_seed(2)
    assert torch.equal(dropped, theirs(x))
    for layer in (ours, theirs):
        layer.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    ours.enable_adapters(False)
    assert torch.equal(ours(x), torch.nn.functional.linear(x, ours.base_layer.weight, ours.base_layer.bias))
    ours.enable_adapters(True)
    ours.merge()
    torch.testing.assert_close(ours(x), theirs(x))


def test_dora_is_pefts_with_the_gradient_of_its_lengths(tiny_models: TinyModels) -> None:
    found = []
    x, gradient = torch.randn(1, 11, 192), torch.randn(1, 11, 64)
    for layer in layers(tiny_models["qwen3"], dora=True):
        lengths = layer.lora_magnitude_vector["default"].weight
        lengths.data.mul_(1.5)
        output = layer(x)
        trained = (lengths, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        found.append([output.detach(), *torch.autograd.grad(output, trained, gradient)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert found[0][1].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_the_plain_ones(dtype: torch.dtype) -> None:
    """Of more positions than a chunk has, scaled as a step scales it."""
    logits = torch.randn(3000, 50).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (3000,))
    loss = summed_cross_entropy(logits, targets)
    (loss * 0.25).backward()
    plain = logits.detach().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain, targets, reduction="sum")
    (expected * 0.25).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.float(), plain.grad, atol=1e-6 if dtype == torch.float32 else 1e-3, rtol=0)
