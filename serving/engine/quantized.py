"""Base weights in 8 or 4 bits; the door to bitsandbytes, whose formats these are.

    int8   one scale for each output: w = q · s with q from -127 to 127 (Dettmers 2022, arXiv:2208.07339)
    nf4    16 levels, those of a normal distribution, times the largest of each 64 weights; that is kept in 8 bits
           itself, so a weight takes 4.13 (QLoRA, Dettmers 2023, arXiv:2305.14314)

Only the linear layers of the decoder are quantised, and of those only the weights. A layer computes in the model's
dtype what nn.Linear would with the weights that these stand for, so what a row gets never depends on the rows beside
it. bitsandbytes' own layers would not do: the 8-bit one rounds activations too, and treats as outliers the columns that
are large in any row of the batch; the 4-bit one rounds activations to bfloat16 where the processor has AVX512-BF16.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig

from cluster.errors import ModelError
from serving.engine.protocol import Quantization

_BLOCK = 64  # weights under one scale, in nf4
_SCALES = 256  # of those scales under one of their own
_PIECE = 2**18  # weights restored at a time on a CPU: they stay in its cache until they were multiplied with


class QuantizedLinear(nn.Module):
    """An nn.Linear whose weight is restored piece by piece, whenever it is used."""

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias)
        self._step = _BLOCK * max(1, _PIECE // in_features // _BLOCK)  # outputs of a piece: whole blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in] → [..., out], contiguous."""
        step = self._step if x.is_cpu else self.out_features
        firsts = range(0, self.out_features, step)
        output = torch.cat([self.piece(x, first, min(first + step, self.out_features)) for first in firsts], -1)
        return output if self.bias is None else output.add_(self.bias)

    def piece(self, x: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """The outputs from `first` to `end`, without the bias."""
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """`weight` int8 [out, in] and `scale` float32 [out]."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def piece(self, x: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """int8 is exact in every dtype, so the scale is left to the end, in float32."""
        return linear(x, self.weight[first:end].to(x.dtype)).mul_(self.scale[first:end])


class Nf4Linear(QuantizedLinear):
    """`weight` uint8 [out · in / 2], two to a byte; `scales` uint8 [blocks], an index each into `levels` float32 [256],
    times `scales_max` float32 [blocks / 256], plus `scales_mean` float32 []."""

    def __init__(self, shape: tuple[int, int], parts: dict[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        super().__init__(shape[1], shape[0], bias)
        self.weight: torch.Tensor
        self.scales: torch.Tensor
        self.levels: torch.Tensor
        self.scales_max: torch.Tensor
        self.scales_mean: torch.Tensor
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In pieces on a CPU; elsewhere the library's kernel, which restores in registers what few rows need."""
        return super().forward(x) if x.is_cpu else self.at_once(x)

    def at_once(self, x: torch.Tensor) -> torch.Tensor:
        """The library's own product."""
        output: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, self.weight, (self.out_features, self.in_features), self.scales_max, _BLOCK, "nf4", self.bias,
            absmax_8bit=self.scales, absmax_code=self.levels, absmax_offset=self.scales_mean,
        )  # fmt: skip
        return output

    def piece(self, x: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """`first` is a multiple of 64, so a piece begins with a block."""
        ops = torch.ops.bitsandbytes
        begin, stop = first * self.in_features, end * self.in_features
        blocks = slice(begin // _BLOCK, -(stop // -_BLOCK))
        scales = self.levels[self.scales[blocks].int()]
        above = self.scales_max[torch.arange(blocks.start, blocks.stop) // _SCALES]
        packed = self.weight.view(-1)[begin // 2 : -(stop // -2)]
        weight = ops.dequantize_4bit(
            packed, scales.mul_(above).add_(self.scales_mean), _BLOCK, "nf4", (stop - begin,), x.dtype
        )
        return linear(x, weight.view(end - first, self.in_features))


def loading(skeleton: Any, layers: str, kind: Quantization, device: str) -> dict[str, Any]:
    """What from_pretrained is to be told, so that each tensor is quantised as it is read, and on the device.

    Args:
        skeleton: the model without its weights.
        layers: the path of its decoder's layers.

    Raises:
        ModelError: what the layers hold is not all linear, or the library is not there.
    """
    _library()
    linears = [name for name, module in skeleton.named_modules() if type(module) is nn.Linear]
    weights = {f"{name}.weight" for name in linears}
    for name, parameter in skeleton.named_parameters():
        if name.startswith(f"{layers}.") and parameter.ndim > 1 and name not in weights:
            raise ModelError(
                f"quantization {kind}: {name} {tuple(parameter.shape)} of {type(skeleton).__name__} is no linear "
                "layer's (experts are not), and would stay as large as it is; leave engine.quantization out"
            )
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind == "nf4",
        llm_int8_threshold=0.0,
        llm_int8_skip_modules=[name for name in linears if not name.startswith(f"{layers}.")],
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def replace(layers: nn.Module) -> None:
    """Put our layers in the place of the library's, with their weights."""
    for name, module in list(_library_layers(layers)):
        parent, _, attribute = name.rpartition(".")
        setattr(layers.get_submodule(parent), attribute, _ours(module))


def _library_layers(layers: nn.Module) -> Iterator[tuple[str, Any]]:
    kinds = _library().nn
    for name, module in layers.named_modules():
        if isinstance(module, kinds.Linear8bitLt | kinds.Linear4bit):
            yield name, module


def _ours(module: Any) -> QuantizedLinear:
    bias = module.bias.data if module.bias is not None else None
    if isinstance(module, _library().nn.Linear8bitLt):
        return Int8Linear(module.weight.CB, module.weight.SCB / 127, bias)
    state = module.weight.quant_state
    assert (state.quant_type, state.blocksize, state.state2.blocksize) == ("nf4", _BLOCK, _SCALES)
    parts = {
        "weight": module.weight.data,
        "scales": state.absmax,
        "levels": state.state2.code,
        "scales_max": state.state2.absmax,
        "scales_mean": state.offset,
    }
    return Nf4Linear(tuple(state.shape), parts, bias)


def _library() -> Any:
    """bitsandbytes, which takes a second of imports. Raises ModelError."""
    # It would have us install a package that fetches a kernel from the Hub, for products that we do ourselves.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            f"engine.quantization needs bitsandbytes on this node ({error}); install luthier[quantized]"
        ) from None
    return bitsandbytes
