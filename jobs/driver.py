"""A whole run, seen from the driver: each stage leaves a record that the next one reads.

    resolve → plan → locate data → join Ray → pin the model → tokenise → run.json → train and publish → alias
    resume: run.json → join Ray → train and publish → alias

Everything that can be wrong with what the person gave is found before run.json is written, and before any worker is
taken. Torch is imported by the checks of model and tokenizer, never before a config is sound.
"""

import getpass
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import __version__, env, keys, models, records, registry
from cluster.config import load
from cluster.errors import ConfigError, Fault, InputError, LuthierError, RunFailed
from cluster.logs import say
from cluster.models import read_shape
from cluster.records import BaseModelRef, RunRecord
from cluster.session import joined
from cluster.store import Store, open_store
from jobs import dataset, runs
from jobs.config import LoraConfig, Recipe
from jobs.job import Job
from jobs.plan import Plan, make_plan, shape_of
from jobs.progress import Board
from jobs.pulse import Pulse
from jobs.screen import Screen

VERSIONS = ("ray", "torch", "deepspeed", "transformers", "peft")


def run(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Do what a recipe says. Returns the job's last line. Raises LuthierError."""
    recipe = load(path, Recipe, overrides)
    shape = shape_of(recipe.model)
    if shape:
        make_plan(recipe, shape)
    store = open_store(recipe.store)
    train_files = dataset.locate_all(recipe.data.train, store, Path.cwd())
    evaluation_files = dataset.locate_all(recipe.data.evaluation, store, Path.cwd())
    with joined(recipe.cluster, recipe.train.workers):
        base = models.pin(recipe.model, store)
        folder = models.fetch(recipe.model, base, store)
        plan = make_plan(recipe, read_shape(folder))
        _check_model(folder, recipe)
        say(summary(recipe, plan))
        prepared = [_prepare(files, recipe, folder, store) for files in (train_files, evaluation_files) if files]
        record = _write_record(store, recipe, base, prepared)
        say(f"run {record.run_id} in {store.url}")
        if not recipe.publish:
            say("warning: publish is not set, so the trained weights stay in the run's last checkpoint")
        runs.tell(store, record.run_id, f"submitted by {getpass.getuser()}; {summary(recipe, plan)}", "preparing")
        return _carry_out(record, recipe, plan, store)


def resume(run_id: str, url: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Go on with a run that has stopped, failed or was lost, under its own id. Returns the job's last line.

    Raises LuthierError: InputError when there is no such run, when it has succeeded, or when it is still running.
    """
    store = open_store(url)
    found = runs.find(store, run_id)
    if found.state not in ("stopped", "failed", "lost"):
        still = "has succeeded: there is nothing to go on with" if found.state == "succeeded" else f"is {found.state}"
        raise InputError(f"run {run_id} {still}; `luthier jobs show {run_id} --store {url}` tells more")
    recipe = _recipe_again(found.record, overrides)
    with joined(recipe.cluster, recipe.train.workers):
        folder = models.fetch(recipe.model, found.record.base, store)
        plan = make_plan(recipe, read_shape(folder))
        say(summary(recipe, plan))
        runs.clear_stop_requests(store, run_id)
        runs.tell(store, run_id, f"resumed by {getpass.getuser()}; it was {found.state}", "resuming")
        say(f"run {run_id} in {store.url}")
        return _carry_out(found.record, recipe, plan, store)


RESUMABLE = ("train.workers", "train.zero", "train.micro_batch", "train.activation_checkpointing", "train.max_failures")
"""What may change when a run goes on: where and how it computes, never what."""


def _recipe_again(record: RunRecord, overrides: Sequence[str]) -> Recipe:
    """The recipe that a run began with, with changes that leave its mathematics alone. Raises ConfigError."""
    faults = [
        Fault(
            f"command line `{override}`",
            "",
            f"a run goes on as it began; only {', '.join(RESUMABLE)} and cluster may change",
        )
        for override in overrides
        if (key := override.partition("=")[0]) not in RESUMABLE and key.partition(".")[0] != "cluster"
    ]
    if faults:
        raise ConfigError(faults)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{record.run_id}.yaml"
        path.write_text(json.dumps(record.recipe))  # JSON is YAML
        return load(path, Recipe, overrides)


def _carry_out(record: RunRecord, recipe: Recipe, plan: Plan, store: Store) -> dict[str, Any]:
    """Train and publish; whatever the end, the run's log tells it."""
    run_id = record.run_id
    try:
        result = _train(record, recipe, plan, store)
        line = _conclude(run_id, recipe, result, store)
    except (KeyboardInterrupt, SystemExit):  # Ray Train's handler of SIGINT ends its workers, then exits
        runs.tell(store, run_id, "stopped at once; what came after the last checkpoint is lost", "stopped")
        raise RunFailed(f"run {run_id} was stopped at once; `luthier jobs resume {run_id}` goes on with it") from None
    except LuthierError as error:
        runs.tell(store, run_id, f"failed: {error}", "failed")
        raise
    published = f"published {line['adapter']}" if line["adapter"] else "nothing was published"
    runs.tell(
        store, run_id, f"{line['state']} after {line['step']} steps; {published}", line["state"], step=line["step"]
    )
    return line


def new_run_id(name: str) -> str:
    """`<recipe>-<UTC time>-<random>`: sorted by time, unique without asking anybody."""
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def summary(recipe: Recipe, plan: Plan) -> str:
    """The plan in one line."""
    share = 100 * plan.trained_parameters / plan.parameters
    return (
        f"plan: {recipe.model.name}, {recipe.method.kind}: {plan.trained_parameters:,} of {plan.parameters:,} "
        f"parameters ({share:.1f} %); {plan.workers} worker(s), each {plan.micro_batches_per_step} micro-batch(es) of "
        f"{plan.micro_batch} for a global batch of {plan.global_batch}; ZeRO-{plan.zero} ({plan.zero_reason}); "
        f"about {plan.total_bytes / 2**30:.2f} of {plan.memory_bytes / 2**30:.2f} GiB a worker"
    )


def _check_model(folder: Path, recipe: Recipe) -> None:
    from jobs.lora import check_targets
    from jobs.model import skeleton

    check_targets(skeleton(folder), recipe.method)


def _prepare(files: list[tuple[str, Path]], recipe: Recipe, folder: Path, store: Store) -> str:
    manifest, faults = dataset.prepare(files, recipe.data, folder, store)
    for fault in faults[: dataset.EXAMPLES_SHOWN]:
        say(f"warning: left out {fault.place}: {fault.reason}")
    left_out = f", {sum(manifest.skipped.values())} row(s) left out" if manifest.skipped else ""
    say(
        f"data: {', '.join(name for name, _ in files)}: {manifest.samples:,} samples, {manifest.tokens:,} tokens, "
        f"{manifest.supervised_tokens:,} supervised{left_out} (dataset {manifest.digest[:12]})"
    )
    return manifest.digest


def _write_record(store: Store, recipe: Recipe, base: BaseModelRef, prepared: list[str]) -> RunRecord:
    record = RunRecord(
        run_id=new_run_id(recipe.name),
        recipe=recipe.model_dump(mode="json"),
        dataset=prepared[0],
        evaluation=prepared[1] if len(prepared) > 1 else None,
        code_revision=_code_revision(),
        versions={"luthier": __version__} | {name: version(name) for name in VERSIONS},
        base=base,
        created_at=records.now(),
    )
    store.create(keys.run_record(record.run_id), record.to_bytes())
    return record


def _code_revision() -> str:
    """The git commit of the code, where it runs from a checkout; a shipped working directory has none."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return "unknown"
    found = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _train(record: RunRecord, recipe: Recipe, plan: Plan, store: Store) -> dict[str, Any]:
    """Run the worker group to its end. Returns what rank 0 left on the board."""
    # Ray Train imports torch: only now, after everything that may be refused.
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # On the driver's node, so that no lost worker node takes it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    run_id = record.run_id
    job = Job(run_id, recipe, record.base, plan.zero, record.dataset, record.evaluation, store, board)
    gpu = recipe.cluster.accelerator == "gpu"
    trainer = TorchTrainer(
        _loop(job),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.train.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": recipe.cluster.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=run_id,
            # Ray Train's own records; nothing of ours is kept there.
            storage_path=str(models.cache_folder() / "ray-train"),
            failure_config=FailureConfig(max_failures=recipe.train.max_failures),
        ),
    )
    screen = Screen(board, recipe.name, total_steps=recipe.train.steps)
    watching = threading.Thread(target=screen.watch, daemon=True)
    watching.start()
    try:
        with Pulse(store, run_id, board):
            trainer.fit()
        failure = None
    except TrainingFailedError as error:
        failure = error
    finally:
        screen.stop()
        watching.join()
    result: dict[str, Any] | LuthierError | None = ray.get(board.result.remote())
    if isinstance(result, LuthierError):
        raise result
    if failure:
        raise _cause(failure, run_id) from failure
    if result is None:
        raise RunFailed(f"run {run_id}: the workers ended without a result; see their logs in the Ray dashboard")
    return result


def _loop(job: Job) -> Callable[[], None]:
    """What each worker runs. A closure, because Ray Train's config dictionary would lose the types."""

    def loop() -> None:
        prepare_environment(job.recipe.cluster.accelerator)
        from jobs.worker import work

        work(job)

    return loop


def prepare_environment(accelerator: str) -> None:
    """Set what deepspeed reads when it is imported, and what it needs to compile its CPU operation only once."""
    if accelerator == "cpu":
        os.environ[env.DS_ACCELERATOR] = "cpu"  # else DeepSpeed takes a GPU that happens to be there
    if sys.prefix != sys.base_prefix:
        # In torch's shared default folder, two virtual environments recompile one another's operation (a minute each).
        os.environ.setdefault(env.TORCH_EXTENSIONS_DIR, f"{sys.prefix}/torch_extensions")
    # The ninja beside this interpreter, which an environment that is not activated would miss; and never another one,
    # since two versions of ninja take one another's builds for out of date.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _cause(error: BaseException, run_id: str) -> LuthierError:
    """The first of our own errors among what the workers raised, or a RunFailed with theirs."""
    failures = getattr(error, "worker_failures", {}).values()
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    ours = [cause for cause in causes if isinstance(cause, LuthierError)]
    if ours:
        return ours[0]
    first = causes[0] if causes else error
    return RunFailed(f"run {run_id}: a worker failed: {type(first).__name__}: {str(first).strip()}")


def _conclude(run_id: str, recipe: Recipe, result: dict[str, Any], store: Store) -> dict[str, Any]:
    """Move the alias, and put together the job's last line."""
    published = result["published"]
    adapter = None
    if published and recipe.publish:
        adapter = f"{published['name']}@{published.get('version', published.get('revision'))}"
        say(f"published {adapter}")
        if isinstance(recipe.method, LoraConfig) and recipe.publish.alias:
            registry.set_alias(
                store, recipe.publish.name, recipe.publish.alias, published["version"], why=f"published by run {run_id}"
            )
            say(f"alias {recipe.publish.name}@{recipe.publish.alias} is version {published['version']}")
    return {
        "run_id": run_id,
        "state": result["state"],
        "step": result["step"],
        "metrics": result["metrics"],
        "checkpoint": result["checkpoint"],
        "adapter": adapter,
        "store": store.url,
    }
