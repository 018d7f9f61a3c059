"""An adapter merged into its base: one model that plain transformers loads."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.errors import AdapterRefused, ModelError
from jobs import export
from jobs.publish import PROBE

MOST = 0.5
"""How much of what the adapter does to the logits may be lost to rounding. Measured on random shapes of 2 to 48 layers,
by the share of the logits that the adapter moves: in fp32 at most 6e-5; in bf16 0.01 to 0.09 where it moves half of
them or more, 0.2 to 0.6 where it moves a tenth. A merge without the adapter, or with it twice, is at 1 or above."""


def merge(base_folder: Path, adapter_folder: Path, folder: Path) -> None:
    """Write the merged model into `folder`, in the adapter's own precision.

    Args:
        adapter_folder: as it was published, with the trainer's logits beside it, which are compared.

    Raises:
        ModelError: base and adapter cannot be loaded together.
        AdapterRefused: what came out is not finite, or answers otherwise than the adapter did.
    """
    try:
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=_dtype(adapter_folder), use_safetensors=True)
        adapted = PeftModel.from_pretrained(base, adapter_folder)
        asked = load_file(probe) if (probe := adapter_folder / PROBE).exists() else None  # not published by a run here
        plain = None
        if asked:
            with adapted.disable_adapter():
                plain = _logits(adapted, asked["input_ids"])
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # peft's word for weights that are not finite, and for those that do not fit
        raise AdapterRefused(f"the adapter cannot be merged into its base: {error}") from error
    except (OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{base_folder} and the adapter cannot be loaded together: {error}") from error
    if asked and plain is not None:
        _check(_logits(merged, asked["input_ids"]), asked["logits"], plain)
    export.write_model(merged, dict(merged.named_parameters()), base_folder, folder)


def _dtype(adapter_folder: Path) -> torch.dtype:
    with safe_open(adapter_folder / export.ADAPTER_WEIGHTS, "pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, input_ids: Tensor) -> Tensor:
    """Logits [vocabulary] after the last of `input_ids` [1, T], fp32."""
    logits: Tensor = model(input_ids=input_ids).logits[0, -1].float()
    return logits


def _check(merged: Tensor, adapted: Tensor, plain: Tensor) -> None:
    """Raise AdapterRefused unless the merged logits are the adapter's: much nearer to them than the base's are."""
    lost = ((merged - adapted).norm() / (plain - adapted).norm()).item()
    if not lost <= MOST:
        raise AdapterRefused(
            f"merged, {lost:.0%} of what the adapter does to the probe's logits is lost or wrong; serve it unmerged"
        )
