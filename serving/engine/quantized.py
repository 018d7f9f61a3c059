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
    """An nn.Linear whose weight is restored piece by piece, whenever it is used: `x` [..., in] → [..., out]."""

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias)

    def pieces(self, outputs: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The weight, `outputs` rows of it at a time."""
        raise NotImplementedError

    def products(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with all of the pieces. Elsewhere than on a CPU one piece is all: starting kernels would take longer."""
        outputs = _BLOCK * max(1, _PIECE // self.in_features // _BLOCK) if x.is_cpu else self.out_features
        return torch.cat([linear(x, weight) for weight in self.pieces(outputs, x.dtype)], -1)

    def biased(self, output: torch.Tensor) -> torch.Tensor:
        """In place."""
        return output if self.bias is None else output.add_(self.bias)


class Int8Linear(QuantizedLinear):
    """`weight` int8 [out, in] and `scale` float32 [out]."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """int8 is exact in every dtype, so the scale is left to the end, in float32."""
        return self.biased(self.products(x).mul_(self.scale))

    def pieces(self, outputs: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        return (part.to(dtype) for part in torch.split(self.weight, outputs))


class Nf4Linear(QuantizedLinear):
    """`weight` uint8 [out · in / 2, 1], two to a byte; `scales` uint8 [blocks], an index each into `levels` float32
    [256], times `scales_max` float32 [blocks / 256], plus `scales_mean` float32 []."""

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
        return self.biased(self.products(x)) if x.is_cpu else self.at_once(x)

    def at_once(self, x: torch.Tensor) -> torch.Tensor:
        """The library's own product."""
        output: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, self.weight, (self.out_features, self.in_features), self.scales_max, _BLOCK, "nf4", self.bias,
            absmax_8bit=self.scales, absmax_code=self.levels, absmax_offset=self.scales_mean,
        )  # fmt: skip
        return output

    def pieces(self, outputs: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """`outputs` is a multiple of 64, so that each piece begins with a block."""
        ops, packed = torch.ops.bitsandbytes, self.weight.view(-1)
        scales = ops.dequantize_blockwise(self.scales, self.scales_max, self.levels, _SCALES, torch.float32)
        scales += self.scales_mean
        for first in range(0, self.out_features, outputs):
            rows = min(outputs, self.out_features - first)
            begin, end = first * self.in_features, (first + rows) * self.in_features
            part, blocks = packed[begin // 2 : -(end // -2)], scales[begin // _BLOCK : -(end // -_BLOCK)]
            # As one long row: where inputs are no whole number of blocks, rows are restored wrongly on a CPU (0.50.2).
            flat = ops.dequantize_4bit(part, blocks, _BLOCK, "nf4", (end - begin,), dtype)
            yield flat.view(rows, self.in_features)


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
