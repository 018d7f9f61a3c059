"""Which parameters are trained: low-rank factors beside frozen weights, or all of the language model."""

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from cluster.errors import ModelError
from jobs.config import FullConfig, LoraConfig
from jobs.kernels import FusedLoraLinear


def prepare(
    model: PreTrainedModel, method: LoraConfig | FullConfig, seed: int, fused: bool = True
) -> PreTrainedModel | PeftModel:
    """Freeze and extend the model as the method asks. `fused` takes our LoRA layer for peft's (not under ZeRO-3)."""
    if isinstance(method, FullConfig):
        language = {id(parameter) for parameter in [*model.get_decoder().parameters(), *model.lm_head.parameters()]}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in language)
        return model
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        use_dora=method.dora,
        target_modules=method.targets if method.targets == "all-linear" else list(method.targets),
        exclude_modules=_outside_decoder(model),
    )
    if fused:
        config._register_custom_module({nn.Linear: FusedLoraLinear})  # the one hook that peft has for a layer
    # All ranks must start from the same factors; peft draws them from torch's global generator.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _outside_decoder(model: PreTrainedModel) -> list[str] | None:
    """Linear layers beside the language model (a vision tower, say): text never reaches them."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} | {id(model.get_output_embeddings())}
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in inside
    ]
    return linear or None


def check_targets(model: PreTrainedModel, method: LoraConfig | FullConfig) -> None:
    """Raise ModelError for a target that the model does not have; `model` may be without weights."""
    if isinstance(method, FullConfig) or method.targets == "all-linear":
        return
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in method.targets if target not in linear]
    if unknown:
        have = ", ".join(sorted(linear))
        raise ModelError(f"method.targets: the model has no linear layer called {', '.join(unknown)}; it has: {have}")
