"""What a model is, by its config.json, and whether its weights are those that it describes."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.catalogue.finding import Finding, Level
from cluster.catalogue.weights import Tensor
from cluster.errors import ModelError
from cluster.models import Shape, read_shape

PART = "definition"
_GATED_MLP = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3")
"""Families whose matrices `Shape.parameters` counts."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEAD = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Definition:
    """What config.json says, under the names that people use."""

    architecture: str
    family: str
    shape: Shape
    dtype: str
    context_tokens: int
    quantised: str | None
    eos_ids: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "family": self.family,
            "shape": self.shape.model_dump(),
            "dtype": self.dtype,
            "context_tokens": self.context_tokens,
            "quantised": self.quantised,
            "eos_ids": list(self.eos_ids),
        }


def read_definition(folder: Path) -> tuple[Definition | None, list[Finding]]:
    """What is defined, or None, and what is wrong with it."""
    try:
        shape = read_shape(folder)
    except ModelError as error:
        return None, [Finding(Level.FAULT, PART, str(error), "fetch the whole folder again, config.json among it")]
    outer: dict[str, Any] = json.loads((folder / "config.json").read_text())
    inner: dict[str, Any] = outer.get("text_config", outer)
    architectures = outer.get("architectures") or ["not said"]
    quantised = outer.get("quantization_config")
    definition = Definition(
        architecture=str(architectures[0]),
        family=str(outer.get("model_type", "not said")),
        shape=shape,
        dtype=str(inner.get("dtype") or inner.get("torch_dtype") or outer.get("torch_dtype") or "not said"),
        context_tokens=shape.max_position_embeddings,
        quantised=str(quantised.get("quant_method", "yes")) if isinstance(quantised, dict) else None,
        eos_ids=ids(inner.get("eos_token_id", outer.get("eos_token_id"))),
    )
    return definition, list(_findings(definition))


def ids(value: Any) -> tuple[int, ...]:
    """Token ids, of which configs give one, several or none."""
    found = value if isinstance(value, list) else [value]
    return tuple(each for each in found if isinstance(each, int) and not isinstance(each, bool))


def _findings(definition: Definition) -> Iterator[Finding]:
    if definition.architecture == "not said":
        yield Finding(Level.WARNING, PART, "config.json names no architectures", "take the folder from its publisher")
    elif not definition.architecture.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
        text = f"{definition.architecture} is no causal language model"
        yield Finding(Level.FAULT, PART, text, "take one whose architecture ends in ForCausalLM")
    if definition.quantised:
        text = f"its weights are stored quantised ({definition.quantised}), and no adapter is trained or served on that"
        yield Finding(Level.FAULT, PART, text, "take the model in full precision; engine.quantization makes it small")


def compare(definition: Definition, tensors: dict[str, Tensor]) -> Iterator[Finding]:
    """Whether the weights are those of the definition: its layers, its vocabulary, its parameters."""
    shape = definition.shape
    layers = {int(match[1]) for name in tensors if (match := _LAYER.search(name))}
    count = shape.num_hidden_layers
    missing = next((layer for layer in range(count) if layer not in layers), None)
    if layers and missing is not None:
        text = f"config.json has {count} layers and no tensor is of layer {missing}"
        yield Finding(Level.FAULT, "weights", text, "fetch the weights again, all shards")
    if more := sorted(layer for layer in layers if layer >= count):
        text = f"there are tensors of layer {more[0]}, and config.json has {count} layers"
        yield Finding(Level.WARNING, "weights", text, "see that config.json belongs to these weights")
    embeddings = [each for name, each in tensors.items() if name.endswith(_EMBEDDINGS)]
    if not embeddings:
        text = "no tensor is the token embedding"
        yield Finding(Level.FAULT, "weights", text, "fetch the weights again, all shards")
    elif embeddings[0].shape[:1] != (shape.vocab_size,):
        text = f"the embedding has {embeddings[0].shape[0]} rows and config.json a vocabulary of {shape.vocab_size}"
        yield Finding(Level.FAULT, "weights", text, "take config.json and weights of the same revision")
    if not shape.tie_word_embeddings and not any(name.endswith(_HEAD) for name in tensors):
        text = "config.json says that input and output embeddings are not tied, and there is no lm_head"
        yield Finding(Level.FAULT, "weights", text, "fetch the weights again, or set tie_word_embeddings")
    if definition.family in _GATED_MLP and embeddings:
        counted = sum(each.elements for each in tensors.values())
        if shape.tie_word_embeddings:
            counted -= sum(each.elements for name, each in tensors.items() if name.endswith(_HEAD))
        if abs(counted - shape.parameters) > 0.02 * shape.parameters:
            text = f"the weights have {counted:,} parameters where config.json's sizes give {shape.parameters:,}"
            yield Finding(Level.WARNING, "weights", text, "see that config.json belongs to these weights")
