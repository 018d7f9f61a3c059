"""The command `luthier jobs data forget`; nothing heavy is imported before it runs."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import AsJson, StoreUrl


def forget(
    store: StoreUrl,
    contains: Annotated[str | None, typer.Option(help="a text; your shell may keep it, --file does not")] = None,
    file: Annotated[Path | None, typer.Option(help="a file with a text on each line; - reads standard input")] = None,
    as_json: AsJson = False,
) -> None:
    """List every adapter, model and run that was trained on a text, the aliases that serve them, and what to do.

    Exit code 1 when some data could not be searched: then nothing can be said of it.
    """
    from cluster.errors import ConfigError, Fault, InputError
    from cluster.logs import show
    from cluster.store import open_existing
    from jobs.data import forget as forgetting

    if (contains is None) == (file is None):
        raise ConfigError([Fault("command line", "", "give either --contains TEXT or --file FILE")])
    try:
        given = contains if file is None else sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text: {type(error).__name__}") from None
    texts = [line for line in (given or "").splitlines() if line.strip()] if file else [contains or ""]
    if not any(text.strip() for text in texts):
        raise ConfigError([Fault("command line", "", "there is no text to look for")])
    found = forgetting.forget(open_existing(store), texts)
    if as_json:
        print(json.dumps(found.to_dict()))
        raise typer.Exit(int(bool(found.unsearched)))
    rows = [
        {"what": each.kind, "which": each.digest, "because": f"{each.rows} of its rows: {', '.join(each.places)}"}
        for each in found.matches
    ]
    for kind, affected in (("run", found.runs), ("adapter", found.adapters), ("model", found.models)):
        rows += [{"what": kind, "which": name, "because": why} for name, why in affected.items()]
    rows += [{"what": "alias", "which": name, "because": f"is {at} now"} for name, at in found.aliases.items()]
    if rows:
        show(rows, ("what", "which", "because"))
    else:
        print("nothing in this store has it")
    for step, todo in enumerate(found.to_do, start=1):
        print(f"{step}. {todo}")
    for name, why in found.unsearched.items():
        print(f"warning: {name} was not searched: {why}", file=sys.stderr)
    raise typer.Exit(int(bool(found.unsearched)))
