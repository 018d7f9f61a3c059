"""`luthier cluster models …`: list, add, inspect, suggest, tree."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.catalogue.inspection import Inspection
    from cluster.catalogue.suggest import Answer

app = typer.Typer(name="models", help="Base models: which to take, what is in them, and into the store.")

StoreUrl = Annotated[str, typer.Option("--store", help="s3://bucket/prefix or file:///folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    store: Annotated[str | None, typer.Option("--store", help="as `models list --store`")] = None,
    as_json: AsJson = False,
) -> None:
    """Base models: which to take, what is in them, and into the store. With --store alone: list what it holds."""
    from cluster.errors import ConfigError, Fault

    if context.invoked_subcommand is not None:
        if store is not None or as_json:
            message = f"write the options behind `{context.invoked_subcommand}`"
            raise ConfigError([Fault("command line", "models", message)])
    elif store is None:
        print(context.get_help())
        raise typer.Exit(2)
    else:
        list_models(store, as_json)


@app.command("list")
def list_models(store: StoreUrl, as_json: AsJson = False) -> None:
    """List the base models that the store holds."""
    from cluster.logs import show
    from cluster.models import mirrored
    from cluster.store import open_existing

    rows = [
        {
            "name": manifest.name,
            "revision": manifest.revision,
            "licence": manifest.licence,
            "bytes": sum(file.size for file in manifest.files),
            "source": manifest.source,
            "created_at": manifest.created_at,
        }
        for manifest in mirrored(open_existing(store))
    ]
    show(rows, ("name", "revision", "licence", "bytes", "source", "created_at"), as_json)


@app.command()
def add(
    source: Annotated[str, typer.Argument(help="owner/name of the Hub, ./folder, another store, or a config (.yaml)")],
    store: StoreUrl,
    name: Annotated[str | None, typer.Option(help="its name here; default: made from the source's")] = None,
    revision: Annotated[
        str | None, typer.Option(help="a commit, a digest, or the other store's; default: newest")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX or Hub id; default: what its card says")] = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="make safetensors of pickled weights, in a sandbox")
    ] = False,
    config_out: Annotated[
        Path | None, typer.Option(help="write the config for recipes: configs/models/NAME.yaml")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a model into the store: pinned, inspected, judged by its licence, every file with its checksum.

    Killed in the middle, the same command goes on where it stood. Prints the revision last.
    """
    from cluster.catalogue import add as adding
    from cluster.catalogue.source import Wanted
    from cluster.licences.gate import Gate
    from cluster.store import open_store

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    wanted = Wanted(source, name, revision, licence, convert)
    added = adding.add(wanted, open_store(store), Gate.here(), say, config_out)
    if as_json:
        print(json.dumps(added.to_dict()))
        return
    if config_out is None and not source.endswith((".yaml", ".yml")):
        print(f"\n{added.config}")
    print(added.revision)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="a model's folder, owner/name of the Hub, or its name in the --store")],
    store: Annotated[
        str | None, typer.Option("--store", help="where the model is; it is fetched into the cache")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="which of the store's or the Hub's; default: the newest")] = None,
    as_json: AsJson = False,
) -> None:
    """Explain a model's folder: what it is, what is missing or unsafe. Exit code 2 when it cannot be used."""
    from cluster.catalogue import inspection
    from cluster.catalogue.source import Wanted, locate
    from cluster.licences.facts import load_facts

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    folder = Path(source).expanduser()
    facts = load_facts()
    if store is not None:
        folder = locate(Wanted(store, name=source, revision=revision), facts, say).folder
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")) and not folder.exists():
        folder = locate(Wanted(source, revision=revision, licence="not asked"), facts, say).folder
    found = inspection.inspect(folder, facts)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        _explain(found)
    raise typer.Exit(0 if found.is_usable else 2)


