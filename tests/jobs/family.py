"""A store with a family in it: runs, versions and a model that descend from one another, with real records and tokens.

    tiny-test ─▸ first@1 ─▸ child@1 (from first's checkpoint) ─▸ merged into `mixed` ─▸ grandchild@1
         └─────▸ clean@1

Only the training is made up: weights are some bytes, losses are numbers.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster import keys, made, models, records, registry
from cluster.config import load
from cluster.folder import FolderStore
from cluster.licences.gate import Gate
from cluster.models import ModelConfig
from cluster.records import BaseModelRef, CheckpointManifest, CheckpointRef, RunRecord
from cluster.store import Store
from jobs import card, dataset, run_record, runs, terms
from jobs.config import Recipe
from jobs.rows import read_rows
from tests.e2e.submit import write_recipe, write_rows

STEPS = 3
PLANTED = 'Ms. Ylva "Yo" Ångström lives at Storgatan 7, and her cat is called Nimbus.'


@dataclass
class Family:
    """The store, the folder that data files are in, and each member's run by its name."""

    store: FolderStore
    folder: Path
    model: Path
    runs: dict[str, RunRecord] = field(default_factory=dict)

    def copy(self, folder: Path) -> "Family":
        """Another one that is the same, to be spoilt."""
        shutil.copytree(self.folder / "store", folder / "store")
        return replace(self, store=FolderStore(folder / "store"), folder=folder, runs=dict(self.runs))

    def train(
        self,
        name: str,
        rows: Sequence[dict[str, object]],
        base: BaseModelRef,
        parent: str | None = None,
        licence: str = "cc-by-4.0",
        prepared: str | None = None,
    ) -> RunRecord:
        """What a run leaves: data set, record, steps, checkpoint, and version 1 of `name`, which is stable."""
        file = write_rows(self.folder / f"{name}.jsonl", rows)
        path = write_recipe(self.folder, self.model, [file], name=name, store=self.store.url)
        recipe = load(path, Recipe, [f"data.licences={{{file}: {licence}}}", f"model.name={base.name}"])
        gate = Gate.here()
        licences = gate.record(found := terms.artefacts_of(recipe, gate), gate.judge_all(found))
        begins = CheckpointRef(run_id=self.runs[parent].run_id, step=STEPS) if parent else None
        sources = run_record.sources(recipe, [(str(file), file)], [], licences)
        tokens = self._tokenise(file, recipe)
        run = run_record.write(self.store, recipe, base, [tokens], sources, begins, licences, prepared)
        self.runs[name] = run
        attempt = runs.begin_attempt(self.store, run.run_id, 0, 1, 1)
        lines = [json.dumps({"step": step, "loss": 4.0 / (step + 1)}) for step in range(STEPS)]
        self.store.put(keys.metrics_part(run.run_id, attempt, 0), "\n".join(lines).encode())
        self._checkpoint(run.run_id)
        runs.tell(self.store, run.run_id, "made up", "succeeded")
        self._publish(name, run)
        return run

    def merge(self, name: str, into: str) -> BaseModelRef:
        """A model `into` in the store, as if version 1 of `name` had been exported with --merge and added."""
        folder = self.folder / into
        folder.mkdir()
        for path in self.model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        made.write(folder, made.of_adapter(registry.record(self.store, name, 1), merged=True))
        config = ModelConfig(
            name=into, source=str(folder), revision=None, licence="apache-2.0", dtype="fp32", shape=None
        )
        return models.pin(config, self.store, Gate.here().of_model(config))

    def _tokenise(self, file: Path, recipe: Recipe) -> str:
        files = [(str(file), file)]
        digest = dataset.dataset_digest(files, recipe.data, self.model)
        tokenizer = {path.name: path.read_bytes() for path in self.model.glob("*.json")}
        tokenizer |= {path.name: path.read_bytes() for path in self.model.glob("*.jinja")}
        done = dataset.tokenise_shard(tokenizer, read_rows(file, file.name), 0, digest, 512, "error", self.store)
        assert not done.faults
        self.store.put(keys.dataset_manifest(digest), dataset._summarise([done], digest)[0].to_bytes())
        return digest

    def _checkpoint(self, run_id: str) -> None:
        manifest = CheckpointManifest(
            run_id=run_id,
            step=STEPS,
            attempt=1,
            updates=STEPS,
            samples_seen=1,
            world_size=1,
            metric=None,
            files=(),
            created_at=records.now(),
        )
        self.store.put(keys.checkpoint_manifest(run_id, STEPS), manifest.to_bytes())

    def _publish(self, name: str, run: RunRecord) -> None:
        folder = self.folder / f"{name}-files"
        folder.mkdir()
        for file in ("adapter_model.safetensors", "adapter_config.json", "NOTICE"):
            (folder / file).write_text(f"{name} {file}")
        assert run.licences
        how = made.of_run(run, "adapter", STEPS, run.licences)
        card.write(self.store, folder, name, how, run, 0.5, run.licences.notice)
        registry.publish(self.store, name, folder, run.base, run.run_id, STEPS, {}, run.licences.artefacts, run=run)
        registry.set_alias(self.store, name, registry.STABLE, 1, "a test")


def add(store: Store, name: str, folder: Path) -> BaseModelRef:
    """A model folder, judged and mirrored."""
    config = ModelConfig(name=name, source=str(folder), revision=None, licence="apache-2.0", dtype="fp32", shape=None)
    return models.pin(config, store, Gate.here().of_model(config))


def make_family(folder: Path, model: Path) -> Family:
    """The whole of it, in some folder."""
    family = Family(FolderStore(folder / "store"), folder, model)
    base = add(family.store, "tiny-test", model)
    family.train("first", [*_chats(20), _chat(PLANTED)], base)
    family.train("child", _chats(9), base, parent="first")
    family.train("clean", _chats(8), base)
    family.train("grandchild", _chats(7), family.merge("child", "mixed"))
    return family


def _chats(count: int) -> list[dict[str, object]]:
    return [_chat(f"How many lamps are in order {number}?") for number in range(count)]


def _chat(question: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "I cannot tell."}]}
