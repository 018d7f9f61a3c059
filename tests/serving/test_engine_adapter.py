"""What peft writes loads; whatever the engine would have to ignore or get wrong is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from cluster.errors import AdapterRefused
from serving.engine.adapter import Target, read_adapter

if TYPE_CHECKING:
    from tests.serving.conftest import CoreDriver, LoraRecipe, TinyModel

    Tiny = Callable[[str], TinyModel]
    Drive = Callable[..., CoreDriver]

WEIGHTS = "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def recipes(every_recipe: tuple[LoraRecipe, ...]) -> tuple[LoraRecipe, ...]:
    """The last two are of DoRA."""
    return every_recipe


@pytest.fixture(scope="module")
def target(model: TinyModel, drive: Drive) -> Target:
    return drive(model, max_rank=8).core.target


@pytest.fixture
def folder(model: TinyModel, recipes: tuple[LoraRecipe, ...], tmp_path: Path) -> Path:
    """A copy of a good adapter, to be damaged."""
    return Path(shutil.copytree(model.adapter(recipes[0]), tmp_path / "adapter"))


def refused(folder: Path, target: Target) -> str:
    with pytest.raises(AdapterRefused) as caught:
        read_adapter("d", folder, target)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_every_recipe_loads_with_peft_s_own_config_file(
    model: TinyModel, target: Target, recipes: tuple[LoraRecipe, ...]
) -> None:
    for recipe in recipes:
        adapter = read_adapter("d", model.adapter(recipe), target)
        assert adapter.pairs
        assert {len(pair.a) for pair in adapter.pairs.values()} <= {2, 3, 4, 5, 6, 8}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # it warns of some of these too
@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"r": 9}, "max_rank of 8"),
    ],
)
def test_what_peft_can_make_and_we_cannot_serve_is_refused(
    extra: dict[str, Any], named: str, model: TinyModel, target: Target, tmp_path: Path
) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False} | extra
    get_peft_model(model.load(), LoraConfig(**settings)).save_pretrained(tmp_path / "adapter")
    assert named in refused(tmp_path / "adapter", target)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"r": "four"}, "r is 'four'"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"rank_pattern": {"q_proj": "four"}}, "for 'q_proj' stands 'four'"),
        ({"alpha_pattern": {".*": float("inf")}}, "stands inf"),
        ({"r": 5}, "has shape (4, 32), expected (5, 32)"),
        ({"a_setting_of_next_year": True}, "a_setting_of_next_year"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_bad_config_is_refused(changes: dict[str, Any], named: str, folder: Path, target: Target) -> None:
    change_config(folder, **changes)
    assert named in refused(folder, target)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, folder: Path, target: Target) -> None:
    change_tensors(folder, lambda tensors: tensors[FIRST][1].fill_(value))
    assert FIRST in refused(folder, target)


def test_values_that_overflow_in_the_engines_precision_are_refused(folder: Path, target: Target) -> None:
    change_tensors(folder, lambda tensors: tensors[FIRST].fill_(1e5))
    half = Target(target.linears, target.max_rank, torch.float16, target.device)
    assert FIRST in refused(folder, half)
    read_adapter("d", folder, target)


def test_wrong_shapes_are_refused(folder: Path, target: Target) -> None:
    change_tensors(folder, lambda tensors: tensors.update({FIRST: torch.zeros(4, 33)}))
    message = refused(folder, target)
    assert FIRST in message
    assert "(4, 33), expected (4, 32)" in message


def test_half_a_pair_is_refused(folder: Path, target: Target) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(FIRST.replace("lora_A", "lora_B")))
    assert FIRST.replace("lora_A", "lora_B") in refused(folder, target)


def test_another_bases_adapter_is_refused(folder: Path, target: Target) -> None:
    elsewhere = FIRST.replace("layers.0", "layers.7")
    other_half = {name: name.replace("lora_A", "lora_B") for name in (FIRST, elsewhere)}

    def move(tensors: dict[str, torch.Tensor]) -> None:
        tensors[elsewhere] = tensors.pop(FIRST)
        tensors[other_half[elsewhere]] = tensors.pop(other_half[FIRST])

    change_tensors(folder, move)
    assert elsewhere in refused(folder, target)


@pytest.mark.parametrize("recipe", [-2, -1])
def test_dora_is_what_peft_merges(recipe: int, tiny: Tiny, drive: Drive, recipes: tuple[LoraRecipe, ...]) -> None:
    """g ⊙ W + the folded B A is the merged weight, and g ⊙ bias + (1 − g) ⊙ bias the bias, which peft leaves alone."""
    model = tiny("llama")
    target = drive(model).core.target
    merged = dict(
        PeftModel.from_pretrained(model.load(), model.adapter(recipes[recipe])).merge_and_unload().named_modules()
    )
    pairs = read_adapter("d", model.adapter(recipes[recipe]), target).pairs
    assert len(pairs) == (14, 4)[recipe + 2]
    for path, pair in pairs.items():
        assert pair.rescale is not None
        base, (scale, shift) = target.linears[path], pair.rescale
        weight = scale[:, None] * base.weight + (pair.a.t() @ pair.b).t()
        torch.testing.assert_close(weight, merged[path].weight, atol=1e-5, rtol=1e-5)
        assert base.bias.abs().min() > 0
        torch.testing.assert_close(scale * base.bias + shift, merged[path].bias, atol=1e-5, rtol=1e-5)


def test_a_pattern_that_is_none_is_refused(
    model: TinyModel, target: Target, recipes: tuple[LoraRecipe, ...], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model.adapter(recipes[0]), tmp_path / "pattern"))
    change_config(copy, alpha_pattern={"(": 64})
    assert "'(' is no regular expression" in refused(copy, target)


def test_a_dora_folder_that_is_not_whole_is_refused(
    model: TinyModel, target: Target, recipes: tuple[LoraRecipe, ...], tmp_path: Path
) -> None:
    magnitude = "base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector"

    def spoilt(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
        copy = Path(shutil.copytree(model.adapter(recipes[-1]), tmp_path / name))
        change_tensors(copy, change)
        return refused(copy, target)

    assert f"{magnitude} is missing" in spoilt("missing", lambda tensors: tensors.pop(magnitude))
    assert f"{magnitude} has shape (31,), expected (32,)" in spoilt(
        "short", lambda tensors: tensors.update({magnitude: tensors[magnitude][1:].clone()})
    )
    assert magnitude in spoilt("nan", lambda tensors: tensors[magnitude][3].fill_(float("nan")))
    factors = [magnitude.replace("magnitude_vector", f"{side}.weight") for side in "AB"]
    assert magnitude in spoilt("endless norm", lambda tensors: [tensors[each].fill_(1e30) for each in factors])
    plain = Path(shutil.copytree(model.adapter(recipes[-1]), tmp_path / "plain"))
    change_config(plain, use_dora=False)
    assert "use_dora is not set" in refused(plain, target)


def test_dora_on_weights_that_are_not_those_of_training_is_refused(
    model: TinyModel, target: Target, recipes: tuple[LoraRecipe, ...]
) -> None:
    class Packed(nn.Linear):
        """As layers of 8 and 4 bits are: a Linear, and not with the weights that norms were taken of."""

    packed = {path: Packed(each.in_features, each.out_features) for path, each in target.linears.items()}
    message = refused(model.adapter(recipes[-1]), replace(target, linears=packed))
    assert "use_dora" in message
    assert "is a Packed" in message
    read_adapter("d", model.adapter(recipes[0]), replace(target, linears=packed))


def test_dora_without_a_norm_to_divide_by_is_refused(
    model: TinyModel, target: Target, recipes: tuple[LoraRecipe, ...], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model.adapter(recipes[-1]), tmp_path / "adapter"))
    change_tensors(folder, lambda tensors: [each.zero_() for name, each in tensors.items() if "lora_B" in name])
    read_adapter("d", folder, target)
    zeros = {path: nn.Linear(each.in_features, each.out_features) for path, each in target.linears.items()}
    for each in zeros.values():
        nn.init.zeros_(each.weight)
    assert "lora_magnitude_vector gives values that are not finite" in refused(folder, replace(target, linears=zeros))


def test_an_empty_adapter_is_refused(folder: Path, target: Target) -> None:
    save_file({}, folder / WEIGHTS)
    assert "no tensors" in refused(folder, target)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_missing_file_is_refused(name: str, folder: Path, target: Target) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in refused(folder, target)


@pytest.mark.parametrize("keep", [0, 7, 100, 2000])
def test_a_truncated_file_is_refused(keep: int, folder: Path, target: Target) -> None:
    data = (folder / WEIGHTS).read_bytes()
    assert keep < len(data)
    (folder / WEIGHTS).write_bytes(data[:keep])
    assert "damaged" in refused(folder, target)


@pytest.mark.parametrize("text", ["", "{", "[]", '"LORA"', "null"])
def test_a_config_that_is_no_object_is_refused(text: str, folder: Path, target: Target) -> None:
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refused(folder, target)
