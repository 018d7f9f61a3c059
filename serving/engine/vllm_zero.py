"""An adapter that changes nothing, to stand for the base model where vLLM runs on a CPU.

vLLM marks a row without an adapter by the slot -1. Its GPU kernels skip such rows; its CPU operators (0.32) index their
slots with it, so once all slots are filled the rows of the base get the *last* slot's adapter. Rows of a zero adapter
have a slot of their own.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cluster.errors import ModelError

ZERO_NAME = "zero"
"""What it is served as."""

_LINEAR = re.compile(r"^(?P<module>.*layers\.0\..*(q_proj|qkv_proj|o_proj))\.weight$")


def write_zero_adapter(model: Path, folder: Path) -> None:
    """A peft adapter of rank 1 on one linear layer of `model`. Raises ModelError when it has none by a known name."""
    for file in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(file, "np") as tensors:
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged: {error}") from error
        for tensor, shape in shapes.items():
            match = _LINEAR.match(tensor)
            if match is not None and len(shape) == 2:
                _write(folder, match["module"], shape)
                return
    raise ModelError(f"{model}: no linear layer of a decoder is found in it; vLLM can serve it on a GPU only")


def _write(folder: Path, module: str, shape: list[int]) -> None:
    out_features, in_features = shape
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    sides = {"A": np.zeros((1, in_features), np.float32), "B": np.zeros((out_features, 1), np.float32)}
    named = {f"base_model.model.{module}.lora_{side}.weight": zeros for side, zeros in sides.items()}
    save_file(named, folder / "adapter_model.safetensors")