@app.command()
def suggest(
    task: Annotated[
        str, typer.Option(help="chat, code, extract, reason, summarise, translate, tools, long-context …")
    ] = "chat",
    language: Annotated[str, typer.Option(help="languages that it has to know, as en,zh")] = "en",
    domain: Annotated[str | None, typer.Option(help="a field, as finance: decides between equals alone")] = None,
    prefer: Annotated[str, typer.Option(help="quality or speed")] = "quality",
    memory: Annotated[str, typer.Option(help="of the GPUs of one worker, or of one replica, as 24GiB")] = "24GiB",
    use: Annotated[
        str, typer.Option(help="commercial, research, or policy: as the organisation's policy says")
    ] = "policy",
    method: Annotated[str, typer.Option(help="what is trained: lora or full")] = "lora",
    serving: Annotated[bool, typer.Option("--serving", help="it is only to be served, not trained")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which open model to take, with the reasons, and why not the others. Exit code 1 when none will do."""
    from cluster.catalogue.suggest import answer, wish
    from cluster.catalogue.table import load_table
    from cluster.licences.gate import Gate

    wished = wish(task, language, domain, prefer, memory, use, method, serving)
    found = answer(load_table(), wished, Gate.here())
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        _advise(found)
    raise typer.Exit(0 if found.best else 1)


@app.command()
def tree(store: StoreUrl, as_json: AsJson = False) -> None:
    """Draw what the store holds by descent: base, adapters, and the models that were made of them."""
    from cluster.catalogue import tree as drawing
    from cluster.logs import console
    from cluster.store import open_existing

    roots = drawing.read(open_existing(store))
    if as_json:
        print(json.dumps([each.to_dict() for each in roots]))
    else:
        console().print(drawing.draw(roots, store))


def _explain(found: "Inspection") -> None:
    definition, weights, tokenizer = found.definition, found.weights, found.tokenizer
    lines = [("folder", found.folder)]
    if definition:
        shape = definition.shape
        lines += [
            ("definition", f"{definition.architecture} ({definition.family}), {definition.dtype}"),
            ("shape", f"{shape.num_hidden_layers} layers × {shape.hidden_size}, {shape.num_attention_heads} heads"),
            ("vocabulary", f"{shape.vocab_size:,}{', tied embeddings' if shape.tie_word_embeddings else ''}"),
            ("context", f"{definition.context_tokens:,} tokens"),
        ]
    if weights:
        of = ", ".join(f"{count:,} {dtype}" for dtype, count in weights.dtypes.items())
        files = f"{len(weights.files)} file{'s' * (len(weights.files) != 1)}"
        lines += [("weights", f"{files}, {weights.file_bytes:,} bytes, {weights.tensors} tensors; parameters: {of}")]
    markers = "with generation markers" if tokenizer.generation_markers else "without generation markers"
    template = f"renders, {markers}" if tokenizer.renders else "does not render" if tokenizer.template else "none"
    lines += [
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocabulary or 'unknown'} ids, ends with {tokenizer.eos!r}"),
        ("generation", f"ends at {list(tokenizer.generation_eos_ids) or 'what config.json says'}"),
        ("template", template),
        ("licence", f"{found.licence or 'not said'}; {', '.join(found.licence_files) or 'no licence file'}"),
        ("made from", ", ".join(found.made_from) or "not said"),
    ]
    for name, text in lines:
        print(f"{name:<12}{text}")
    print()
    for finding in found.findings:
        print(finding)
    usable = f"it can be loaded; what its licences allow, says `luthier licences check {found.folder}`"
    print(usable if found.is_usable else "it cannot be used as it is")


def _advise(found: "Answer") -> None:
    if found.best:
        print(f"take {found.best.model.name}  ({found.best.model.hub})")
        for reason in found.best.reasons:
            print(f"  {reason}")
    else:
        print("none of the table will do; the nearest misses come first")
    for other in found.others:
        print(f"or {other.model.name}: {other.reasons[0]}; {other.memory}")
    print("\nnot these:")
    for rejected in found.rejected:
        print(f"  {rejected.model.name}: {'; '.join(rejected.reasons)}")
    print(f"\nby configs/catalogue.yaml, read {found.read_on}; no benchmark was run")
