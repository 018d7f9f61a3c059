"""A whole run, seen from the driver: each stage leaves a record that the next one reads.

    resolve → plan → locate data → join Ray → pin the model → check data → tokenise → run.json
    run.json → train and publish → evaluate → alias
    resume: run.json → join Ray → train and publish → evaluate → alias

Everything that can be wrong with what the person gave is found before run.json is written, and before any worker is
taken. Torch is imported by the checks of model and tokenizer, never before a config is sound.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cluster import ledger, models, secret
from cluster.config import load
from cluster.errors import ConfigError, Fault, InputError, LuthierError, RunFailed
from cluster.licences.gate import Gate
from cluster.logs import say
from cluster.models import Shape, read_shape
from cluster.patient import PatientStore
from cluster.records import BaseModelRef, CheckpointRef, LicenceRecord, RunRecord, distinct
from cluster.session import joined
from cluster.store import Store, open_store
from cluster.who import submitter
from jobs import dataset, limits, run_record, runs, terms
from jobs.attempts import Attempts
from jobs.config import FullConfig, LoraConfig, Method, Recipe
from jobs.data import prepared
from jobs.data.request import Files
from jobs.plan import Plan, make_plan, shape_of
from jobs.release import release
from jobs.suites import Suites


def run(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Do what a recipe says. Returns the job's last line. Raises LuthierError."""
    began = time.time()
    recipe = load(path, Recipe, overrides)
    limits.check(recipe)
    gate = Gate.here()
    terms.require(recipe, gate)
    shape = shape_of(recipe.model)
    if shape:
        make_plan(recipe, shape)
        limits.check_plan(recipe, shape, Path.cwd())
    secret.load(recipe.secrets)
    store = open_store(recipe.store)
    files = [dataset.locate_all(names, store, Path.cwd()) for names in (recipe.data.train, recipe.data.evaluation)]
    parent = runs.find_checkpoint(store, recipe.from_) if recipe.from_ else None
    suites = Suites.locate(recipe.evaluation, store, Path.cwd()) if recipe.evaluation else None
    with joined(recipe.cluster, recipe.train.fewest, recipe.train.most, recipe.secrets):
        record, shape = begin(recipe, files, parent, store, gate, suites)
        return carry_out(record, recipe, shape, store, began)


def begin(
    recipe: Recipe,
    files: Sequence[Files],
    parent: CheckpointRef | None,
    store: Store,
    gate: Gate,
    suites: Suites | None = None,
) -> tuple[RunRecord, Shape]:
    """Pin the model, check the data, tokenise, and write run.json: all that comes before a worker is taken.

    Args:
        files: those to train on, and those to evaluate on.
        suites: the prompts that the result is evaluated by.
    """
    begun = runs.find(store, parent.run_id).record if parent else None
    if begun:
        terms.require(recipe, gate, terms.of_parent(begun, gate))
    base = models.pin(recipe.model, store, gate.of_model(recipe.model))
    if begun:
        _check_parent(recipe, base, begun)
    judge(recipe, base, begun, store, gate)  # before gigabytes are fetched
    folder = models.fetch(recipe.model, base, store)
    licences = judge(recipe, base, begun, store, gate, folder)
    for duty in licences.duties:
        say(f"licence: {duty}")
    shape = read_shape(folder)
    plan = make_plan(recipe, shape)
    _check_model(folder, recipe)
    say(summary(recipe, plan))
    card, rows = prepared.for_run(recipe, files, folder, store)
    tokenised = [tokenise(some, recipe, folder, store) for some in rows if some]
    required = suites.require(store, tokenised[1] if len(tokenised) > 1 else None) if suites else None
    read = run_record.sources(recipe, files[0], files[1], licences)
    checked = card.digest if card else None
    record = run_record.write(store, recipe, base, tokenised, read, parent, licences, checked, required)
    say(f"run {record.run_id} in {store.url}")
    if not recipe.publish:
        say("warning: publish is not set, so the trained weights stay in the run's last checkpoint")
    begins = f", from {parent.run_id}@{parent.step}" if parent else ""
    runs.tell(store, record.run_id, f"submitted by {submitter()}{begins}; {summary(recipe, plan)}", "preparing")
    return record, shape


