"""Measure a published version by what it must show, beside the version in stable, and leave the report with it.

    record, run.json ─▸ requirement ─▸ a Ray task (evaluator.py) ─▸ measures ─▸ adapters/<name>/<n>/evaluations/

The driver of a run does it before it moves the alias; `luthier jobs evaluate` does it at any time, from anywhere: the
suites are in the store. Nothing here moves an alias. No torch.
"""

import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError

from cluster import __version__, evaluation, keys, models, records, registry
from cluster.config import load
from cluster.errors import ConfigError, Fault, InputError, LuthierError, ObjectNotFound, RunFailed
from cluster.evaluation import Against, EvaluationReport
from cluster.records import AdapterRecord, Requirement, RunRecord
from cluster.store import Store
from cluster.who import submitter
from jobs import dataset, suites
from jobs.config import EvaluationConfig, Recipe
from jobs.measures import NO_STABLE, Found, measure
from jobs.questions import Answers, Group, Question, Task
from jobs.scorers import source_digest
from jobs.suites import Prompt, Suites

VERSIONS = ("torch", "transformers", "peft")


def find(store: Store, reference: str) -> AdapterRecord:
    """The version that NAME@V, NAME@alias, or a run that published one stands for. Raises InputError."""
    if keys.is_name(reference) and store.exists(keys.run_record(reference)):
        run = records.read(store, keys.run_record(reference), RunRecord)
        name = (run.recipe.get("publish") or {}).get("name")
        made = [record for record in registry.versions(store, name) if record.run_id == reference] if name else []
        if not made:
            raise InputError(
                f"run {reference} has published no adapter in {store.url}, so there is nothing to evaluate"
            )
        return made[-1]
    return registry.resolve(store, reference)


