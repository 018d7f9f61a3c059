"""Prepared sets in the store: what a recipe asks for, which there are, and their rows on this machine."""

import fcntl
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster import keys, models, records
from cluster.errors import InputError, ObjectNotFound, StoreError
from cluster.licences.gate import Gate
from cluster.logs import say
from cluster.models import ModelConfig, cache_folder
from cluster.store import Store
from jobs import terms
from jobs.config import DataConfig, DataLicence, Recipe
from jobs.data import prepare
from jobs.data.card import Card
from jobs.data.request import Files, Request, Template, make_request
from jobs.data.rules import Rules
from jobs.dataset import locate_all


def for_run(recipe: Recipe, files: Sequence[Files], folder: Path, store: Store) -> tuple[Card | None, Sequence[Files]]:
    """The set that data.rules ask for, made unless it is there, and its files instead of these; or these as they are.

    Args:
        files: those to train on, and those to evaluate on.
        folder: the model's.

    Raises DataError as `prepare.prepare` does.
    """
    if recipe.data.rules is None:
        return None, files
    request, paths = request_of(recipe, files[0], files[1], folder)
    card = prepare.prepare(request, paths, store)
    for warning in card.warnings:
        say(f"warning: {warning}")
    say(
        f"data: {card.before.rows:,} rows checked, {card.after.rows:,} to train on; what was found: "
        f"`luthier jobs data card {card.digest[:12]} --store {store.url}`"
    )
    return card, fetch(card, store)


def request_of(recipe: Recipe, train: Files, evaluation: Files, folder: Path | None) -> tuple[Request, list[Path]]:
    """What a recipe asks for of its files.

    Args:
        folder: the model's, where it is on this machine.
    """
    template = Template.of(recipe.model.name, folder, recipe.data) if folder else None
    licences = licences_of([name for name, _ in (*train, *evaluation)], recipe.data)
    return make_request(train, evaluation, recipe.data.rules or Rules(), template, licences)


def licences_of(names: Sequence[str], data: DataConfig | None = None) -> dict[str, DataLicence]:
    """What each source is under, for the card."""
    gate = Gate.here()
    return {name: terms.licence_of(data or DataConfig(train=tuple(names)), name, gate) for name in names}


def asked_by(recipe: Recipe, store: Store, tell: prepare.Tell = say) -> tuple[Request, list[Path]]:
    """The request of a recipe that only is looked at: its model is not fetched for that."""
    folder = model_at_hand(recipe.model, store)
    if folder is None:
        tell(f"warning: {recipe.model.name} is not on this machine, so length and template are not checked")
    train, evaluation = (locate_all(names, store, Path.cwd()) for names in (recipe.data.train, recipe.data.evaluation))
    return request_of(recipe, train, evaluation, folder)


def model_at_hand(model: ModelConfig, store: Store) -> Path | None:
    """A folder with the model's tokenizer, if there is one here, or in the store."""
    if model.is_folder:
        folder = Path(model.source).expanduser()
        return folder if (folder / "tokenizer.json").is_file() else None
    if model.is_hub and not store.exists(keys.model_manifest(model.name, model.revision or "")):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.source, "tokenizer.json", revision=model.revision)
        return Path(found).parent if isinstance(found, str) else None
    return models.fetch(model, models.pin(model, store), store)


def find(store: Store, digest: str) -> Card:
    """The card of a set, prepared or checked, by the first letters of its digest. Raises InputError."""
    prefix = keys.prepared_sets_prefix()
    there = sorted({item.key.removeprefix(prefix).partition("/")[0] for item in store.list(prefix)})
    found = [name for name in there if name.startswith(digest)]
    if len(found) != 1:
        fault = (
            f"{len(found)} sets begin so" if found else f"there are: {', '.join(name[:12] for name in there) or 'none'}"
        )
        raise InputError(f"no set {digest} in {store.url}: {fault}")
    for key in (keys.prepared_card(found[0]), keys.prepared_check(found[0])):
        try:
            return records.read(store, key, Card)
        except ObjectNotFound:
            continue
    raise InputError(f"set {found[0]} in {store.url} is not finished: run the same command again")


def fetch(card: Card, store: Store) -> list[Files]:
    """The set's files on this machine, to train on and to evaluate on, downloaded once."""
    folder = cache_folder() / "prepared" / card.digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                wanted = (*card.files, *card.evaluation_files)
                records.fetch_files(store, keys.prepared_prefix(card.digest), wanted, partial)
            except StoreError:
                shutil.rmtree(partial)
                raise
            partial.rename(folder)
    return [
        [(f"prepared/{card.digest[:12]}/{file.file}", folder / file.file) for file in files]
        for files in (card.files, card.evaluation_files)
    ]
