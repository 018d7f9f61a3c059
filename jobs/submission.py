"""Handing a job to a cluster from a laptop: what is sent, the command, and following it to its end. No torch."""

import os
from pathlib import Path
from typing import Any

import typer


def files_of_model(model: Any) -> list[str]:
    """What a model's folder needs at least, where it is one beside the recipe; `~` is the cluster's own."""
    return [f"{model.source}/config.json"] if model.is_folder and not model.source.startswith("~") else []


def submit(
    address: str | None,
    name: str,
    command: list[str],
    does: str,
    cpus: float,
    paths: list[str],
    *,
    detach: bool = False,
    again: bool = False,
) -> None:
    """Print the plain `ray job submit`, do it, follow it, and exit as the job does.

    Args:
        does: all of the config that decides what the job does.
        paths: files that it reads; those that are named relative to here must be sent along.
    """
    from cluster import env
    from cluster.errors import ConfigError, Fault
    from cluster.package import digest, shipment
    from cluster.submit import Cluster, Submission
    from cluster.who import USER, user

    target = address or os.environ.get(env.RAY_ADDRESS)
    if not target:
        raise ConfigError([Fault("command line", "--address", f"name the dashboard, or set {env.RAY_ADDRESS}")])
    root = Path.cwd()
    sent = shipment(root)
    sent.check(paths)
    cluster = Cluster(target)
    code = digest(root)
    job = Submission(
        name=name,
        command=command,
        does=does + code,
        cpus=cpus,
        metadata={USER: user(), "recipe": name, "code": code, **({"driver_cpus": f"{cpus:g}"} if cpus else {})},
    )
    submission_id, was_there = cluster.submit(job, root, again=again)
    print(job.line(cluster.address, submission_id), flush=True)
    if was_there:
        print(f"{submission_id} was submitted before; `--again` runs once more what has succeeded", flush=True)
    if detach:
        print(f"follow it by the same command without --detach; end it by `ray job stop {submission_id}`")
        return
    try:
        raise typer.Exit(cluster.follow(submission_id))
    except KeyboardInterrupt:
        print(f"\n{submission_id} goes on; the same command follows it, `ray job stop {submission_id}` ends it")
        raise typer.Exit(130) from None  # as a shell has it: whoever waits for the job must not take it for done


def submit_resume(address: str, run_id: str, store: str, given: list[str]) -> None:
    """The same for going on with a run."""
    from cluster.store import open_existing
    from jobs import runs

    opened = open_existing(store)
    recipe = runs.find(opened, run_id).record.recipe
    kept = [f"secrets.{name}={reference}" for name, reference in recipe.get("secrets", {}).items()]
    # One more attempt is another job, and the same press twice is not.
    does = f"{run_id} after {len(runs.attempts(opened, run_id))} attempts"
    command = ["python", "-m", "jobs.resume", run_id, f"store={store}", *kept, *given]
    submit(address, run_id, command, does, recipe["cluster"].get("driver_cpus", 0.0), [])


def submit_evaluation(address: str, reference: str, store: str, recipe: Path | None, given: list[str]) -> None:
    """The same for measuring a version."""
    from cluster import evaluation as gate
    from cluster.config import load
    from cluster.store import open_existing
    from jobs import evaluation
    from jobs.config import Recipe

    opened = open_existing(store)
    record = evaluation.find(opened, reference)
    loaded = load(recipe, Recipe, given) if recipe else evaluation.recipe_of(opened, record, given)
    if not recipe:
        evaluation.requirement_of(record)
        given = [f"secrets.{name}={value}" for name, value in loaded.secrets.items()] + given
    # One more evaluation is another job, and the same press twice is not.
    done = sum(1 for _ in gate.reports(opened, record.name, record.version))
    named = [f"recipe={recipe}"] if recipe else []
    command = ["python", "-m", "jobs.evaluate", f"{record.name}@{record.version}", f"store={store}", *named, *given]
    does = f"{command} after {done} evaluations {loaded.model_dump_json()}"
    paths = [*([str(recipe)] if recipe else []), *files_of_evaluation(loaded, with_prompts=bool(recipe))]
    submit(address, f"evaluate-{record.name}", command, does, loaded.cluster.driver_cpus, paths)


def files_of_evaluation(recipe: Any, with_prompts: bool = True) -> list[str]:
    """The files that a recipe's evaluation needs where the job runs: scorers always, prompts where they are read."""
    if recipe.evaluation is None:
        return []
    scorers = [f"{name.partition(':')[0].replace('.', '/')}.py" for name in recipe.evaluation.scorers]
    return [path for path in scorers if Path(path).exists()] + [*(recipe.evaluation.prompts if with_prompts else ())]
