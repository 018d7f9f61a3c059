"""Reads a peft LoRA adapter folder, and refuses by name whatever the engine would have to ignore or get wrong.

    folder/adapter_config.json         what peft's LoraConfig says
    folder/adapter_model.safetensors   base_model.model.<module path>.lora_A.weight [r, in] and .lora_B.weight [out, r],
                                       and for DoRA .lora_magnitude_vector [out]

The update of a module is  y += scaling · B A x,  with scaling = alpha / r, or alpha / √r for rank-stabilised LoRA
(Kalajdzievski 2023, arXiv:2312.03732); it is folded into B here, in float32, and so is DoRA's scale (dora.py). Which
modules are adapted is read off the tensors that are there, so every way of naming targets (list, pattern, "all-linear")
comes to the same.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cluster.errors import AdapterRefused
from serving.engine import dora, kernels
from serving.engine.block import packed

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|magnitude_vector)$")
_MAGNITUDE = "magnitude_vector"

# Settings that the arithmetic above uses, and those that only matter to training or book-keeping. Any other setting
# changes what the adapter computes (lora_bias, layer_replication, whatever peft adds next), so it must be
# off: empty, false or absent.
_USED = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "use_dora",
    "use_rslora",
}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Initialisations that leave the base model's weights alone. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) rewrite the
# base for their one adapter, so an adapter saved in their raw form cannot share it.
_INIT_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraPair:
    """One module's update: `a` [r, in] and `b` [r, out] (the transpose of peft's), the scaling folded into `b`.

    `rescale` float32 [2, out] is what DoRA does to the base's own output (dora.rescaled); None with plain LoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    rescale: torch.Tensor | None = None

    @cached_property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(each.nbytes for each in vars(self).values() if isinstance(each, torch.Tensor))


@dataclass(frozen=True)
class Adapter:
    """A checked adapter on the engine's device: its updates by module path."""

    digest: str
    pairs: Mapping[str, LoraPair]

    @cached_property
    def rank(self) -> int:
        """The highest of its modules. Kept, because each step asks it of every adapter in its batch."""
        return max(len(pair.a) for pair in self.pairs.values())

    @property
    def is_dora(self) -> bool:
        """Whether its modules rescale the base's output: all of them do, or none."""
        return any(pair.rescale is not None for pair in self.pairs.values())

    @cached_property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(pair.num_bytes for pair in self.pairs.values())


class LinearLayer(Protocol):
    """A linear layer of the base, however it keeps its weights."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class Target:
    """What the base offers: the linear layers that may be adapted, by path, and where and how to compute."""

    linears: Mapping[str, LinearLayer]
    max_rank: int
    dtype: torch.dtype
    device: torch.device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) by path."""
        return {path: (linear.out_features, linear.in_features) for path, linear in self.linears.items()}


def read_adapter(digest: str, folder: Path, target: Target) -> Adapter:
    """Read, check and place an adapter. Raises AdapterRefused, naming the setting or tensor and the reason."""
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.match(name)
        if match is None:
            raise AdapterRefused(
                f"{folder}: tensor {name} is not a LoRA matrix of a linear layer; the engine serves LoRA and DoRA of "
                "linear layers only (no embeddings, biases or saved modules)"
            )
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    if not parts:
        raise AdapterRefused(f"{folder}: the adapter holds no tensors")
    pairs = {module: _pair(folder, module, mine, config, target) for module, mine in parts.items()}
    return Adapter(digest, _together(pairs) if kernels.are_usable(target.device, target.dtype) else pairs)


