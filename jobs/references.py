"""What a reference stands for in a store: a run, a version of an adapter, a revision of a model."""

from collections.abc import Iterator

from cluster import keys, registry
from cluster.errors import InputError, ObjectDamaged
from cluster.models import mirrored
from cluster.records import AdapterRecord, ModelManifest, RunRecord
from cluster.store import Store
from jobs import runs


def find_run(store: Store, reference: str) -> RunRecord:
    """The run behind a reference, as `trace` takes it. Raises InputError."""
    if store.exists(keys.run_record(reference)) if keys.is_name(reference) else False:
        return runs.find(store, reference).record
    model = find_model(store, reference)
    if model:
        if not model.made:
            raise InputError(f"model {reference} was not made by a run that {store.url} knows")
        return runs.find(store, model.made.run_id).record
    return runs.find(store, registry.resolve(store, reference).run_id).record


def find_model(store: Store, reference: str) -> ModelManifest | None:
    """A model by NAME@REVISION, whose revision may be cut short to 8 digits or more."""
    name, _, revision = reference.partition("@")
    if len(revision) < 8:
        return None
    found = [each for each in mirrored(store) if each.name == name and each.revision.startswith(revision)]
    if len(found) > 1:
        raise InputError(f"{reference} stands for {len(found)} revisions; give more of its digits")
    return found[0] if found else None


def adapters(store: Store) -> Iterator[AdapterRecord]:
    """Every version of every adapter whose record can be read."""
    for name in registry.names(store):
        for number in registry.version_numbers(store, name):
            try:
                yield registry.record(store, name, number)
            except ObjectDamaged:
                continue