def resume(run_id: str, url: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Go on with a run that has stopped, failed or was lost, under its own id. Returns the job's last line.

    Raises LuthierError: InputError when there is no such run, when it has succeeded, or when it is still running.
    """
    began = time.time()
    given = (override.partition("=") for override in overrides if override.startswith("secrets."))
    secret.load({name.removeprefix("secrets."): reference for name, _, reference in given})  # the store's own, perhaps
    store = open_store(url)
    found = runs.find(store, run_id)
    if found.state not in ("stopped", "failed", "lost"):
        still = "has succeeded: there is nothing to go on with" if found.state == "succeeded" else f"is {found.state}"
        wait = ", or is lost, which shows within a minute" if found.state != "succeeded" else ""
        raise InputError(f"run {run_id} {still}{wait}; `luthier jobs show {run_id} --store {url}` tells more")
    recipe = recipe_again(found.record, overrides)
    limits.check(recipe)
    limits.check_left(run_id, recipe.limits, ledger.total(runs.ledger_entries(store, found.record)))
    secret.load(recipe.secrets)
    if started := runs.attempts(store, run_id):  # as it was last, where memory has corrected the recipe
        recipe = recipe.at(micro_batch=min(recipe.train.micro_batch, started[-1].micro_batch))
    record = found.record
    if record.licences is None:  # begun before licences were judged
        record = record.model_copy(update={"licences": judge(recipe, record.base, None, store, Gate.here())})
    with joined(recipe.cluster, recipe.train.fewest, recipe.train.most, recipe.secrets):
        folder = models.fetch(recipe.model, record.base, store)
        shape = read_shape(folder)
        say(summary(recipe, make_plan(recipe, shape)))
        runs.clear_stop_requests(store, run_id)
        runs.tell(store, run_id, f"resumed by {submitter()}; it was {found.state}", "resuming")
        say(f"run {run_id} in {store.url}")
        return carry_out(record, recipe, shape, store, began)


RESUMABLE = (
    *("train.workers", "train.zero", "train.micro_batch", "train.activation_checkpointing"),
    *("train.max_failures", "train.max_skipped", "train.resize_s"),
    *("limits.hours", "limits.usd", "limits.ledger_s"),
)
"""What may change when a run goes on: where and how it computes and for how long, never what."""


def recipe_again(record: RunRecord, overrides: Sequence[str], changeable: Sequence[str] = RESUMABLE) -> Recipe:
    """The recipe that a run began with, with changes that leave its mathematics alone. Raises ConfigError."""
    faults = [
        Fault(
            f"command line `{override}`",
            "",
            f"a run goes on as it began; only {', '.join(changeable)}, cluster and secrets may change",
        )
        for override in overrides
        if (key := override.partition("=")[0]) not in changeable and key.partition(".")[0] not in ("cluster", "secrets")
    ]
    if faults:
        raise ConfigError(faults)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{record.run_id}.yaml"
        path.write_text(json.dumps(record.recipe))  # JSON is YAML
        return load(path, Recipe, overrides)


def carry_out(record: RunRecord, recipe: Recipe, shape: Shape, plain_store: Store, began: float) -> dict[str, Any]:
    """Train and publish; whatever the end, the run's log tells it."""
    run_id = record.run_id
    store = PatientStore(plain_store.impatient(), recipe.checkpoint.store_patience_s)
    attempts = Attempts(record, recipe, shape, store, plain_store, began)
    try:
        result = attempts.run()
        line = _conclude(record, recipe, result, store, plain_store)
    except (KeyboardInterrupt, SystemExit):  # Ray Train's handler of SIGINT ends its workers, then exits
        if attempts.is_replaced:
            raise RunFailed(f"run {run_id} goes on under another driver, so this one has ended") from None
        runs.tell(store, run_id, "stopped at once; what came after the last checkpoint is lost", "stopped")
        again = f"luthier jobs resume {run_id} --store {store.url}"
        raise RunFailed(f"run {run_id} was stopped at once; `{again}` goes on with it") from None
    except LuthierError as error:
        runs.tell(store, run_id, f"failed: {error}", "failed")
        raise
    published = f"published {line['adapter']}" if line["adapter"] else "nothing was published"
    if line["promoted"] is False:
        published += ", and not released"
    runs.tell(
        store, run_id, f"{line['state']} after {line['step']} steps; {published}", line["state"], step=line["step"]
    )
    return line


def summary(recipe: Recipe, plan: Plan) -> str:
    """The plan in one line."""
    share = 100 * plan.trained_parameters / plan.parameters
    fewest, most = recipe.train.fewest, recipe.train.most
    workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"plan: {recipe.model.name}, {recipe.method.kind}: {plan.trained_parameters:,} of {plan.parameters:,} "
        f"parameters ({share:.1f} %); {workers} worker(s), each {plan.micro_batches_per_step} micro-batch(es) of "
        f"{plan.micro_batch} for a global batch of {plan.global_batch}; ZeRO-{plan.zero} ({plan.zero_reason}); "
        f"about {plan.total_bytes / 2**30:.2f} of {plan.memory_bytes / 2**30:.2f} GiB a worker"
    )