def _together(pairs: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    """The same, for the kernel, which reads them where they are."""
    matrices = iter(packed([matrix for pair in pairs.values() for matrix in (pair.a, pair.b)]))
    return {path: replace(pair, a=next(matrices), b=next(matrices)) for path, pair in pairs.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterRefused(f"{path} is missing; a peft adapter folder holds it") from None
    except ValueError as error:
        raise AdapterRefused(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterRefused(f"{path}: peft_type is {kind!r}; the engine serves LORA")
    if config.get("bias", "none") != "none":
        raise AdapterRefused(
            f"{path}: bias is {config['bias']!r}: a bias trained with the adapter; train with bias none"
        )
    if config.get("init_lora_weights", True) not in _INIT_KEEPS_BASE:
        raise AdapterRefused(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base model's weights; "
            "save it with path_initial_model_for_weight_conversion so that it becomes plain LoRA"
        )
    for key, value in config.items():
        if key not in _USED | _WITHOUT_EFFECT and value:
            raise AdapterRefused(
                f"{path}: {key} is {value!r}, which plain LoRA does not have; serve it merged into its own base, or "
                f"train without {key}"
            )
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            raise AdapterRefused(f"{path}: {key} is {config.get(key)!r}; it must be a number above 0")
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "adapter_model.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError:
        raise AdapterRefused(f"{path} is missing; save the adapter with save_pretrained (safetensors)") from None
    except SafetensorError as error:
        raise AdapterRefused(f"{path} is damaged: {error}") from None


def _pair(
    folder: Path, module: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any], target: Target
) -> LoraPair:
    name = f"{_PREFIX}{module}.lora_"
    if module not in target.linears:
        raise AdapterRefused(
            f"{folder}: tensor {name}{min(parts)} adapts {module}, which is not a linear layer of this base's "
            "decoder; is it an adapter of another base?"
        )
    base = target.linears[module]
    rank = int(_by_pattern(folder, config.get("rank_pattern"), module, config["r"]))
    alpha = float(_by_pattern(folder, config.get("alpha_pattern"), module, config["lora_alpha"]))
    if rank > target.max_rank:
        raise AdapterRefused(
            f"{folder}: {module} has rank {rank}, above this engine's max_rank of {target.max_rank}; raise max_rank"
        )
    shapes: dict[str, tuple[int, ...]] = {"A.weight": (rank, base.in_features), "B.weight": (base.out_features, rank)}
    if config.get("use_dora"):
        shapes[_MAGNITUDE] = (base.out_features,)
    elif _MAGNITUDE in parts:
        raise AdapterRefused(f"{folder}: tensor {name}{_MAGNITUDE} is of DoRA, and the adapter's use_dora is not set")
    for part, expected in shapes.items():
        if part not in parts:
            raise AdapterRefused(f"{folder}: tensor {name}{part} is missing beside the others of its module")
        if tuple(parts[part].shape) != expected:
            raise AdapterRefused(
                f"{folder}: tensor {name}{part} has shape {tuple(parts[part].shape)}, expected {expected}"
            )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    a = parts["A.weight"].to(target.device).float()
    b = parts["B.weight"].to(target.device).float() * scaling
    rescale = None
    if config.get("use_dora"):
        whole = _whole(folder, module, base)
        scale = dora.scale_of(whole, a, b, parts[_MAGNITUDE])
        rescale = dora.rescale_of(whole, scale)
        b = b * scale[:, None]
    pair = LoraPair(a.to(target.dtype).contiguous(), b.t().to(target.dtype).contiguous(), rescale)
    for part, tensor in (("A.weight", pair.a), (_MAGNITUDE, pair.rescale), ("B.weight", pair.b)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise AdapterRefused(f"{folder}: tensor {name}{part} gives values that are not finite in {tensor.dtype}")
    return pair


def _whole(folder: Path, module: str, base: LinearLayer) -> nn.Linear:
    """The layer, if its weights are those of the model's files."""
    if type(base) is nn.Linear:
        return base
    raise AdapterRefused(
        f"{folder}: use_dora needs the norms of the base's own weights, and {module} of this base is a "
        f"{type(base).__name__}; serve it on the base without quantisation, or train without use_dora"
    )


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _by_pattern(folder: Path, patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """peft's rule: the first pattern that matches the end of the path, whole components only."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                if not _is_positive(value):
                    raise AdapterRefused(f"{folder}: for {pattern!r} stands {value!r}; it must be a number above 0")
                return value
        except re.error as error:
            raise AdapterRefused(f"{folder}: the pattern {pattern!r} is no regular expression: {error}") from None
    return default
