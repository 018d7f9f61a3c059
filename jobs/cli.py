"""`luthier jobs …`: plan, submit, train, evaluate, resume, reproduce, stop, list, show, logs, report, diff, export.

Nothing here imports torch; `train`, `resume` and `evaluate` do when they run. What reads, reads the store alone.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import AsJson, StoreUrl
from cluster.logs import show
from jobs.data.cli import app as data

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(data, name="data")

RecipeFile = Annotated[Path, typer.Argument(help="configs/recipes/NAME.yaml")]
RunId = Annotated[str, typer.Argument(help="as `luthier jobs list` prints it")]
MaxHours = Annotated[float | None, typer.Option(help="limits.hours: hours in which workers are held, then it stops")]
MaxCost = Annotated[float | None, typer.Option(help="limits.usd: US dollars, then it stops")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value …, for example train.steps=100")]


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="configs/clusters/NAME.yaml, as cluster=NAME does")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe would do and take, and whether it fits, without a GPU, a cluster or a network."""
    from cluster.config import load
    from cluster.errors import PlanError
    from cluster.licences.gate import Gate, check
    from jobs import brief, limits
    from jobs.config import Recipe
    from jobs.plan import Survey, refusal, shape_of

    loaded = load(recipe, Recipe, [*(overrides or []), *([f"cluster={cluster}"] if cluster else [])])
    limits.check(loaded)
    shape = shape_of(loaded.model)
    if shape is None:
        raise PlanError(f"the shape of {loaded.model.name} is not known here; give model.shape, or a folder as source")
    survey = Survey.of(loaded, shape, Path.cwd(), Gate.here())
    print(json.dumps(survey.to_dict()) if as_json else brief.text(survey), flush=True)
    if not survey.plan.fits:
        raise PlanError(refusal(loaded, survey.plan, list(survey.advice)))
    if survey.refused:
        raise PlanError("; ".join(survey.refused))
    check(survey.licences, loaded.model.name)


@app.command()
def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="the dashboard, http://host:8265; default RAY_ADDRESS")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="come back as soon as the cluster has it")] = False,
    again: Annotated[bool, typer.Option("--again", help="run once more what has succeeded")] = False,
    max_hours: MaxHours = None,
    max_cost: MaxCost = None,
) -> None:
    """Plan here, check what would be sent and to whom, hand the job to the cluster, and follow it to its end.

    Submitting the same again follows the run that there is.
    """
    from cluster.config import load
    from cluster.errors import ConfigError, Fault
    from cluster.licences.gate import Gate
    from jobs import limits, terms
    from jobs.config import Recipe
    from jobs.plan import make_plan, shape_of

    given = [*(overrides or []), *limits.overrides(max_hours, max_cost)]
    loaded = load(recipe, Recipe, given)
    if loaded.cluster.address == "local":
        fault = "is `local`, a Ray of the driver's own; name a cluster with address: auto, or use `luthier jobs train`"
        raise ConfigError([Fault(f"cluster {loaded.cluster.name}", "address", fault)])
    limits.check(loaded)
    terms.require(loaded, Gate.here())
    shape = shape_of(loaded.model)
    if shape:
        make_plan(loaded, shape)
        limits.check_plan(loaded, shape, Path.cwd())
    _submit(
        address,
        loaded.name,
        ["python", "-m", "jobs.train", str(recipe), *given],
        loaded.model_dump_json(),
        loaded.cluster.driver_cpus,
        [
            *(str(recipe), *_files_of(loaded.model), *loaded.data.train, *loaded.data.evaluation),
            *_files_of_evaluation(loaded),
        ],
        detach=detach,
        again=again,
    )


def _files_of(model: Any) -> list[str]:
    """What a model's folder needs at least, where it is one beside the recipe; `~` is the cluster's own."""
    return [f"{model.source}/config.json"] if model.is_folder and not model.source.startswith("~") else []


