"""Trained weights to a folder that plain peft, or plain transformers, loads.

Weights are taken whole from the engine, parameter by parameter: under ZeRO-3 `module.state_dict()` would give empty
tensors for every parameter above 1e5 elements, which is how other systems came to publish empty adapters.
"""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from cluster import made
from cluster.licences.card import CARD
from cluster.licences.notice import NOTICE, add_licences
from cluster.models import WANTED_FILES
from cluster.records import BaseModelRef, LicenceRecord
from jobs.model import DTYPES
from jobs.zero import ZeroEngine

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def gather(engine: ZeroEngine, dtype: str) -> dict[str, Tensor]:
    """Every trained weight whole, in the model's precision, on rank 0's host; {} elsewhere. A collective."""
    gathered = {}
    for name, parameter in engine.trained():
        weight = engine.weight(parameter)
        if dist.get_rank() == 0:
            gathered[name] = weight.to(DTYPES[dtype])
    return gathered


def gather_frozen(engine: ZeroEngine) -> dict[str, Tensor]:
    """Every weight that is not trained, whole, on rank 0's host; {} elsewhere. A collective under ZeRO-3."""
    gathered = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with engine.whole([parameter]):
                if dist.get_rank() == 0:
                    gathered[name] = parameter.detach().to("cpu", copy=True)
    return gathered


def write_adapter(model: PeftModel, weights: dict[str, Tensor], base: BaseModelRef, source: str, folder: Path) -> None:
    """Write peft's two files, and the notice that goes with the base model's licence.

    Args:
        weights: as `gather` gives them.
        source: where the base model came from, for peft's own `base_model_name_or_path`.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = source
    config.revision = base.revision
    config.target_modules = sorted(config.target_modules)  # a set, whose order would change the digest
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"}
    )
    (folder / NOTICE).write_text(
        f"This adapter was trained with Luthier from {base.name} (revision {base.revision}),\n"
        f"which is under the licence {base.licence}. Using the adapter means using that model: its terms apply.\n"
    )


def write_model(model: PreTrainedModel, weights: dict[str, Tensor], base_folder: Path, folder: Path) -> None:
    """Write a standard Hugging Face folder: config, safetensors, and the base's tokenizer and licence files."""
    model.config.use_cache = True
    model.save_pretrained(folder, state_dict=weights)
    for pattern in WANTED_FILES:
        for path in base_folder.glob(pattern):
            is_its_own = path.name.endswith((".safetensors", ".index.json")) or path.name in (CARD, made.FILE)
            if not is_its_own and not path.name.startswith(NOTICE) and not (folder / path.name).exists():
                shutil.copy(path, folder / path.name)


def add_notice(licences: LicenceRecord, base_folder: Path, folder: Path) -> None:
    """Add what the run's licences want to be said to the NOTICE, and the base's own licence files."""
    with (folder / NOTICE).open("a") as file:
        file.write(f"\n{licences.notice}")
    add_licences(base_folder, folder)


@torch.no_grad()
def probe_logits(engine: ZeroEngine, input_ids: Tensor) -> Tensor:
    """Logits [vocabulary] after the last of `input_ids` [1, T], fp32 on the host. A collective under ZeRO-3."""
    engine.module.eval()
    positions = torch.arange(input_ids.shape[1], device=engine.device)[None]
    output = engine.engine(
        input_ids=input_ids.to(engine.device), position_ids=positions, use_cache=False, logits_to_keep=1
    )
    logits: Tensor = output.logits[0, -1].float().cpu()
    return logits
