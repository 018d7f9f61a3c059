"""A run done again from its record, and its losses beside the original's.

    run.json of the original ─▸ the same recipe, base, dataset, seed and number of workers ─▸ a new run ─▸ compare

The data files that can be found are held against the original's: one that has changed is refused, by name. What cannot
be found is not needed as long as the store has the tokenised dataset. Licences are judged anew: what has been refused
since is not trained again. Nothing is published unless that is asked for.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import keys, logs, models, records, secret
from cluster.errors import DataError, InputError
from cluster.licences.gate import Gate
from cluster.logs import say
from cluster.models import cache_folder, read_shape
from cluster.records import RunRecord
from cluster.session import joined
from cluster.store import Store, open_store
from cluster.who import submitter
from jobs import driver, limits, run_record, runs
from jobs.config import Recipe
from jobs.data import prepared
from jobs.plan import make_plan
from jobs.references import find_run
from jobs.rows import locate

TOLERANCE = 1e-4
"""How far a loss may be from the original's: rounding that depends on the machine, and nothing else."""

CHANGEABLE = (
    *("train.workers", "train.max_failures", "limits.hours", "limits.usd", "limits.ledger_s"),
    *("publish.name", "publish.alias"),
)
"""What may differ from the original: where it computes, how long it may take, and whether it is published."""


@dataclass(frozen=True)
class Comparison:
    """Losses of two runs, step by step.

    Attributes:
        largest: the largest difference; None where no step can be compared.
        at: the step of it.
        parts: the first step whose difference is above TOLERANCE, or that one of them alone has a loss for.
    """

    steps: int
    largest: float | None
    at: int | None
    parts: int | None

    @property
    def is_equal(self) -> bool:
        """Whether every step of either has the other's loss."""
        return self.largest is not None and self.parts is None

    def __str__(self) -> str:
        if self.largest is None:
            return "no step of both has a loss"
        told = f"{self.steps} steps, largest difference of a loss {self.largest:.1e} (step {self.at})"
        return f"{told}; they part at step {self.parts}" if self.parts is not None else told


def compare(original: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]]) -> Comparison:
    """Hold the metrics lines of two runs against one another. Pure."""
    one, other = ({int(line["step"]): line["loss"] for line in lines} for lines in (original, again))
    apart = {
        step: abs(one[step] - other[step])
        for step in sorted(one.keys() & other.keys())
        if one[step] is not None and other[step] is not None
    }
    lone = [step for step in one.keys() | other.keys() if (one.get(step) is None) != (other.get(step) is None)]
    lone += list(one.keys() ^ other.keys())
    beyond = [step for step, difference in apart.items() if not difference <= TOLERANCE]
    at = max(apart, key=lambda step: apart[step], default=None)
    return Comparison(len(apart), apart[at] if at is not None else None, at, min([*beyond, *lone], default=None))


