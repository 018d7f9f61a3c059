"""`luthier jobs list|show|logs|report|diff|export`: what runs have left in the store; nothing is started for it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import AsJson, StoreUrl
from cluster.logs import show

app = typer.Typer()

RunId = Annotated[str, typer.Argument(help="as `luthier jobs list` prints it")]


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
