"""`luthier jobs data …`: check, prepare, card, show, augment.

FILES are data files; or one recipe, whose files, rules and model count, and `key=value` for it. Nothing here imports
torch; what checks a recipe's rows by its template does.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import env
from cluster.cli import AsJson, StoreUrl
from jobs.data.forget_cli import forget
from jobs.data.rules import SHIPPED
from jobs.data.show import show

if TYPE_CHECKING:
    from jobs.data.card import Card

app = typer.Typer(
    help="What is in data: check it, prepare it for training, and the card of what was found and done.",
    no_args_is_help=True,
)

Given = Annotated[list[str], typer.Argument(help="data files; or configs/recipes/NAME.yaml, and key=value …")]
RulesFile = Annotated[
    Path | None, typer.Option("--rules", help="what is looked for; default: the recipe's, or configs/policy/data.yaml")
]
Evaluation = Annotated[list[str] | None, typer.Option("--evaluation", help="a file that must not be in the others")]
AnyStore = Annotated[
    str | None,
    typer.Option("--store", help="s3://… or file:///folder; default: the recipe's, or a folder in the cache"),
]

app.command()(forget)


@app.command()
def check(
    given: Given,
    rules: RulesFile = None,
    evaluation: Evaluation = None,
    store: AnyStore = None,
    as_json: AsJson = False,
) -> None:
    """Say what is in data and what the rules would do about it. Exit code 2 when they refuse a row."""
    card = _card(given, rules, evaluation, store, with_rows=False, as_json=as_json)
    _show(card, as_json)
    if card.refused:
        raise typer.Exit(2)


@app.command("prepare")
def prepare_set(
    given: Given,
    rules: RulesFile = None,
    evaluation: Evaluation = None,
    store: AnyStore = None,
    as_json: AsJson = False,
) -> None:
    """Make the set that training reads, with its card; what was made before is found and not made again."""
    _show(_card(given, rules, evaluation, store, with_rows=True, as_json=as_json), as_json)


@app.command("card")
def show_card(
    digest: Annotated[str, typer.Argument(help="as `prepare` prints it; its first letters are enough")],
    store: StoreUrl,
    as_json: AsJson = False,
) -> None:
    """Print a set's data card, as Markdown."""
    from cluster.store import open_existing
    from jobs.data.card import markdown
    from jobs.data.prepared import find

    card = find(open_existing(store), digest)
    print(card.model_dump_json(indent=2) if as_json else markdown(card), flush=True)


@app.command()
def augment(
    given: Annotated[list[str], typer.Argument(help="data files")],
    rows: Annotated[int, typer.Option(min=1, help="how many rows to make")],
    out: Annotated[Path, typer.Option(help="the file to write, .jsonl")],
    endpoint: Annotated[str | None, typer.Option(help="a served model's address, http://host:port/v1")] = None,
    model: Annotated[str | None, typer.Option(help="its name there")] = None,
    key_variable: Annotated[str | None, typer.Option(help="the environment variable with its key")] = None,
    seed: Annotated[int, typer.Option(help="the same seed makes the same rows of templates")] = 0,
) -> None:
    """More rows for a small set: its questions in other words, by templates or a served model; marked as synthetic."""
    import asyncio

    from cluster.errors import ConfigError, Fault
    from cluster.logs import say
    from jobs.data import augment as more
    from jobs.rows import locate, read_rows

    if (endpoint is None) != (model is None):
        raise ConfigError([Fault("command line", "--endpoint", "give it together with --model")])
    if out.exists() or out.suffix != ".jsonl":
        raise ConfigError([Fault("command line", "--out", f"{out}: name a .jsonl file that is not there yet")])
    there = more.usable(row for name in given for row in read_rows(locate(name, None, Path(), Path.cwd()), name))
    made: list[dict[str, object]] = []
    if endpoint and model:
        asked = more.Endpoint(endpoint, model, os.environ[key_variable] if key_variable else None)

        async def ask() -> None:
            made.extend([row async for row in more.by_endpoint(there, rows, seed, asked)])

        asyncio.run(ask())
    else:
        made.extend(more.by_templates(there, rows, seed))
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    say(f"{len(made):,} synthetic rows of {len(there):,} in {out}; add it to data.train")
    if model:
        say(f"and say who wrote it: data.licences: {{{out}: {{teachers: [{model}]}}}}")


app.command()(show)


def _card(
    given: list[str],
    rules: Path | None,
    evaluation: list[str] | None,
    url: str | None,
    *,
    with_rows: bool,
    as_json: bool,
) -> "Card":
    """What was answered before, or else made now, on the recipe's cluster or a Ray of this process's own."""
    from cluster.config import load
    from cluster.errors import ConfigError, Fault
    from cluster.logs import say
    from cluster.models import cache_folder
    from cluster.place import ClusterConfig
    from cluster.session import joined
    from cluster.store import open_store
    from jobs.config import Recipe
    from jobs.data import prepare, prepared
    from jobs.data.request import make_request
    from jobs.data.rules import Rules
    from jobs.dataset import locate_all

    tell = partial(print, file=sys.stderr, flush=True) if as_json else say
    ruled = load(rules, Rules) if rules else None
    shipped = load(SHIPPED, Rules)
    if given[0].endswith((".yaml", ".yml")):
        recipe = load(Path(given[0]), Recipe, given[1:])
        if evaluation:
            raise ConfigError([Fault("command line", "--evaluation", "a recipe names its own, in data.evaluation")])
        wanted = ruled or recipe.data.rules or shipped
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"rules": wanted})})
        store, cluster = open_store(url or recipe.store), recipe.cluster
        request, paths = prepared.asked_by(recipe, store, tell)
    else:
        store = open_store(url or f"file://{cache_folder().absolute() / 'checked'}")
        files = [locate_all(names, store, Path.cwd()) for names in (given, evaluation or [])]
        licences = prepared.licences_of([*given, *(evaluation or [])])
        request, paths = make_request(files[0], files[1], ruled or shipped, licences=licences)
        address = "auto" if os.environ.get(env.RAY_ADDRESS) else "local"
        cluster = ClusterConfig(name="data", address=address, memory_gb_per_worker=1)
    if card := prepare.answered(request, store, with_rows):
        return card
    with joined(cluster, 1):
        return (prepare.prepare if with_rows else prepare.check)(request, paths, store, tell)


def _show(card: "Card", as_json: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from cluster.logs import console, say

    if as_json:
        print(json.dumps(card.model_dump(mode="json")), flush=True)
        return
    table = Table("check", "found", "for example", box=None, header_style="bold")
    for name, found in card.found.items():
        for outcome, count in found.counts.items():
            examples = found.examples.get(outcome, ())
            shown = f"{examples[0].place}: {examples[0]}" if examples else ""
            table.add_row(name, f"{count:,} {outcome}", escape(shown))
    console().print(table)
    stage = "prepared" if card.files else "checked"
    for warning in card.warnings:
        say(f"warning: {warning}")
    say(f"{card.before.rows:,} rows, {card.after.rows:,} to train on ({stage} {card.digest})")