def run(reference: str, url: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Do the run behind an adapter, a model or a run id once more. Returns the new run's last line.

    What follows `reproduces` in it says how the losses compare.

    Raises LuthierError: InputError when it has no steps to compare with, DataError for a data file that has changed,
    LicenceRefused.
    """
    began = time.time()
    given = (override.partition("=") for override in overrides if override.startswith("secrets."))
    secret.load({name.removeprefix("secrets."): reference for name, _, reference in given})
    store = open_store(url)
    original = find_run(store, reference)
    steps = list(runs.read_steps(store, original.run_id))
    if not steps:
        raise InputError(f"run {original.run_id} has done no step, so there is nothing to compare with")
    recipe = _recipe(store, original, overrides)
    limits.check(recipe)
    secret.load(recipe.secrets)
    for difference in differences(original):
        say(f"warning: {difference}")
    gate = Gate.here()
    begun = None
    if original.parent:
        runs.find_checkpoint(store, f"{original.parent.run_id}@{original.parent.step}")
        begun = runs.find(store, original.parent.run_id).record
    driver.judge(recipe, original.base, begun, store, gate)
    files = check_files(store, original, Path.cwd())
    with joined(recipe.cluster, recipe.train.fewest, recipe.train.most, recipe.secrets):
        folder = models.fetch(recipe.model, original.base, store)
        licences = driver.judge(recipe, original.base, begun, store, gate, folder)
        shape = read_shape(folder)
        say(driver.summary(recipe, make_plan(recipe, shape)))
        datasets = [_dataset(store, original, use, recipe, files, folder) for use in ("train", "evaluation")]
        record = run_record.write(
            store,
            recipe,
            original.base,
            [each for each in datasets if each],
            original.sources,
            original.parent,
            licences,
            original.prepared,
            original.gate if recipe.publish else None,
            reproduces=original.run_id,
        )
        say(f"run {record.run_id} in {store.url} reproduces {original.run_id}")
        runs.tell(store, record.run_id, f"submitted by {submitter()}, reproduces {original.run_id}", "preparing")
        line = driver.carry_out(record, recipe, shape, store, began)
    if line["state"] != "succeeded":
        return line | {"is_reproduced": False}
    found = compare(steps, list(runs.read_steps(store, record.run_id)))
    said = f"compared with {original.run_id}: {found}"
    runs.tell(store, record.run_id, said)
    say(said)
    return line | {
        "reproduces": original.run_id,
        "steps_compared": found.steps,
        "largest_difference": found.largest,
        "largest_at_step": found.at,
        "parts_at_step": found.parts,
        "is_reproduced": found.is_equal,
    }


def ended(line: dict[str, Any]) -> int:
    """A reproduction's last line; returns the exit code: 0 when its losses are the original's."""
    return logs.ended(line) or int(not line["is_reproduced"])


def differences(original: RunRecord) -> list[str]:
    """What computes now and did not then, in words: the code, and versions of libraries."""
    found = []
    if original.digests is None:
        if original.code_revision != run_record.code_revision():
            found.append(f"the code is {run_record.code_revision()}, and was {original.code_revision}")
    elif original.digests.code != run_record.code():
        found.append(
            f"the code has changed: its digest is {run_record.code()[:12]}, and was {original.digests.code[:12]}"
        )
    now = run_record.versions()
    for name, version in original.versions.items():
        if now.get(name) != version:
            found.append(f"{name} is {now.get(name, 'not here')}, and was {version}")
    return found


def check_files(store: Store, original: RunRecord, base: Path) -> dict[str, Path]:
    """The original's data files that can be found, by name. Raises DataError for those that have changed."""
    found: dict[str, Path] = {}
    changed = []
    was = {source.name: source.sha256 for source in original.sources}
    data = original.recipe["data"]
    for name in was or (*data["train"], *data.get("evaluation", ())):  # an older record has names alone
        try:
            found[name] = locate(name, store, cache_folder() / "data", base)
        except DataError as error:
            say(f"warning: not compared with the original's: {error}")
            continue
        now = records.describe_file(found[name], name).sha256
        if now != was.get(name, now):
            changed.append(f"{name} has changed since: its SHA-256 is {now[:12]}…, and was {was[name][:12]}…")
    if changed:
        whole = "; ".join(changed)
        raise DataError(f"{original.run_id} cannot be reproduced: {whole}. Put the file back as it was")
    return found


def _recipe(store: Store, original: RunRecord, overrides: Sequence[str]) -> Recipe:
    """The original's recipe, on as many workers as it began with, publishing nothing. Raises ConfigError."""
    published = any(each.startswith("publish.") for each in overrides)
    without = {"publish": None} if published else {"publish": None, "evaluation": None}  # that guards what is published
    quiet = original.model_copy(update={"recipe": original.recipe | without})
    moves = any(each.startswith("publish.alias=") for each in overrides)
    given = [*overrides, *(["publish.alias=null"] if published and not moves else [])]  # unless that is asked for
    recipe = driver.recipe_again(quiet, given, CHANGEABLE)
    started = runs.attempts(store, original.run_id)
    if started:
        recipe = recipe.at(micro_batch=min(recipe.train.micro_batch, started[-1].micro_batch))
        if not any(each.startswith("train.workers=") for each in overrides):
            recipe = recipe.at(workers=started[0].world_size)
        if len({each.world_size for each in started}) > 1:
            went = ", ".join(str(each.world_size) for each in started)
            say(f"warning: the original went over {went} workers; this run is on {recipe.train.workers}")
    return recipe


def _dataset(
    store: Store, original: RunRecord, use: str, recipe: Recipe, files: dict[str, Path], folder: Path
) -> str | None:
    """The digest of the tokenised dataset, made once more if the store has lost it. Raises DataError."""
    wanted = original.dataset if use == "train" else original.evaluation
    if wanted is None or store.exists(keys.dataset_manifest(wanted)):
        return wanted
    if original.prepared:
        rows = prepared.fetch(prepared.find(store, original.prepared), store)[0 if use == "train" else 1]
    else:
        names = recipe.data.train if use == "train" else recipe.data.evaluation
        missing = [name for name in names if name not in files]
        if missing:
            raise DataError(
                f"{original.run_id} cannot be reproduced: the store has lost dataset {wanted[:12]}, and it cannot be "
                f"made again without {', '.join(missing)}"
            )
        rows = [(name, files[name]) for name in names]
    made = driver.tokenise(list(rows), recipe, folder, store)
    if made != wanted:
        raise DataError(
            f"{original.run_id} cannot be reproduced: its rows give dataset {made[:12]} now, and gave {wanted[:12]}: "
            "the tokenizer or the code that reads rows has changed"
        )
    return made