def recipe_of(store: Store, record: AdapterRecord, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a version was trained by; its cluster and secrets may be other ones now. Raises ConfigError."""
    other = [each for each in overrides if each.partition("=")[0].partition(".")[0] not in ("cluster", "secrets")]
    if other:
        fault = "what a version must show is decided by its recipe; only cluster and secrets may change"
        raise ConfigError([Fault(f"command line `{each}`", "", fault) for each in other])
    try:
        run = records.read(store, keys.run_record(record.run_id), RunRecord)
    except ObjectNotFound:
        reference = f"{record.name}@{record.version}"
        raise InputError(
            f"{reference} came from run {record.run_id}, which {store.url} does not hold: name its recipe with --recipe"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{record.run_id}.yaml"
        path.write_text(json.dumps(run.recipe))  # JSON is YAML
        return load(path, Recipe, overrides)


def requirement_of(record: AdapterRecord) -> Requirement:
    """What a version must show, as it was published. Raises InputError."""
    if record.gate is None:
        raise InputError(
            f"{record.name}@{record.version} was trained by a recipe without `evaluation`: "
            "name one that has it with --recipe"
        )
    return record.gate


def require(recipe: Recipe, record: AdapterRecord, store: Store) -> Requirement:
    """What another recipe asks of a version; its held-out rows are tokenised on Ray. Raises ConfigError, DataError."""
    if recipe.evaluation is None:
        raise ConfigError([Fault(f"recipe {recipe.name}", "evaluation", "is not there; say what shall be measured")])
    base = models.pin(recipe.model, store)
    if (base.name, base.revision) != (record.base.name, record.base.revision):
        fault = (
            f"is {base.name} at {base.revision}, and the adapter's base {record.base.name} at {record.base.revision}"
        )
        raise ConfigError([Fault(f"recipe {recipe.name}", "model", fault)])
    located = Suites.locate(recipe.evaluation, store, Path.cwd())
    held_out = None
    if recipe.evaluation.loss:
        files = dataset.locate_all(recipe.data.evaluation, store, Path.cwd())
        held_out = dataset.prepare(files, recipe.data, models.fetch(recipe.model, base, store), store)[0].digest
    return located.require(store, held_out)


def evaluate(
    store: Store, record: AdapterRecord, recipe: Recipe, requirement: Requirement, sent: Store | None = None
) -> EvaluationReport:
    """Measure a version on the cluster that this process has joined, and write its report.

    Args:
        sent: the same store as workers get it, where `store` is one that cannot be sent.

    Raises InputError, StoreError, RunFailed; then no report is written.
    """
    settings = EvaluationConfig.model_validate_json(json.dumps(requirement.settings))
    for name, digest in requirement.scorers.items():
        if source_digest(name) != digest:
            raise InputError(f"scorer {name}: its file is not the one that is required (SHA-256 {digest[:12]}…)")
    prompts = suites.fetch(requirement, store)
    state = registry.alias_state(store, record.name)
    stable = None
    if requirement.compares and state and state.stable not in (None, record.version):
        stable = registry.record(store, record.name, state.stable or 0)
    found = _find_out(sent or store, record, stable, recipe, requirement, prompts)
    measures, examples = measure(settings, prompts, found)
    return evaluation.add(
        store,
        EvaluationReport(
            name=record.name,
            version=record.version,
            number=0,
            adapter=record.digest,
            base=record.base,
            requirement=requirement,
            passed=all(each.passed for each in measures),
            measures=measures,
            examples=examples,
            against=Against(version=stable.version, digest=stable.digest) if stable else None,
            versions={"luthier": __version__} | {name: version(name) for name in VERSIONS},
            by=submitter(),
            created_at=records.now(),
        ),
    )


def _find_out(
    store: Store,
    record: AdapterRecord,
    stable: AdapterRecord | None,
    recipe: Recipe,
    requirement: Requirement,
    prompts: Sequence[Prompt],
) -> Found:
    """Ask both versions: in one task where they share a base, else in one after the other."""
    compared = tuple(index for index, prompt in enumerate(prompts) if prompt.suite == "regression")
    others = tuple(index for index, prompt in enumerate(prompts) if prompt.suite != "regression")
    wanted, note = (record, (compared, others)), ""
    theirs: Answers | None = None
    if stable is None:
        (ours,) = _ask(store, recipe, requirement, prompts, [wanted])
        note = NO_STABLE
    elif (stable.base.name, stable.base.revision) == (record.base.name, record.base.revision):
        ours, theirs = _ask(store, recipe, requirement, prompts, [wanted, (stable, (compared,))])
    else:
        (ours,) = _ask(store, recipe, requirement, prompts, [wanted])
        other = recipe.model_copy(update={"model": recipe_of(store, stable).model})
        (theirs,) = _ask(store, other, requirement, prompts, [(stable, (compared,))], with_loss=False)
        note = f"version {stable.version} in stable has another base, whose losses are not comparable"
    return Found(
        answers=[ours.texts[index] for index in range(len(prompts))],
        cut_off=ours.cut_off,
        loss=ours.loss,
        samples=ours.samples,
        stable_answers=None if theirs is None else [theirs.texts.get(index) for index in range(len(prompts))],
        stable_loss=theirs.loss if theirs else None,
        stable_note=note,
    )


def _ask(
    store: Store,
    recipe: Recipe,
    requirement: Requirement,
    prompts: Sequence[Prompt],
    adapters: list[tuple[AdapterRecord, tuple[Group, ...]]],
    with_loss: bool = True,
) -> list[Answers]:
    """One Ray task, of a worker's size. Raises what it raised of ours; RunFailed for all else."""
    settings = EvaluationConfig.model_validate_json(json.dumps(requirement.settings))
    task = Task(
        model=recipe.model,
        base=adapters[0][0].base,
        adapters=tuple(adapters),
        questions=tuple(Question(prompt.place, prompt.example) for prompt in prompts),
        dataset=requirement.dataset if with_loss else None,
        sequence_length=recipe.data.sequence_length,
        max_tokens=settings.max_tokens,
        batch=settings.batch,
        cluster=recipe.cluster,
        store=store,
        secrets=dict(recipe.secrets),
    )
    gpus = 1 if recipe.cluster.accelerator == "gpu" else 0
    remote = ray.remote(num_cpus=recipe.cluster.cpus_per_worker, num_gpus=gpus, max_retries=1)(_evaluate)
    try:
        found: list[Answers] = ray.get(remote.remote(task))
    except RayTaskError as error:
        if isinstance(error.cause, LuthierError):
            raise error.cause from None  # without Ray's traceback
        raise RunFailed(f"the evaluation ended in {type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:  # its node or its process is gone
        raise RunFailed(f"the evaluation ended: {str(error).strip().splitlines()[0]}") from error
    return found


def _evaluate(task: Task) -> list[Answers]:
    from jobs.evaluator import evaluate as answers  # torch, where the task runs

    return answers(task)