def _submit(
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


@app.command()
def train(
    recipe: RecipeFile, overrides: Overrides = None, max_hours: MaxHours = None, max_cost: MaxCost = None
) -> None:
    """Run a recipe from here: on a private Ray where its cluster says `address: local`, else on that address."""
    from cluster import logs
    from jobs import driver, limits

    given = [*(overrides or []), *limits.overrides(max_hours, max_cost)]
    raise typer.Exit(logs.ended(driver.run(recipe, given)))


@app.command()
def resume(
    run_id: RunId,
    store: StoreUrl,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="go on with so many workers; the result is the same")] = None,
    address: Annotated[str | None, typer.Option(help="submit to this dashboard, http://host:8265")] = None,
    max_hours: MaxHours = None,
    max_cost: MaxCost = None,
) -> None:
    """Go on with a run that was stopped, has failed or was lost, from its last checkpoint.

    With --address as a submitted job, else from here, as `train` does.
    """
    from jobs import limits

    given = [*(overrides or []), *([f"train.workers={workers}"] if workers is not None else [])]
    given += limits.overrides(max_hours, max_cost)
    if address:
        _submit_resume(address, run_id, store, given)
        return
    from cluster import logs
    from jobs import driver

    raise typer.Exit(logs.ended(driver.resume(run_id, store, given)))


def _submit_resume(address: str, run_id: str, store: str, given: list[str]) -> None:
    from cluster.store import open_existing
    from jobs import runs

    opened = open_existing(store)
    recipe = runs.find(opened, run_id).record.recipe
    kept = [f"secrets.{name}={reference}" for name, reference in recipe.get("secrets", {}).items()]
    # One more attempt is another job, and the same press twice is not.
    does = f"{run_id} after {len(runs.attempts(opened, run_id))} attempts"
    command = ["python", "-m", "jobs.resume", run_id, f"store={store}", *kept, *given]
    _submit(address, run_id, command, does, recipe["cluster"].get("driver_cpus", 0.0), [])


@app.command()
def reproduce(
    reference: Annotated[str, typer.Argument(help="a run, an adapter NAME@3, or a model NAME@REVISION")],
    store: StoreUrl,
    overrides: Overrides = None,
    publish: Annotated[str | None, typer.Option(help="publish the result under this name; no alias moves")] = None,
    address: Annotated[str | None, typer.Option(help="submit to this dashboard, http://host:8265")] = None,
    max_hours: MaxHours = None,
    max_cost: MaxCost = None,
) -> None:
    """Do a run once more from its record, as a new run, and compare the losses: exit code 1 if they part by 1e-4.

    With --address as a submitted job, else from here, as `train` does.
    """
    from jobs import limits

    given = [*(overrides or []), *([f"publish.name={publish}"] if publish else [])]
    given += limits.overrides(max_hours, max_cost)
    if address:
        from uuid import uuid4

        from cluster.store import open_existing
        from jobs.references import find_run

        recipe = find_run(open_existing(store), reference).recipe
        kept = [f"secrets.{name}={value}" for name, value in recipe.get("secrets", {}).items()]
        command = ["python", "-m", "jobs.reproduce", reference, f"store={store}", *kept, *given]
        cpus = recipe["cluster"].get("driver_cpus", 0.0)
        _submit(address, recipe["name"], command, uuid4().hex, cpus, [])  # each time is another run
        return
    from jobs import reproduction

    raise typer.Exit(reproduction.ended(reproduction.run(reference, store, given)))


@app.command()
def evaluate(
    reference: Annotated[str, typer.Argument(help="the version: name@7, name@alias; or the run that published it")],
    store: StoreUrl,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="cluster=NAME, secrets.NAME=…; with --recipe any")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="measure by this recipe's `evaluation`; default what the version must show")
    ] = None,
    address: Annotated[str | None, typer.Option(help="submit to this dashboard, http://host:8265")] = None,
) -> None:
    """Measure a published version and leave the report beside it; exit code 1 when it does not pass.

    Beside the version in stable, where that is asked for. With --address as a submitted job, else from here, on the
    recipe's cluster. No alias moves: `luthier cluster promote` does that.
    """
    from jobs import release

    given = overrides or []
    if address:
        _submit_evaluation(address, reference, store, recipe, given)
        return
    raise typer.Exit(release.reported(release.evaluate(reference, store, str(recipe) if recipe else None, given)))


