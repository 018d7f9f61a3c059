"""Where autograd's own chain of operations is the slow part: the LoRA product, the loss, and freed memory.

Each function computes what the plain expression would, with its gradient by formula, in fewer passes over the
activations. Gains, on one AVX2 core with 19 M parameters in fp32, are in jobs/README.md. The same code runs on GPUs.
"""

import ctypes
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 1024
"""Positions whose logits are raised to fp32 at a time: at a vocabulary of 150k, 600 MB instead of all at once."""

_KEEP_BELOW = 1 << 30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks below 1 GiB for the next step. Elsewhere than on glibc this does nothing.

    By default every large activation goes back to the kernel and is faulted in again, page by page: 16,000 faults a
    micro-batch of 512 tokens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BELOW)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BELOW)


class FusedLoraLinear(lora.Linear):  # type: ignore[misc]
    """peft's LoRA layer, its forward and backward pass as one function.

    Not for ZeRO-3, which gathers a frozen weight only while the module that owns it runs.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` [..., in] → [..., out]. What is not the plain case (dropout, disabled, merged, variants) is peft's."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return self._by_peft(x, *args, **kwargs)
        (name,) = self.active_adapters
        base, down, up = self.base_layer, self.lora_A[name], self.lora_B[name]
        drops = self.training and getattr(self.lora_dropout[name], "p", 0.0)
        if drops or name in self.lora_variant or not x.dtype == base.weight.dtype == down.weight.dtype:
            return self._by_peft(x)
        factors = (down.weight, up.weight, self.scaling[name])
        product: Tensor = _LoraProduct.apply(x, base.weight, base.bias, *factors)  # type: ignore[no-untyped-call]
        return product

    def _by_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().forward(x, *args, **kwargs)
        return result


class _LoraProduct(torch.autograd.Function):
    """x Wᵀ + bias + s · (x Aᵀ) Bᵀ for a frozen W [out, in]; A [r, in], B [out, r] (Hu et al. 2021).

    Backward, with g the gradient of the output and h = x Aᵀ: ∂B = s gᵀ h, ∂A = s (g B)ᵀ x, ∂x = g W + s (g B) A.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.flatten(0, -2)
        low = rows @ a.t()
        output = F.linear(rows, weight, bias).addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, weight, a, b, low = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_low = (grad @ b).mul_(ctx.scale)
        grad_b = (low.t() @ grad).mul_(ctx.scale).t()
        grad_x = (grad @ weight).addmm_(grad_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_low.t() @ rows, grad_b, None


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over S of -log softmax(logits)[target], in fp32, a chunk at a time.

    Args:
        logits: [S, vocabulary], of any floating type; targets: [S].
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    """Keeps the logits alone; the gradient, softmax(logits) - onehot(target), is computed from them in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        total = logits.new_zeros((), dtype=torch.float32)
        for part, wanted in zip(torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True):
            total += F.cross_entropy(part.float(), wanted, reduction="sum")
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        parts = []
        for part, wanted in zip(torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True):
            share = part.softmax(-1, dtype=torch.float32)
            share[torch.arange(len(wanted), device=wanted.device), wanted] -= 1.0
            parts.append(share.mul_(grad).to(logits.dtype))
        return torch.cat(parts) if len(parts) > 1 else parts[0], None
