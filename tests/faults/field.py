"""Where the fault tests do their runs: a store on a real server, and records to make any number of runs from."""

import json
from pathlib import Path
from uuid import uuid4

import pytest

from cluster import keys, records
from cluster.nodes import LocalCluster
from cluster.records import RunRecord
from cluster.store import Store, open_store
from tests.e2e.submit import write_recipe
from tests.faults.ranks import Ranks, prepare, train
from tests.servers import S3Server


class Field:
    """A store, and one prepared run for each recipe, whose records others are made from.

    Args:
        recipes: name to the model's folder and the method, as a recipe has it.
    """

    def __init__(
        self, cluster: LocalCluster, server: S3Server, folder: Path, recipes: dict[str, tuple[Path, str]], rows: Path
    ) -> None:
        self.cluster, self.server, self.folder = cluster, server, folder
        self.url = f"s3://{server.bucket}/{uuid4().hex}"
        paths = [
            write_recipe(folder, model, [rows], name=name, store=self.url, method=method, learning_rate=1e-4)
            for name, (model, method) in recipes.items()
        ]
        begun = Ranks(cluster, server.env, 1, folder / "prepare", prepare, paths).wait()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.env.items():
                patch.setenv(name, value)
            self.store: Store = open_store(self.url)
        found = [records.read(self.store, keys.run_record(run_id), RunRecord) for run_id in begun]
        self._records = dict(zip(recipes, found, strict=True))

    def new_run(self, recipe: str, name: str, *, steps: int, every: int, **checkpoint: float) -> RunRecord:
        """A run of so many steps with a checkpoint every so often, which nothing is published of."""
        record = self._records[recipe]
        changed = {
            **record.recipe,
            "train": {**record.recipe["train"], "steps": steps},
            "checkpoint": {"every_steps": every, **checkpoint},
            "publish": None,
        }
        made = record.model_copy(update={"run_id": name, "recipe": json.loads(json.dumps(changed))})
        self.store.create(keys.run_record(name), made.to_bytes())
        return made

    def start(self, record: RunRecord, world_size: int, zero: int, endpoint: str | None = None) -> Ranks:
        """The workers of an attempt; `endpoint` is where they find the server, when not where it is."""
        variables = {"AWS_ENDPOINT_URL": endpoint} if endpoint else {}
        given = (self.url, record, {"workers": world_size}, zero)
        return Ranks(self.cluster, variables, world_size, self.folder / record.run_id, train, *given)
