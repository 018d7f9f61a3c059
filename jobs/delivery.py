"""An adapter version out of the store into a folder, as it is or merged into its base, with all that goes along.

    version ─▸ licences judged ─▸ files fetched and checked ─▸ (merged) ─▸ NOTICE, licence texts, card, luthier.json

The folder is whole or not there.
"""

import tempfile
from pathlib import Path

from cluster import keys, made, models, records, registry
from cluster.errors import ConfigError, Fault, InputError, ObjectNotFound
from cluster.licences import model_card, notice
from cluster.licences.card import CARD
from cluster.licences.chain import Judgement
from cluster.licences.gate import Gate
from cluster.logs import say
from cluster.models import ModelConfig
from cluster.records import AdapterRecord, Made, RunRecord
from cluster.store import Store
from jobs import card


def deliver(
    store: Store, reference: str, folder: Path, *, internal: bool, merged: bool
) -> tuple[AdapterRecord, Judgement]:
    """Write the version that a reference stands for. Returns it, and how it was judged.

    Args:
        internal: it stays here: not judged as given to others.
        merged: write base and adapter as one model.

    Raises:
        LicenceRefused, InputError.
    """
    if folder.exists():
        raise ConfigError([Fault(str(folder), "", "exists already; name a new folder")])
    record = registry.resolve(store, reference)
    gate, artefacts = Gate.here(), record.chain
    (judged,) = gate.require(artefacts, reference, folder.name, ["train" if internal else "distribute"])
    try:
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as temporary:
            whole = Path(temporary) / "adapter"
            records.fetch_files(store, keys.adapter_version_prefix(record.name, record.version), record.files, whole)
            if not record.artefacts:  # older than the notice that goes with it
                with (whole / notice.NOTICE).open("a") as file:
                    file.write(f"\n{gate.notice(artefacts)}")
            how = made.of_adapter(record, merged=merged)
            if merged:
                whole = _merge(store, how, whole, Path(temporary) / "merged")
            notice.add_texts(whole, judged)
            _describe(store, whole, folder.name, how, gate)
            whole.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; name a folder that can be made") from None
    return record, judged


def _merge(store: Store, how: Made, adapter: Path, folder: Path) -> Path:
    from jobs.merge import merge  # torch

    merge(models.fetch(_base(store, how), how.base, store), adapter, folder)
    for path in adapter.iterdir():
        if path.name.startswith((notice.NOTICE, "LICENSE", "LICENCE", "USE_POLICY")):
            path.replace(folder / path.name)
    return folder


def _base(store: Store, how: Made) -> ModelConfig:
    """Where the base is to be had: the store, else the Hub by the name that the version was judged by."""
    base = how.base
    source = "store" if store.exists(keys.model_manifest(base.name, base.revision)) else model_card.base_model(how)
    if source != "store" and "/" not in source:
        raise InputError(f"{store.url} does not hold {base.name} at revision {base.revision}; mirror it there again")
    # The precision is the adapter's own: what stands here is not used.
    return ModelConfig(
        name=base.name, source=source, revision=base.revision, licence=base.licence, dtype="bf16", shape=None
    )


def _describe(store: Store, folder: Path, name: str, how: Made, gate: Gate) -> None:
    """Card and luthier.json. A card that was published with the adapter stays as it is."""
    made.write(folder, how)
    if how.kind == "adapter" and (folder / CARD).exists():
        return
    try:
        run = records.read(store, keys.run_record(how.run_id), RunRecord)
    except ObjectNotFound:
        say(f"warning: run {how.run_id} is not in {store.url} any more, so no model card is written")
        return
    record = registry.record(store, how.adapter.name, how.adapter.version) if how.adapter else None
    evaluation = record.metrics.get("evaluation_loss") if record else None
    card.write(store, folder, name, how, run, evaluation, gate.notice(how.artefacts))
