"""Python code that a model brings (`auto_map` in its configs, *.py beside them): it never runs here.

It is never fetched or mirrored, and training and serving load with `trust_remote_code=False`. A model whose family
transformers has of its own does without; any other is refused.
"""

import json
from pathlib import Path

from cluster.errors import ModelError

NO_CODE = {"trust_remote_code": False}
"""What every load is told. Not told, transformers asks whoever sits at the terminal."""

NATIVE_FAMILIES = frozenset({
    "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "exaone4", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text",
    "glm", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe", "lfm2", "llama", "ministral", "mistral",
    "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
"""Families (`model_type`) that the pinned transformers loads without anybody's code; a test compares them with it."""

_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def carried(folder: Path) -> tuple[str, ...]:
    """The Python files of a folder, and its configs that name code, as `config.json: auto_map`."""
    named = [f"{name}: auto_map" for name in _CONFIGS if "auto_map" in _read(folder / name)]
    return (*sorted(path.name for path in folder.glob("*.py")), *named)


def needed(folder: Path) -> str | None:
    """The class that only the model's own code defines; None where transformers has the family, and the tokenizer."""
    config = _read(folder / "config.json")
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and config.get("model_type") not in NATIVE_FAMILIES:
        return str(auto_map.get("AutoModelForCausalLM") or next(iter(auto_map.values()), "auto_map"))
    tokenizer = _read(folder / "tokenizer_config.json").get("auto_map")
    if isinstance(tokenizer, dict) and not (folder / "tokenizer.json").is_file():
        return f"the tokenizer {tokenizer.get('AutoTokenizer')}"
    return None


def refuse(folder: Path) -> None:
    """Raises ModelError for a model that cannot be loaded without running its own code."""
    if found := needed(folder):
        raise ModelError(
            f"{folder} can only be loaded by running code that it brings ({found}), which is never done here; take a "
            "model of a family that transformers has: `luthier cluster models suggest` names some"
        )


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}  # what is wrong with it, an inspection says
    return found if isinstance(found, dict) else {}
