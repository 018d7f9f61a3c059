"""`luthier jobs …`: plan, submit, train, list, show, export. Nothing here imports torch; `train` does when it runs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import AsJson, StoreUrl, show

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True, pretty_exceptions_enable=False)

RecipeFile = Annotated[Path, typer.Argument(help="configs/recipes/NAME.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value …, for example train.steps=100")]


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a recipe would do and whether it fits, without a GPU, a cluster or a network."""
    from cluster.config import load
    from cluster.errors import PlanError
    from jobs.config import Recipe
    from jobs.plan import make_plan, readable, shape_of

    loaded = load(recipe, Recipe, overrides or [])
    shape = shape_of(loaded.model)
    if shape is None:
        raise PlanError(f"the shape of {loaded.model.name} is not known here; give model.shape, or a folder as source")
    made = make_plan(loaded, shape)
    if as_json:
        print(json.dumps(made.to_dict()))
        return
    show([{"what": name, "value": readable(name, value)} for name, value in made.to_dict().items()], ("what", "value"))


@app.command()
def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="the dashboard, http://host:8265; default RAY_ADDRESS")] = None,
) -> None:
    """Plan here, then hand the job to a cluster with `ray job submit`, and follow it."""
    from cluster import env
    from cluster.config import load
    from cluster.errors import ConfigError, Fault
    from jobs.config import Recipe
    from jobs.plan import make_plan, shape_of

    loaded = load(recipe, Recipe, overrides or [])
    shape = shape_of(loaded.model)
    if shape:
        make_plan(loaded, shape)
    target = address or os.environ.get(env.RAY_ADDRESS)
    if not target:
        raise ConfigError([Fault("command line", "--address", f"name the dashboard, or set {env.RAY_ADDRESS}")])
    job = ["python", "-m", "jobs.train", str(recipe), *(overrides or [])]
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

    logs.result(driver.run(recipe, overrides or []))


@app.command("list")
def list_runs(store: StoreUrl, as_json: AsJson = False) -> None:
    """List runs with their last step and loss."""
    from cluster import keys, records
    from cluster.errors import ObjectDamaged
    from cluster.records import RunRecord
    from cluster.store import open_store
    from jobs.progress import read_steps

    opened = open_store(store)
    run_ids = sorted({item.key.split("/")[1] for item in opened.list(keys.runs_prefix())})
    rows: list[dict[str, Any]] = []
    for run_id in run_ids:
        if opened.exists(keys.run_record(run_id)):
            record = records.read(opened, keys.run_record(run_id), RunRecord)
            try:
                last = max(read_steps(opened, run_id), key=lambda step: int(step["step"]), default=None)
            except ObjectDamaged as error:
                print(f"warning: {error}", file=sys.stderr)
                last = None
            rows.append(
                {
                    "run_id": run_id,
                    "base": record.base.name,
                    "steps": last["step"] + 1 if last else 0,
                    "loss": round(last["loss"], 4) if last else None,
                    "created_at": record.created_at,
                }
            )
    show(rows, ("run_id", "base", "steps", "loss", "created_at"), as_json)


@app.command("show")
def show_run(run_id: Annotated[str, typer.Argument(help="as `luthier jobs list` prints it")], store: StoreUrl) -> None:
    """Print one run as JSON: its record, its checkpoints and its last steps."""
    from cluster import keys, records
    from cluster.errors import InputError, ObjectNotFound
    from cluster.records import RunRecord
    from cluster.store import open_store
    from jobs.progress import read_steps

    opened = open_store(store)
    try:
        record = records.read(opened, keys.run_record(run_id), RunRecord)
    except ObjectNotFound:
        raise InputError(f"no run {run_id} in {store}; `luthier jobs list --store {store}` shows them") from None
    prefix = keys.checkpoints_prefix(run_id)
    manifests = [item.key for item in opened.list(prefix) if item.key.endswith("/manifest.json")]
    steps = list(read_steps(opened, run_id))
    print(json.dumps({"run": record.model_dump(mode="json"), "checkpoints": manifests, "steps": steps[-5:]}, indent=2))


@app.command()
def export(
    reference: Annotated[str, typer.Argument(help="adapter: name, name@7, name@alias")],
    folder: Annotated[Path, typer.Argument(help="where to write; must not exist")],
    store: StoreUrl,
) -> None:
    """Write an adapter to a folder that plain peft loads."""
    from cluster import keys, records, registry
    from cluster.errors import ConfigError, Fault
    from cluster.store import open_store

    if folder.exists():
        raise ConfigError([Fault(str(folder), "", "exists already; name a new folder")])
    opened = open_store(store)
    record = registry.resolve(opened, reference)
    partial = folder.with_name(folder.name + ".partial")
    records.fetch_files(opened, keys.adapter_version_prefix(record.name, record.version), record.files, partial)
    partial.rename(folder)
    print(f"{record.name}@{record.version} of {record.base.name} in {folder}")
