"""`luthier jobs data show`: one sample as the model will see it: every token, those to learn marked.

    luthier jobs data show rows.jsonl --line 7 --model ./model
    luthier jobs data show configs/recipes/NAME.yaml --sample 3 train.steps=1

On a terminal what is learned is green and control tokens are bold; in a pipe what is learned stands in ⟦ ⟧. It is
what `jobs.dataset` makes of the row, by the same code, after the recipe's data.rules; a row that would be refused is
refused here in the same words. What only the whole set decides (duplicates, leakage) is not looked at.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli import AsJson

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cluster.models import ModelConfig
    from jobs.chat import Overlong
    from jobs.data.rules import Rules
    from jobs.data.sample import Shown
    from jobs.rows import Place, Row, Unusable

UNLIMITED = 2**31 - 1  # more tokens than any row has


def show(
    given: Annotated[list[str], typer.Argument(help="a data file; or configs/recipes/NAME.yaml, and key=value …")],
    model: Annotated[
        str | None, typer.Option("--model", help="a model's folder, or configs/models/NAME.yaml; a recipe has its own")
    ] = None,
    sample: Annotated[int | None, typer.Option("--sample", min=1, help="which row, from 1")] = None,
    line: Annotated[int | None, typer.Option("--line", min=1, help="the row on this line (Parquet: this row)")] = None,
    file: Annotated[str | None, typer.Option("--file", help="which of a recipe's files; default: the first")] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="cut to so many tokens, without a recipe")
    ] = None,
    store: Annotated[str | None, typer.Option("--store", help="where a mirrored model or a data file is")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a sample as the model will see it, with what is learned of it marked. Exit code 2 if it is refused."""
    from cluster.errors import ConfigError, Fault

    if sample is not None and line is not None:
        raise ConfigError([Fault("command line", "--line", "give a row by --sample or by --line, not by both")])
    wanted = _from_recipe(given, model, file, store) if given[0].endswith((".yaml", ".yml")) else None
    wanted = wanted or _from_file(given, model, length, store)
    from jobs.data.sample import look, ruled

    place, row = _row(wanted, sample, line)
    row, mended = (row, ()) if wanted.rules is None else ruled(place, row, wanted.rules)
    with _tokenizer(wanted) as tokenizer:
        shown = look(tokenizer, place, row, wanted.max_tokens, wanted.overlong, mended)
        print_shown(tokenizer, shown, as_json)


def print_shown(tokenizer: "PreTrainedTokenizerBase", shown: "Shown", as_json: bool) -> None:
    """On stdout: the sample, what was cut, and a line of numbers; or one JSON object."""
    from cluster.logs import console
    from jobs.data.sample import coloured, marked, pieces

    runs = pieces(tokenizer, shown.input_ids, shown.supervised)
    whole = pieces(tokenizer, [*shown.input_ids, *shown.cut_ids], [*shown.supervised, *shown.cut_supervised])
    rest = "".join(piece.text for piece in whole)[len("".join(piece.text for piece in runs)) :]
    if as_json:
        print(
            json.dumps(
                {
                    "place": shown.place,
                    "tokens": len(shown.input_ids),
                    "supervised_tokens": sum(shown.supervised),
                    "cut_tokens": len(shown.cut_ids),
                    "cut_supervised_tokens": sum(shown.cut_supervised),
                    "left_out": shown.left_out,
                    "mended": shown.mended,
                    "text": marked(runs),
                    "input_ids": shown.input_ids,
                    "supervised": shown.supervised,
                }
            ),
            flush=True,
        )
        return
    out = console()
    if out.is_terminal:
        text = coloured(runs)
        text.append(rest, "strike red")
        out.print(text)
    else:
        print(marked(runs))
        if rest:
            print(f"--- cut from here ---\n{rest}")
    out.print(shown.summary, markup=False)


@dataclass(frozen=True)
class _Wanted:
    """Which file, under which name, for which tokenizer, and how long."""

    name: str
    path: Path
    model: "ModelConfig | Path"
    store: str | None
    max_tokens: int
    overlong: "Overlong"
    rules: "Rules | None" = None