def _check_parent(recipe: Recipe, base: BaseModelRef, parent: RunRecord) -> None:
    """Raise ConfigError unless the parent's weights fit: the same base, and the same parameters trained."""
    # Through the schema, because a record may be older than a setting.
    begun = TypeAdapter[LoraConfig | FullConfig](Method).validate_json(json.dumps(parent.recipe["method"]))
    ours, theirs = recipe.method.model_dump(mode="json"), begun.model_dump(mode="json")
    shaping = ("kind", "rank", "targets", "alpha", "rslora", "dora")
    faults = [
        Fault("from", f"method.{key}", f"{parent.run_id} has {theirs.get(key)!r}, and this run {ours.get(key)!r}")
        for key in shaping
        if ours.get(key) != theirs.get(key)
    ]
    if base != parent.base:
        said = f"{parent.run_id} was trained on {parent.base.name} at {parent.base.revision}"
        faults.append(Fault("from", "model", f"{said}, and this run is on {base.name} at {base.revision}"))
    if faults:
        raise ConfigError(faults)


def judge(
    recipe: Recipe,
    base: BaseModelRef,
    begun: RunRecord | None,
    store: Store,
    gate: Gate,
    folder: Path | None = None,
) -> LicenceRecord:
    """Judge once more, with what the store knows of the base and of the run that this one begins from, and its card.

    Raises LicenceRefused. What it returns goes into the run's record: resuming and publishing keep to it.
    """
    more = models.artefacts(store, base) + (terms.of_parent(begun, gate) if begun else ())
    judged = terms.require(recipe, gate, more, folder)
    return gate.record(distinct([*terms.artefacts_of(recipe, gate, folder), *more]), judged)


def _check_model(folder: Path, recipe: Recipe) -> None:
    from jobs.lora import check_targets
    from jobs.model import skeleton

    check_targets(skeleton(folder), recipe.method)


def tokenise(files: Files, recipe: Recipe, folder: Path, store: Store) -> str:
    manifest, faults = dataset.prepare(files, recipe.data, folder, store)
    for fault in faults[: dataset.EXAMPLES_SHOWN]:
        say(f"warning: left out {fault.place}: {fault.reason}")
    cut = f", {manifest.cut:,} cut to {recipe.data.sequence_length:,} tokens" if manifest.cut else ""
    left_out = f", {sum(manifest.skipped.values())} row(s) left out" if manifest.skipped else ""
    say(
        f"data: {', '.join(name for name, _ in files)}: {manifest.samples:,} samples, {manifest.tokens:,} tokens, "
        f"{manifest.supervised_tokens:,} supervised{cut}{left_out} (dataset {manifest.digest[:12]})"
    )
    return manifest.digest


def _conclude(
    record: RunRecord, recipe: Recipe, result: dict[str, Any], store: Store, plain_store: Store
) -> dict[str, Any]:
    """Release what was published, and put together the job's last line."""
    published = result["published"]
    adapter = promoted = None
    if published and recipe.publish:
        adapter = f"{published['name']}@{published.get('version', published.get('revision'))}"
        say(f"published {adapter}")
        if isinstance(recipe.method, LoraConfig):
            promoted = release(record, recipe, published["name"], published["version"], store, plain_store)
    return {
        "run_id": record.run_id,
        "state": result["state"],
        "step": result["step"],
        "metrics": result["metrics"],
        "checkpoint": result["checkpoint"],
        "adapter": adapter,
        "promoted": promoted,
        "store": store.url,
    }