def _submit_evaluation(address: str, reference: str, store: str, recipe: Path | None, given: list[str]) -> None:
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
    paths = [*([str(recipe)] if recipe else []), *_files_of_evaluation(loaded, with_prompts=bool(recipe))]
    _submit(address, f"evaluate-{record.name}", command, does, loaded.cluster.driver_cpus, paths)


def _files_of_evaluation(recipe: Any, with_prompts: bool = True) -> list[str]:
    """The files that a recipe's evaluation needs where the job runs: scorers always, prompts where they are read."""
    if recipe.evaluation is None:
        return []
    scorers = [f"{name.partition(':')[0].replace('.', '/')}.py" for name in recipe.evaluation.scorers]
    return [path for path in scorers if Path(path).exists()] + [*(recipe.evaluation.prompts if with_prompts else ())]


@app.command()
def stop(run_id: RunId, store: StoreUrl) -> None:
    """Ask a run to save its state and stop; asked again, it stops at once."""
    from cluster.errors import InputError
    from cluster.records import ENDED
    from cluster.store import open_existing
    from jobs import runs

    opened = open_existing(store)
    found = runs.find(opened, run_id)
    if found.state in (*ENDED, "lost"):
        raise InputError(f"run {run_id} does not run: its state is {found.state}")
    if runs.ask_to_stop(opened, run_id) == 1:
        print(f"asked {run_id} to save and stop; `luthier jobs logs {run_id} --store {store} -f` shows when it has")
    else:
        print(f"asked {run_id} again: it stops at once")


@app.command("list")
def list_runs(store: StoreUrl, as_json: AsJson = False) -> None:
    """List runs with their state, last step and loss."""
    from cluster.errors import ObjectDamaged
    from cluster.store import open_existing
    from jobs import runs

    opened = open_existing(store)
    rows: list[dict[str, Any]] = []
    for run_id in runs.run_ids(opened):
        try:
            found = runs.find(opened, run_id)
            last = max(runs.read_steps(opened, run_id), key=lambda step: int(step["step"]), default=None)
        except ObjectDamaged as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        rows.append(
            {
                "run_id": run_id,
                "state": found.state,
                "base": found.record.base.name,
                "steps": last["step"] + 1 if last else 0,
                "loss": round(last["loss"], 4) if last and last["loss"] is not None else None,
                "created_at": found.record.created_at,
            }
        )
    show(rows, ("run_id", "state", "base", "steps", "loss", "created_at"), as_json)


@app.command("show")
def show_run(
    run_id: Annotated[str, typer.Argument(help="a run; with --lineage also an adapter NAME@3, a model NAME@REVISION")],
    store: StoreUrl,
    lineage: Annotated[bool, typer.Option("--lineage", help="draw what it was made from, to the end")] = False,
    as_json: AsJson = False,
) -> None:
    """Print one run as JSON: its state, record, events, attempts, checkpoints, last steps and cost.

    With --lineage draw a tree instead (with --json as JSON too): runs, bases, data sets, files, licences, digests.
    """
    from cluster import keys, ledger
    from cluster.store import open_existing
    from jobs import lineage as lineages
    from jobs import lineage_tree, runs

    opened = open_existing(store)
    if lineage:
        root = lineages.trace(opened, run_id)
        if as_json:
            print(json.dumps(root.to_dict(), indent=2))
        else:
            lineage_tree.show(root)
        return
    found = runs.find(opened, run_id)
    entries = runs.ledger_entries(opened, found.record)
    prefix = keys.checkpoints_prefix(run_id)
    shown = {
        "state": found.state,
        "run": found.record.model_dump(mode="json"),
        "events": [event.model_dump(mode="json") for event in found.events],
        "attempts": [attempt.model_dump(mode="json") for attempt in runs.attempts(opened, run_id)],
        "checkpoints": [item.key for item in opened.list(prefix) if item.key.endswith("/manifest.json")],
        "steps": list(runs.read_steps(opened, run_id))[-5:],
        "cost": {
            **ledger.total(entries).to_dict(),
            "by_market": {market: spent.to_dict() for market, spent in ledger.by_market(entries).items()},
        },
    }
    print(json.dumps(shown, indent=2))


