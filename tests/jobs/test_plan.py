"""The plan: its arithmetic against the real model, its choice of a ZeRO stage, and its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from cluster.config import load
from cluster.errors import ConfigError, PlanError
from cluster.models import Shape, read_shape
from jobs.config import LoraConfig, Recipe, ScheduleConfig
from jobs.lora import prepare
from jobs.plan import make_plan, trained_parameters
from jobs.schedule import learning_rate
from tests.conftest import TinyModels

QWEN3_8B = Path("configs/models/qwen3-8b.yaml").resolve()
RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "quickstart-redact.yaml"


def recipe(*overrides: str) -> Recipe:
    return load(RECIPE, Recipe, overrides)


def shape(loaded: Recipe) -> Shape:
    assert loaded.model.shape
    return loaded.model.shape


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral", "gemma3"])
@pytest.mark.parametrize("dora", [False, True])
def test_parameter_counts_are_those_of_the_real_model(tiny_models: TinyModels, architecture: Any, dora: bool) -> None:
    folder = tiny_models[architecture]
    model = AutoModelForCausalLM.from_pretrained(folder)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    found = read_shape(folder)
    assert found.parameters == matrices
    lora = prepare(model, LoraConfig(kind="lora", rank=4, dora=dora), seed=0)
    wanted = sum(parameter.numel() for parameter in lora.parameters() if parameter.requires_grad)
    planned = recipe("method.rank=4", f"method.dora={json.dumps(dora)}", f"model.source={folder}")
    assert trained_parameters(planned, found) == wanted


def test_auto_takes_the_least_sharding_that_fits() -> None:
    def stage(memory_gb: float, *more: str) -> int:
        big = recipe("model=qwen3-8b", "train.workers=8", f"cluster.memory_gb_per_worker={memory_gb}", *more)
        return make_plan(big, shape(big)).zero

    full = ("method={kind: full}", "train.activation_checkpointing=true")
    assert stage(80) == 0
    assert stage(14) == 3
    assert [stage(memory, *full) for memory in (200, 60, 40, 20)] == [0, 1, 2, 3]


def test_dora_is_never_planned_under_zero_3() -> None:
    big = ("model=qwen3-8b", "train.workers=8", "method.dora=true")
    fits, plain = (recipe(*big[:2], "cluster.memory_gb_per_worker=80", f"method.dora={it}") for it in ("true", "false"))
    assert make_plan(fits, shape(fits)).zero == 0
    assert make_plan(fits, shape(fits)).total_bytes > make_plan(plain, shape(plain)).total_bytes
    too_big = recipe(*big, "cluster.memory_gb_per_worker=14")
    with pytest.raises(PlanError, match=r"set method\.dora: false, which ZeRO-3 needs"):
        make_plan(too_big, shape(too_big))
    with pytest.raises(ConfigError, match=r"method\.dora needs whole base weights"):
        recipe(*big, "train.zero=3")


def test_one_worker_is_never_sharded() -> None:
    alone = recipe("train.workers=1")
    assert make_plan(alone, shape(alone)).zero == 0


def test_what_does_not_fit_is_refused_with_a_way_out() -> None:
    big = recipe("model=qwen3-8b", "method={kind: full}", "train.workers=2")
    with pytest.raises(PlanError, match=r"needs \d+\.\d GiB on each of 2 workers \(ZeRO-3\).*use more train.workers"):
        make_plan(big, shape(big))


@pytest.mark.parametrize(
    ("workers", "batch", "micro", "expected"), [(1, 8, 1, 8), (2, 8, 2, 2), (3, 8, 1, 3), (7, 64, 4, 3)]
)
def test_batch_arithmetic(workers: int, batch: int, micro: int, expected: int) -> None:
    made = recipe(f"train.workers={workers}", f"train.global_batch={batch}", f"train.micro_batch={micro}")
    assert make_plan(made, shape(made)).micro_batches_per_step == expected


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_ends_where_it_should(kind: Any) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=4, final_share=0.1)
    rates = [learning_rate(step, 20, 1.0, schedule) for step in range(21)]
    assert 0 < rates[0] < rates[3] < rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[20] == pytest.approx(1.0 if kind == "constant" else 0.1)
