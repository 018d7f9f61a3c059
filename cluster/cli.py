"""The `luthier` command and its group `cluster`: clusters, what a store holds, its aliases, why nothing happens.

`luthier GROUP …` runs the `cli` module of the package GROUP, imported only when it is asked for: the ground imports
nothing that stands on it, and `--help` takes no second. Each group also runs as `python -m GROUP`.
"""

import importlib
import json
import os
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.catalogue.cli import app as models
from cluster.doctor.cli import app as doctor
from cluster.errors import LuthierError
from cluster.launch.cli import app as launch
from cluster.ledger import By
from cluster.licences.cli import app as licences
from cluster.logs import fail, show

GROUPS = {
    "jobs": "fine-tune: plan, submit, train, look at runs",
    "serving": "serve a base and its adapters over HTTP",
    "cluster": "clusters: up, down, status, doctor; what the store holds: adapters, aliases, models, runs",
}
COMMANDS = {
    "why": "why nothing happens: the one cause, and what to do",
    "licences": "what licences allow and oblige to: of a model, a recipe, a store",
}
"""Commands of the group `cluster` that also stand alone."""

app = typer.Typer(help="Clusters, and what the store holds.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(launch)
app.add_typer(doctor)
app.add_typer(licences)
app.add_typer(models)

StoreUrl = Annotated[str, typer.Option("--store", help="s3://bucket/prefix or file:///folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def main() -> None:
    """`luthier GROUP COMMAND …`, or `luthier COMMAND …`."""
    group = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if group in COMMANDS:
        run(app, "luthier", sys.argv[1:])
    if group not in GROUPS:
        lines = [f"  {name:<8} {what}" for name, what in (GROUPS | COMMANDS).items()]
        print("\n".join(["usage: luthier GROUP COMMAND …", "", *lines, "", "luthier GROUP --help lists its commands"]))
        sys.exit(0 if group in ("--help", "-h") else 2)
    run(importlib.import_module(f"{group}.cli").app, f"luthier {group}", sys.argv[2:])


def run(group: typer.Typer, name: str, arguments: list[str]) -> None:
    """Run one group's commands; an error of ours becomes one message and its exit code."""
    try:
        group(arguments, prog_name=name)
    except LuthierError as error:
        sys.exit(fail(error))


@app.command()
def adapters(
    store: StoreUrl,
    name: Annotated[str | None, typer.Argument(help="one adapter: list its versions")] = None,
    as_json: AsJson = False,
) -> None:
    """List adapters and where their aliases point, or the versions of one."""
    from cluster import evaluation, registry
    from cluster.errors import AdapterNotFound
    from cluster.store import open_existing

    opened = open_existing(store)
    if name:
        registry.parse(name)
        found = registry.versions(opened, name)
        if not found:
            raise AdapterNotFound(
                f"no adapter {name} in {store}; adapters here: {', '.join(registry.names(opened)) or 'none'}"
            )
        rows = [
            version.model_dump(mode="json")
            | {"base": version.base.name, "evaluation": evaluation.state(opened, version) or None}
            for version in found
        ]
        show(rows, ("version", "digest", "base", "run_id", "step", "evaluation", "created_at"), as_json)
        return
    rows = []
    for adapter in registry.names(opened):
        state = registry.alias_state(opened, adapter)
        aliases = registry.alias_targets(state) if state else {}
        rows.append({"name": adapter, "versions": len(registry.version_numbers(opened, adapter)), "aliases": aliases})
    show(rows, ("name", "versions", "aliases"), as_json)


@app.command()
def alias(
    reference: Annotated[str, typer.Argument(help="name, to read its history; or name@alias, to set it")],
    store: StoreUrl,
    version: Annotated[int | None, typer.Option(help="the version that the alias shall point at")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="remove the alias")] = False,
    why: Annotated[str, typer.Option(help="the reason, kept in the log")] = "",
    override_gate: Annotated[
        bool, typer.Option("--override-gate", help="to a version that has not passed its evaluation; needs --why")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Move an alias, or read the log of all its moves.

    A version that must pass an evaluation and has not is refused, unless the alias held it before.
    """
    from cluster import registry
    from cluster.errors import AdapterNotFound, ConfigError, Fault
    from cluster.store import open_existing

    name, at, chosen = reference.partition("@")
    opened = open_existing(store)
    if not at:
        if version is not None or remove:
            raise ConfigError([Fault(f"alias {reference}", "", f"which alias? write {name}@stable or {name}@NAME")])
        registry.parse(name)
        history = [entry.model_dump(mode="json") for entry in registry.alias_history(opened, name)]
        if not history:
            raise AdapterNotFound(f"no aliases of {name} in {store}; adapters: {', '.join(registry.names(opened))}")
        show(history, ("at", "by", "stable", "canary", "others", "why", "overridden"), as_json)
        return
    if (version is None) != remove:
        raise ConfigError([Fault(f"alias {reference}", "", "give either --version N or --remove")])
    entry = registry.set_alias(opened, name, chosen, version, why=why, override_gate=override_gate)
    show([entry.model_dump(mode="json")], ("at", "by", "stable", "canary", "others", "why", "overridden"), as_json)


@app.command()
def promote(
    reference: Annotated[str, typer.Argument(help="the version: name@7, or name@canary")],
    store: StoreUrl,
    alias: Annotated[str, typer.Option(help="the alias that shall point at it")] = "stable",
    why: Annotated[str, typer.Option(help="the reason, kept in the log")] = "",
    as_json: AsJson = False,
) -> None:
    """Move an alias to a version that has passed its evaluation, and print the report; refuse any other, and say why.

    Stricter than `alias`: a version that must show nothing is refused too, unless somebody has evaluated it.
    """
    from cluster import evaluation, registry
    from cluster.store import open_existing

    opened = open_existing(store)
    record = registry.resolve(opened, reference)
    report = evaluation.newest(opened, record)
    if report and not as_json:
        show(report.rows(), evaluation.ROW_COLUMNS)
    entry = registry.promote(opened, record, report, alias, why)
    if as_json and report:
        print(json.dumps({"alias": entry.model_dump(mode="json"), "report": report.model_dump(mode="json")}))
    else:
        print(f"{record.name}@{alias} is version {record.version}")


@app.command()
def runs(store: StoreUrl, as_json: AsJson = False) -> None:
    """List the runs that the store knows."""
    from cluster import keys, records
    from cluster.records import RunRecord
    from cluster.store import open_existing

    opened = open_existing(store)
    run_ids = sorted({item.key.split("/")[1] for item in opened.list(keys.runs_prefix())})
    found = [
        records.read(opened, keys.run_record(run_id), RunRecord)
        for run_id in run_ids
        if opened.exists(keys.run_record(run_id))
    ]
    rows = [record.model_dump(mode="json") | {"base": record.base.name} for record in found]
    show(rows, ("run_id", "base", "created_at", "code_revision"), as_json)


@app.command()
def costs(
    store: StoreUrl,
    since: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="the first day, UTC")] = None,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="the last day, which counts")] = None,
    by: Annotated[By, typer.Option(help="what is summed up: run, user, project, day")] = "run",
    as_json: AsJson = False,
) -> None:
    """Say what runs have cost: GPU-hours, CPU-hours and US dollars, from the ledger in the store.

    `unpriced` is the share of the hours whose price is not known; these are not in the dollars.
    """
    from cluster import ledger
    from cluster.errors import ConfigError, Fault
    from cluster.store import open_existing

    if since and until and since > until:
        raise ConfigError([Fault("command line", "--since", f"{since:%Y-%m-%d} is after --until {until:%Y-%m-%d}")])
    days = [f"{day:%Y-%m-%d}" if day else None for day in (since, until)]
    sums = ledger.by(ledger.read_all(open_existing(store), *days), by)
    rows: list[dict[str, Any]] = [{by: name, **spent.to_dict()} for name, spent in sums.items()]
    columns = (by, "hours", "gpu_hours", "cpu_hours", "usd", "unpriced")
    if not as_json:
        rows = [_for_people(row) for row in rows]
    show(rows, columns, as_json)


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    """Figures as a person wants them, shares in words."""
    from cluster import ledger

    shares = [f"{share:.0%} of {resource.upper()}" for resource, share in row["unpriced"].items() if share]
    figures = {name: ledger.figure(value) for name, value in row.items() if isinstance(value, float)}
    return {**row, **figures, "unpriced": ", ".join(shares)}


@app.command()
def dashboards(
    out: Annotated[Path, typer.Option(help="the folder to write to")],
) -> None:
    """Write Prometheus alert rules and Grafana dashboards for Luthier's metrics as Ray exports them."""
    from cluster.dashboards.alerts import rules
    from cluster.dashboards.grafana import DASHBOARDS
    from cluster.errors import InputError

    made = f"# Made by `luthier cluster dashboards` from cluster/dashboards/alerts.py.\n{rules()}"
    files = {"luthier-alerts.yaml": made}
    files |= {f"luthier-{each.name}.json": json.dumps(each.to_dict(), indent=2) + "\n" for each in DASHBOARDS}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text)
            print(out / name)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; name another folder by --out") from None


@app.command()
def why(
    run: Annotated[str | None, typer.Argument(help="a run, a job, or an application; all if not given")] = None,
    address: Annotated[str | None, typer.Option(help="the dashboard, http://host:8265. Default: RAY_ADDRESS.")] = None,
    store: Annotated[str | None, typer.Option("--store", help="the run's store, for its own events and steps")] = None,
    as_json: AsJson = False,
) -> None:
    """Say why nothing happens: the one cause, what shows it, and what to do. Exit code 1 when something is wrong."""
    from cluster import env
    from cluster.errors import ConfigError, Fault
    from cluster.store import open_existing
    from cluster.why import explain
    from cluster.why.finding import Cause
    from cluster.why.gather import gather

    target = address or os.environ.get(env.RAY_ADDRESS)
    if not target:
        raise ConfigError([Fault("command line", "--address", f"name the dashboard, or set {env.RAY_ADDRESS}")])
    found = explain(gather(target, run, open_existing(store) if store else None))
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        fix = f"\nfix: {found.fix}" if found.fix else ""
        print(f"{found.cause}: {found.evidence}{fix}")
    raise typer.Exit(int(found.cause is not Cause.NOTHING))
