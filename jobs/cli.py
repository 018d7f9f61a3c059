"""`luthier jobs …`: what begins or ends something: plan, submit, train, evaluate, resume, reproduce, stop.

What only reads is in views.py.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import AsJson, StoreUrl
from jobs import submission
from jobs.data.cli import app as data
from jobs.views import RunId
from jobs.views import app as views

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(views)
app.add_typer(data, name="data")

RecipeFile = Annotated[Path, typer.Argument(help="configs/recipes/NAME.yaml")]
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
    submission.submit(
        address,
        loaded.name,
        ["python", "-m", "jobs.train", str(recipe), *given],
        loaded.model_dump_json(),
        loaded.cluster.driver_cpus,
        [
            *(str(recipe), *submission.files_of_model(loaded.model), *loaded.data.train, *loaded.data.evaluation),
            *submission.files_of_evaluation(loaded),
        ],
        detach=detach,
        again=again,
    )


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
        submission.submit_resume(address, run_id, store, given)
        return
    from cluster import logs
    from jobs import driver

    raise typer.Exit(logs.ended(driver.resume(run_id, store, given)))


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
        submission.submit(address, recipe["name"], command, uuid4().hex, cpus, [])  # each time is another run
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
        submission.submit_evaluation(address, reference, store, recipe, given)
        return
    raise typer.Exit(release.reported(release.evaluate(reference, store, str(recipe) if recipe else None, given)))


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
