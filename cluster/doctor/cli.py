"""`luthier cluster doctor`: what a live cluster has wrong, with the fix for each."""

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.doctor.finding import Finding
    from cluster.place import ClusterConfig

app = typer.Typer()

_TUNNEL = "http://127.0.0.1:8265"
_NAMED = 3  # nodes of a finding, before the rest is counted


@app.command()
def doctor(
    name: Annotated[
        str | None, typer.Argument(help="configs/clusters/NAME.yaml, to compare it and to find its token")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="the dashboard, http://host:8265. Default: RAY_ADDRESS, or NAME's tunnel.")
    ] = None,
    store: Annotated[str | None, typer.Option("--store", help="try s3://bucket/prefix from every node")] = None,
    secret: Annotated[
        list[str] | None, typer.Option(help="NAME=secret://…, read on the nodes before the store is opened")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="seconds that a node may take for one answer")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Prove that a live cluster is closed and fit: all checks, with a fix for each fault. Exit code 1 for a fault."""
    from cluster.doctor.examine import examine
    from cluster.doctor.finding import Level
    from cluster.doctor.gather import gather
    from cluster.launch.cli import named

    place = named(name) if name else None
    target = _address(address, place)
    _check_store(store)
    found = examine(gather(target, place, store, _secrets(secret or []), timeout))
    if as_json:
        print(json.dumps([_as_dict(each) for each in found]))
    else:
        _show(found)
    raise typer.Exit(int(any(each.level is Level.FAULT for each in found)))


def _address(address: str | None, place: "ClusterConfig | None") -> str:
    """Where the dashboard is; and, of a cluster that `luthier cluster up` made, its token. Raises ConfigError."""
    from cluster import env
    from cluster.errors import ConfigError, Fault
    from cluster.launch.token import token_file

    if place and env.RAY_AUTH_MODE not in os.environ and token_file(place.name).exists():
        os.environ |= {env.RAY_AUTH_MODE: "token", env.RAY_AUTH_TOKEN_PATH: str(token_file(place.name))}
    target = address or os.environ.get(env.RAY_ADDRESS) or (_TUNNEL if place else None)
    if not target:
        message = f"name the dashboard, or set {env.RAY_ADDRESS}, or give a NAME of configs/clusters"
        raise ConfigError([Fault("command line", "--address", message)])
    return target


def _check_store(store: str | None) -> None:
    from cluster.errors import ConfigError, Fault
    from cluster.store import check_url

    try:
        if store is not None:
            check_url(store)
    except ValueError as error:
        raise ConfigError([Fault("command line", "--store", str(error))]) from None


def _secrets(given: list[str]) -> dict[str, str]:
    from cluster.errors import ConfigError, Fault
    from cluster.secret import check

    secrets = dict(each.partition("=")[::2] for each in given)
    try:
        check(secrets)
    except ValueError as error:
        raise ConfigError([Fault("command line", "--secret", str(error))]) from None
    return secrets


def _as_dict(finding: "Finding") -> dict[str, object]:
    return {
        "group": finding.check.group,
        "check": finding.check.subject,
        "level": finding.level,
        "seen": finding.seen,
        "fix": finding.fix,
        "nodes": finding.nodes,
    }


def _show(found: "list[Finding]") -> None:
    from rich.markup import escape
    from rich.table import Table

    from cluster.doctor.finding import Check, Level
    from cluster.logs import console

    styles = {Level.OK: "green", Level.WARNING: "yellow", Level.FAULT: "bold red", Level.NOT_CHECKED: "dim"}
    everybody = {node for each in found if each.check is Check.NODES for node in each.nodes}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "check", "", "seen"):
        table.add_column(column, no_wrap=column != "seen", overflow="fold")
    group = ""
    for each in found:
        is_new, group = each.check.group != group, each.check.group
        where = _where(each.nodes, everybody)
        fix = f"\n[bold]fix:[/bold] {escape(each.fix)}" if each.fix else ""
        table.add_row(
            f"[bold]{group}[/bold]" if is_new else "",
            each.check.subject,
            f"[{styles[each.level]}]{each.level}[/]",
            f"{escape(where + each.seen)}{fix}",
        )
    console().print(table)
    counts = ", ".join(f"{sum(each.level is level for each in found)} {level}" for level in Level)
    console().print(f"\n{counts}")


def _where(nodes: tuple[str, ...], everybody: set[str]) -> str:
    if not nodes or set(nodes) == everybody:
        return ""
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return f"{', '.join(nodes[:_NAMED])}{more}: "
