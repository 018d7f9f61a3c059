"""`luthier jobs …`: plan, submit, train, resume, stop, list, show, logs, diff, export.

Nothing here imports torch; `train` and `resume` do when they run. What reads, reads the store alone.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import AsJson, StoreUrl, show

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True, pretty_exceptions_enable=False)

RecipeFile = Annotated[Path, typer.Argument(help="configs/recipes/NAME.yaml")]
RunId = Annotated[str, typer.Argument(help="as `luthier jobs list` prints it")]
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
    from jobs import brief
    from jobs.config import Recipe
    from jobs.plan import Survey, refusal, shape_of

    loaded = load(recipe, Recipe, [*(overrides or []), *([f"cluster={cluster}"] if cluster else [])])
    shape = shape_of(loaded.model)
    if shape is None:
        raise PlanError(f"the shape of {loaded.model.name} is not known here; give model.shape, or a folder as source")
    survey = Survey.of(loaded, shape, Path.cwd())
    print(json.dumps(survey.to_dict()) if as_json else brief.text(survey), flush=True)
    if not survey.plan.fits:
        raise PlanError(refusal(loaded, survey.plan, list(survey.advice)))


@app.command()
def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="the dashboard, http://host:8265; default RAY_ADDRESS")] = None,
) -> None:
    """Plan here, then hand the job to a cluster with `ray job submit`, and follow it."""
    from cluster.config import load
    from jobs.config import Recipe
    from jobs.plan import make_plan, shape_of

    loaded = load(recipe, Recipe, overrides or [])
    shape = shape_of(loaded.model)
    if shape:
        make_plan(loaded, shape)
    _submit(address, ["python", "-m", "jobs.train", str(recipe), *(overrides or [])])


def _submit(address: str | None, job: list[str]) -> None:
    """Print and run the plain `ray job submit`, and exit as it does."""
    from cluster import env
    from cluster.errors import ConfigError, Fault

    target = address or os.environ.get(env.RAY_ADDRESS)
    if not target:
        raise ConfigError([Fault("command line", "--address", f"name the dashboard, or set {env.RAY_ADDRESS}")])
    submission = ["job", "submit", "--address", target, "--working-dir", ".", "--", *job]
    print(shlex.join(["ray", *submission]), flush=True)
    # The `ray` of this interpreter, which need not be on PATH.
    done = subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *submission], check=False)
    raise typer.Exit(done.returncode)


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run a recipe from here: on a private Ray where its cluster says `address: local`, else on that address."""
    from cluster import logs
    from jobs import driver

    raise typer.Exit(logs.ended(driver.run(recipe, overrides or [])))


@app.command()
def resume(
    run_id: RunId,
    store: StoreUrl,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="go on with so many workers; the result is the same")] = None,
    address: Annotated[str | None, typer.Option(help="submit to this dashboard, http://host:8265")] = None,
) -> None:
    """Go on with a run that was stopped, has failed or was lost, from its last checkpoint.

    With --address as a submitted job, else from here, as `train` does.
    """
    given = [*(overrides or []), *([f"train.workers={workers}"] if workers is not None else [])]
    if address:
        _submit(address, ["python", "-m", "jobs.resume", run_id, f"store={store}", *given])
    from cluster import logs
    from jobs import driver

    raise typer.Exit(logs.ended(driver.resume(run_id, store, given)))


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
def show_run(run_id: RunId, store: StoreUrl) -> None:
    """Print one run as JSON: its state, record, events, attempts, checkpoints and last steps."""
    from cluster import keys
    from cluster.store import open_existing
    from jobs import runs

    opened = open_existing(store)
    found = runs.find(opened, run_id)
    prefix = keys.checkpoints_prefix(run_id)
    shown = {
        "state": found.state,
        "run": found.record.model_dump(mode="json"),
        "events": [event.model_dump(mode="json") for event in found.events],
        "attempts": [attempt.model_dump(mode="json") for attempt in runs.attempts(opened, run_id)],
        "checkpoints": [item.key for item in opened.list(prefix) if item.key.endswith("/manifest.json")],
        "steps": list(runs.read_steps(opened, run_id))[-5:],
    }
    print(json.dumps(shown, indent=2))


@app.command()
def logs(
    run_id: RunId,
    store: StoreUrl,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the run has ended or is lost")] = False,
) -> None:
    """Print what happened to a run, a line an event; from the store, so it needs no cluster."""
    from cluster.store import open_existing
    from jobs import runs

    opened = open_existing(store)
    for event in runs.follow(opened, run_id, wait=follow):
        cost = f" ({event.steps_lost} steps, {event.seconds_lost:.1f} s lost)" if event.steps_lost else ""
        print(f"{event.at}  {event.state or '':<10} {event.text}{cost}", flush=True)
    if runs.find(opened, run_id).state == "lost":
        silent = f"its driver has given no sign of life for {runs.LOST_AFTER_S:.0f} s"
        print(f"{'now':<20}  lost       {silent}; `luthier jobs resume {run_id} --store {store}` goes on with it")


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
) -> None:
    """Write an adapter to a folder that plain peft loads."""
    from cluster import keys, records, registry
    from cluster.errors import ConfigError, Fault, InputError
    from cluster.store import open_existing

    if folder.exists():
        raise ConfigError([Fault(str(folder), "", "exists already; name a new folder")])
    opened = open_existing(store)
    record = registry.resolve(opened, reference)
    try:
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as temporary:
            whole = Path(temporary) / "adapter"
            records.fetch_files(opened, keys.adapter_version_prefix(record.name, record.version), record.files, whole)
            whole.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; name a folder that can be made") from None
    print(f"{record.name}@{record.version} of {record.base.name} in {folder}")
