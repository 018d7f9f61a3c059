"""What `models suggest` reckons a model takes is set against `jobs plan`: never below it, and not far above."""

from pathlib import Path

import pytest

from cluster.catalogue.suggest import needed_bytes, wish
from cluster.config import load
from jobs.config import Recipe
from jobs.plan import make_plan, shape_of

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE = sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml") if not path.stem.startswith("tiny"))


@pytest.mark.parametrize("model", LARGE)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_models_memory_is_a_bound_on_its_plan(model: str, method: str) -> None:
    settings = {
        "lora": "method={kind: lora, rank: 16, alpha: 32}",
        "full": "method={kind: full}",
    }
    overrides = [f"model={model}", settings[method], "publish=null", "train.workers=1", "train.zero=0"]
    overrides += ["train.activation_checkpointing=true", "cluster.memory_gb_per_worker=4000", "cluster.gpu=null"]
    recipe = load(CONFIGS / "recipes" / "support.yaml", Recipe, overrides)
    shape = shape_of(recipe.model)
    assert shape
    planned = make_plan(recipe, shape).total_bytes
    reckoned = needed_bytes(shape.parameters, wish("chat", "en", None, "quality", "1GiB", "policy", method, False))
    assert planned <= reckoned <= 4 / 3 * planned
