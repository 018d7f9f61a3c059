"""`luthier licences …`: what the licences of a model, a recipe or a whole store allow, before anything is done."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(name="licences", help="What licences allow, and oblige to. Not legal advice.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def check(
    what: Annotated[Path, typer.Argument(help="a model's config, a recipe, a model's folder, or a card (.md)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value …, for a config")] = None,
    use: Annotated[list[str] | None, typer.Option(help="train, serve or distribute; default: all three")] = None,
    name: Annotated[str | None, typer.Option(help="what the model will be called")] = None,
    as_json: AsJson = False,
) -> None:
    """Say for each use whether it is allowed, why not, and what it obliges to. Exit code 2 when one is not."""
    from cluster.errors import ConfigError, Fault
    from cluster.licences.gate import Gate
    from cluster.licences.gate import check as refuse
    from cluster.licences.organisation import USES

    wrong = [each for each in use or () if each not in USES]
    if wrong:
        raise ConfigError([Fault("command line", "--use", f"got {wrong[0]}; write {', '.join(USES)}")])
    gate = Gate.here()
    artefacts = _artefacts(what, overrides or [], gate)
    judged = gate.judge_all(artefacts, name, [each for each in USES if not use or each in use])
    if as_json:
        shown = {"artefacts": [each.model_dump() for each in artefacts]}
        print(json.dumps(shown | {"uses": {each.use: each.to_dict() for each in judged}}), flush=True)
    else:
        for each in judged:
            print(f"{each.use:<12}{each.level}, by {', '.join(each.licences) or 'nothing'}")
            for line in (*each.reasons, *each.duties, *each.notes):
                print(f"{'':<12}{line}")
    refuse(judged, str(what))


def _artefacts(what: Path, overrides: list[str], gate: Any) -> tuple[Any, ...]:
    """What a file or folder is made from; a recipe is read by the group that knows its schema."""
    import yaml

    from cluster.config import load
    from cluster.licences.card import read_card
    from cluster.models import ModelConfig

    if what.suffix in (".yaml", ".yml"):
        try:
            keys = set(yaml.safe_load(what.read_text()) or ())
        except (OSError, yaml.YAMLError, TypeError, UnicodeDecodeError):
            keys = set()  # reading it as a config says better what is wrong
        if "method" in keys:
            recipe = load(what, importlib.import_module("jobs.config").Recipe, overrides)
            found: tuple[Any, ...] = importlib.import_module("jobs.terms").artefacts_of(recipe, gate)
            return found
        if "replicas" in keys or "engine" in keys:
            served = load(what, importlib.import_module("serving.config").ServingConfig, overrides)
            return tuple(gate.of_model(served.model))
        return tuple(gate.of_model(load(what, ModelConfig, overrides)))
    if what.is_dir():
        return tuple(gate.of_folder(what))
    return read_card(what, what.parent.resolve().name, gate.facts)


@app.command()
def audit(
    store: Annotated[str, typer.Option("--store", help="s3://bucket/prefix or file:///folder")],
    as_json: AsJson = False,
    bom: Annotated[bool, typer.Option("--bom", help="print a CycloneDX ML-BOM")] = False,
) -> None:
    """Judge all models, adapters and data that a store holds, for every use."""
    from cluster.licences import audit as auditing
    from cluster.licences.bom import bom as ml_bom
    from cluster.licences.gate import Gate
    from cluster.logs import show
    from cluster.store import open_existing

    gate = Gate.here()
    rows = auditing.audit(open_existing(store), gate)
    if bom:
        print(json.dumps(ml_bom(rows, gate.facts)))
        return
    if as_json:
        print(json.dumps([row.to_dict() for row in rows]))
        return
    shown = [
        {
            "kind": row.kind,
            "name": row.name,
            "version": row.version,
            "licences": ", ".join(dict.fromkeys(each for judged in row.judgements for each in judged.licences)),
            **({each.use: str(each.level) for each in row.judgements} or dict.fromkeys(("train", "serve"), "unknown")),
            "why": row.problem or "; ".join(dict.fromkeys(r.text for j in row.judgements for r in j.reasons)),
        }
        for row in rows
    ]
    columns = ("kind", "name", "version", "licences", "train", "serve", "distribute", "why")
    show([{column: row.get(column) for column in columns} for row in shown], columns)
