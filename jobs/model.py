"""The base model in memory, and the attention that lets many samples share one row.

A micro-batch is ONE row [1, T] of whole samples laid end to end, without padding. Positions restart at every sample,
and `packed_attention` computes each sample by itself: no mask over T × T is ever built, nothing crosses a border, and
work grows with the sum of the squared sample lengths, not with T².
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cluster.catalogue.remote_code import NO_CODE
from cluster.errors import ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = "luthier_samples"  # not the engine's name: a process may hold both


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the interface's; always None here
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sample_lengths: Sequence[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample of a packed row; transformers' attention interface.

    Args:
        query: [1, heads, T, head_dim]; key and value: [1, key-value heads, T, head_dim].
        sliding_window: how far back a position may look, for the layers that have one.
        sample_lengths: lengths of the samples in the row, summing to T; None: the row is one sample.

    Returns:
        [1, T, heads, head_dim], and no weights.
    """
    lengths = list(sample_lengths) if sample_lengths is not None else [query.shape[2]]
    parts = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for q, k, v in parts:
        length = q.shape[2]
        banded = sliding_window is not None and length > sliding_window
        outputs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_band(length, sliding_window, q.device) if banded and sliding_window else None,
                dropout_p=dropout if module.training else 0.0,
                is_causal=not banded,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return joined.transpose(1, 2).contiguous(), None


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length] mask of a causal sliding window: position i sees i - window < j <= i."""
    full = torch.ones(length, length, dtype=torch.bool, device=device)
    return full.tril() & full.triu(1 - window)


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask is built: packed_attention needs the sample lengths alone."""


def load_model(folder: Path, dtype: str, loading: AbstractContextManager[object] | None = None) -> PreTrainedModel:
    """The causal language model in a folder, in evaluation mode, ready for packed rows. Raises ModelError.

    Args:
        folder: config.json and *.safetensors.
        dtype: `fp32` or `bf16`.
        loading: entered while loading; ZeRO-3 shards the weights as they come.
    """
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
    try:
        with loading or nullcontext():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], attn_implementation=ATTENTION, use_safetensors=True, **NO_CODE
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    model.config.use_cache = False
    return model


def skeleton(folder: Path) -> PreTrainedModel:
    """The model without its weights, in no time and memory: what can be checked before a worker is taken is.

    Raises ModelError.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **NO_CODE))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} is not a causal language model that can be loaded: {error}") from error
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder. Raises ModelError when it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} has no tokenizer that can be loaded: {error}") from error
    return tokenizer


def stop_ids(folder: Path) -> frozenset[int]:
    """Ids at which generation with this model stops, besides its tokenizer's eos_token: what the engines go by."""
    try:
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:  # without the file, transformers takes what the model's config says
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError):  # a tokenizer by itself
            return frozenset()
        eos = GenerationConfig.from_model_config(config).eos_token_id
    return frozenset({eos} if isinstance(eos, int) else eos or ())
