"""DoRA (Liu et al. 2024, arXiv:2402.09353): a low-rank update, and a trained length for each output feature's weights.

    y = g ⊙ (W x + s · B A x) + bias,     g = m / ‖W + s · B A‖,  a norm for each output feature

Nothing in g depends on the input, so it is computed when an adapter is loaded. It is folded into B; what is left for a
step is to turn the base's output, bias included, into g ⊙ y + (1 − g) ⊙ bias. As in peft (tuners/lora/dora.py, 0.21),
norms are of float32 weights, whatever precision the base has.
"""

import torch
from torch import nn

_VALUES_AT_ONCE = 1 << 22
"""Of a weight matrix, in float32 beside the model: 16 MiB. A layer of a large model would take hundreds."""

NO_RESCALE = torch.tensor([[1.0], [0.0]])
"""Where an adapter leaves a layer alone; [2, 1], for any number of outputs."""


def scale_of(base: nn.Linear, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """g, float32 [out], on the base's device. Not finite where a norm is 0 or not finite itself.

    Args:
        a, b: A [r, in] and s · B [out, r], float32, on the base's device.
        magnitude: m [out].
    """
    rows = max(1, _VALUES_AT_ONCE // base.in_features)
    parts = zip(torch.split(base.weight, rows), torch.split(b, rows), strict=True)
    norms = torch.cat([torch.linalg.vector_norm(torch.addmm(weight.float(), up, a), dim=1) for weight, up in parts])
    return magnitude.to(norms.device, torch.float32) / norms.where(norms.isfinite(), torch.nan)


def rescale_of(base: nn.Linear, scale: torch.Tensor) -> torch.Tensor:
    """What `rescaled` takes: g, and (1 − g) ⊙ bias, as float32 [2, out]."""
    bias = 0.0 if base.bias is None else base.bias.float()
    return torch.stack((scale, (1 - scale) * bias))


def rescaled(rows: torch.Tensor, rescale: torch.Tensor) -> torch.Tensor:
    """Outputs of the base, `rows` [n, out], under g: float32 [n, out]. `rescale` is [2, out], or [n, 2, out]."""
    return rows * rescale[..., 0, :] + rescale[..., 1, :]
