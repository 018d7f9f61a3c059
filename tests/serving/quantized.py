"""A tiny model on a quantised base, and what peft answers on the same base as transformers quantises it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from serving.engine.protocol import Quantization
from tests.serving.conftest import LoraRecipe, TinyModel

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
"""Where the inputs of a layer are no whole number of blocks (64), bitsandbytes 0.50 restores nf4 wrongly on a CPU."""


class QuantizedTiny(TinyModel):
    """Its adapters are made on the base in full precision, as most people's are.

    In the reference, bitsandbytes' layers are in training mode: only then do they multiply with what their weights
    stand for, and not round activations too.
    """

    def __init__(self, root: Path, architecture: str, kind: Quantization) -> None:
        super().__init__(root, architecture, **SHAPE)
        self._kind = kind
        self._exact = TinyModel(root, architecture, **SHAPE)

    def load(self) -> Any:
        config = BitsAndBytesConfig(
            load_in_8bit=self._kind == "int8",
            load_in_4bit=self._kind == "nf4",
            llm_int8_threshold=0.0,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
        attention = "eager" if self.architecture == "gemma2" else "sdpa"
        return AutoModelForCausalLM.from_pretrained(
            self.folder,
            dtype=torch.float32,
            attn_implementation=attention,
            quantization_config=config,
            device_map={"": "cpu"},
        ).eval()

    def adapter(self, recipe: LoraRecipe) -> Path:
        return self._exact.adapter(recipe)

    def reference(self, recipe: LoraRecipe | None) -> Any:
        model = super().reference(recipe)
        theirs = [each for each in model.modules() if type(each).__module__ == "bitsandbytes.nn.modules"]
        assert theirs, "the reference is not quantised"
        for each in theirs:
            each.train()
        return model
