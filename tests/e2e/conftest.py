"""What the end-to-end tests share: rows, a store on the S3 server, and two adapters that jobs have trained into it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cluster.nodes import LocalCluster
from cluster.store import Store, open_store
from jobs.runs import read_steps
from scripts.demo import tasks
from tests.conftest import TinyModels
from tests.e2e.submit import train, write_recipe, write_rows
from tests.servers import S3Server


@pytest.fixture(scope="session")
def store(s3: S3Server) -> Iterator[Store]:
    """A store on the S3 server that the cluster's nodes use too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.env.items():
            patch.setenv(name, value)
        yield open_store(f"s3://{s3.bucket}/shared")


@pytest.fixture
def laptop(ray_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    """This process, with the cluster's token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, ray_cluster.environment()[name])
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return ray_cluster


@dataclass(frozen=True)
class Pair:
    """The last lines of two jobs: the same recipe on one worker with ZeRO-0, and on two nodes with ZeRO-3.

    The first goes on for longer: 48 steps with a checkpoint every 8, where the second has 8; its data was prepared.
    What it must show before its alias moves is in `gate`, as the recipe has it.
    """

    store: Store
    one: dict[str, Any]
    two: dict[str, Any]

    def losses(self, result: dict[str, Any]) -> list[float]:
        return [step["loss"] for step in read_steps(self.store, result["run_id"])]


@pytest.fixture(scope="session")
def pair(
    ray_cluster: LocalCluster,
    tiny_models: TinyModels,
    rows: Path,
    store: Store,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    recipe = write_recipe(folder, tiny_models["qwen3"], [rows], name="pair", store=store.url)
    held_out = [*islice(tasks.rows("orders-json", "heldout"), 40)]
    held_out_file = write_rows(folder / "heldout.jsonl", held_out)
    asked = [row["messages"] for row in held_out[:8]]
    asking = write_rows(folder / "asking.jsonl", [{"messages": messages[:-1]} for messages in asked])
    safe = [{"messages": messages[:-1], "must_not_contain": ["[pP]assword"]} for messages in asked[:2]]
    gate = {
        "loss": {"max_loss": 4, "max_increase": 0.1},
        "regression": {"prompts": [str(asking)], "max_worse": 0.25},
        "safety": {"prompts": [str(write_rows(folder / "safe.jsonl", safe))], "shipped": False},
        "max_tokens": 16,
    }
    with ThreadPoolExecutor() as pool:
        one = pool.submit(
            train,
            ray_cluster,
            recipe,
            *("publish.name=pair-one", "train.steps=48", "checkpoint.every_steps=8"),
            *(f"data.evaluation=[{held_out_file}]", f"evaluation={json.dumps(gate)}"),
            "data.rules={duplicates: {exact: off}}",
        )
        two = pool.submit(
            train,
            ray_cluster,
            recipe,
            *("publish.name=pair-two", "train.workers=2", "train.zero=3", "train.micro_batch=2"),
        )
        return Pair(store, one.result().result, two.result().result)
