"""An adapter merged into its base: one model that plain transformers loads."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.errors import AdapterRefused, ModelError
from jobs import export
from jobs.publish import PROBE

MOST = 0.25
"""How far a logit may be from the trainer's own, in standard deviations of all logits: well above what rounding to bf16
gives, and below what an adapter does that is left out or put in twice."""


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
        merged: PreTrainedModel = PeftModel.from_pretrained(base, adapter_folder).merge_and_unload(safe_merge=True)
    except ValueError as error:  # peft's word for weights that are not finite, and for those that do not fit
        raise AdapterRefused(f"the adapter cannot be merged into its base: {error}") from error
    except (OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{base_folder} and the adapter cannot be loaded together: {error}") from error
    _check(merged, adapter_folder / PROBE)
    export.write_model(merged, dict(merged.named_parameters()), base_folder, folder)


def _dtype(adapter_folder: Path) -> torch.dtype:
    with safe_open(adapter_folder / export.ADAPTER_WEIGHTS, "pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype


@torch.no_grad()
def _check(merged: PreTrainedModel, probe: Path) -> None:
    if not probe.exists():  # not published by a run here
        return
    asked = load_file(probe)
    logits = merged(input_ids=asked["input_ids"]).logits[0, -1].float()
    apart = ((logits - asked["logits"]).abs().max() / asked["logits"].std()).item()
    if not apart <= MOST:
        raise AdapterRefused(f"merged, its logits are {apart:.2g} standard deviations from those of the adapter")