def _from_recipe(given: list[str], model: str | None, file: str | None, store: str | None) -> _Wanted:
    from cluster.config import load
    from cluster.errors import ConfigError, Fault
    from jobs.config import Recipe

    recipe: Recipe = load(Path(given[0]), Recipe, given[1:])
    names = (*recipe.data.train, *recipe.data.evaluation)
    if file and file not in names:
        raise ConfigError([Fault("command line", "--file", f"{file} is none of the recipe's: {', '.join(names)}")])
    name = file or names[0]
    url = store or recipe.store
    path = _located(name, url if name.startswith("store:") else None)
    chosen = _model(model) if model else recipe.model
    return _Wanted(name, path, chosen, url, recipe.data.sequence_length, recipe.data.overlong, recipe.data.rules)


def _from_file(given: list[str], model: str | None, length: int | None, store: str | None) -> _Wanted:
    from cluster.errors import ConfigError, Fault

    faults = [] if model else [Fault("command line", "--model", "name the model's folder or config, by whose template")]
    faults += [Fault(f"command line `{more}`", "", "one data file at a time") for more in given[1:]]
    if faults or not model:
        raise ConfigError(faults)
    return _Wanted(given[0], _located(given[0], store), _model(model), store, length or UNLIMITED, "truncate")


def _located(name: str, url: str | None) -> Path:
    from cluster.models import cache_folder
    from cluster.store import open_existing
    from jobs.rows import locate

    opened = open_existing(url) if url and name.startswith("store:") else None
    return locate(name, opened, cache_folder() / "data", Path.cwd())


def _model(given: str) -> "ModelConfig | Path":
    from cluster.config import load
    from cluster.models import ModelConfig

    return load(Path(given), ModelConfig) if given.endswith((".yaml", ".yml")) else Path(given).expanduser()


def _row(wanted: _Wanted, sample: int | None, line: int | None) -> "tuple[Place, Row | Unusable]":
    from cluster.errors import DataError
    from jobs.rows import read_rows

    count, last = 0, 0
    for count, (place, row) in enumerate(read_rows(wanted.path, wanted.name), start=1):
        if place.number == line or (line is None and count == (sample or 1)):
            return place, row
        last = place.number
    if line is not None:
        raise DataError(f"{wanted.name}:{line}: no row starts on this line; the last starts on {last}")
    raise DataError(f"{wanted.name}: --sample {sample}: the file has {count:,} rows")


@contextmanager
def _tokenizer(wanted: _Wanted) -> "Iterator[PreTrainedTokenizerBase]":
    """The model's tokenizer; of a mirrored model nothing else is fetched. Raises ModelError."""
    from cluster import hub, keys, models, records
    from cluster.errors import ModelError
    from cluster.store import open_existing
    from jobs.dataset import TOKENIZER_FILES
    from jobs.model import load_tokenizer

    model = wanted.model
    if isinstance(model, Path) or model.is_folder:
        folder = model if isinstance(model, Path) else Path(model.source).expanduser()
        if not folder.is_dir():
            raise ModelError(f"{folder} is no folder of a model")
        yield load_tokenizer(folder)
        return
    store = open_existing(wanted.store) if wanted.store else None
    if model.is_hub and not (store and store.exists(keys.model_manifest(model.name, model.revision or ""))):
        yield load_tokenizer(hub.fetch(model.source, model.revision or "", (*TOKENIZER_FILES, "config.json")))
        return
    if store is None:
        raise ModelError(f"{model.name} is in a store: name it by --store")
    manifest = models.read_manifest(store, models.pin(model, store))
    wanted_files = [file for file in manifest.files if file.file in (*TOKENIZER_FILES, "config.json")]
    with tempfile.TemporaryDirectory() as name:
        records.fetch_files(store, keys.model_prefix(manifest.name, manifest.revision), wanted_files, Path(name))
        yield load_tokenizer(Path(name))