@app.command()
def logs(
    run_id: RunId,
    store: StoreUrl,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the run has ended or is lost")] = False,
) -> None:
    """Print what happened to a run, a line an event; from the store, so it needs no cluster."""
    from cluster import records
    from cluster.store import open_existing
    from jobs import runs

    opened = open_existing(store)
    for event in runs.follow(opened, run_id, wait=follow):
        cost = f" ({event.steps_lost} steps, {event.seconds_lost:.1f} s lost)" if event.steps_lost else ""
        print(f"{event.at}  {event.state or '':<10} {event.text}{cost}", flush=True)
    if runs.find(opened, run_id).state == "lost":
        silent = f"its driver has given no sign of life for {records.LOST_AFTER_S:.0f} s"
        print(f"{'now':<20}  lost       {silent}; `luthier jobs resume {run_id} --store {store}` goes on with it")


@app.command()
def report(
    run_id: RunId,
    store: StoreUrl,
    out: Annotated[Path | None, typer.Option(help="the file to write; default RUN.html")] = None,
) -> None:
    """Write a run as one HTML file, to be opened from the disk: curves, events, recipe, lineage, totals.

    From the store alone, and of a run that is under way too; written again it takes the older file's place.
    """
    from cluster.errors import InputError
    from cluster.store import open_existing
    from jobs import history
    from jobs import report as run_report

    text = run_report.page(history.read(open_existing(store), run_id))
    file = out or Path(f"{run_id}.html")
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}; name a file that can be made by --out") from None
    print(file)


@app.command()
def diff(
    one: Annotated[str, typer.Argument(help="a run")],
    other: Annotated[str, typer.Argument(help="another run")],
    store: StoreUrl,
    as_json: AsJson = False,
) -> None:
    """What differs between two runs: recipe, data, base, code, versions, and the last step's loss."""
    from cluster.store import open_existing
    from jobs import runs

    opened = open_existing(store)
    sides = [runs.described(opened, run_id) for run_id in (one, other)]
    names = sorted(name for name in {*sides[0], *sides[1]} if sides[0].get(name) != sides[1].get(name))
    rows = [{"what": name, one: sides[0].get(name), other: sides[1].get(name)} for name in names]
    show(rows, ("what", one, other), as_json)


@app.command()
def export(
    reference: Annotated[str, typer.Argument(help="adapter: name, name@7, name@alias")],
    folder: Annotated[Path, typer.Argument(help="where to write; must not exist")],
    store: StoreUrl,
    internal: Annotated[bool, typer.Option("--internal", help="it stays here: not judged as given to others")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="base and adapter as one model, for transformers")] = False,
) -> None:
    """Write an adapter to a folder that plain peft loads, with notice, licence texts, model card and luthier.json.

    What is exported may go anywhere, so it is judged as given to others, under the folder's name.
    """
    from cluster.store import open_existing
    from jobs.delivery import deliver

    record, judged = deliver(open_existing(store), reference, folder, internal=internal, merged=merge)
    for duty in judged.duties:
        print(f"licence: {duty}", file=sys.stderr)
    merged = "merged into" if merge else "of"
    print(f"{record.name}@{record.version} {merged} {record.base.name} in {folder}")
