"""The model card of what a run has made, put together from the store's records."""

from pathlib import Path

from cluster import keys, records
from cluster.errors import ObjectNotFound
from cluster.licences import model_card
from cluster.licences.card import CARD
from cluster.licences.facts import load_facts
from cluster.records import DatasetManifest, Made, RunRecord
from cluster.store import Store
from jobs import runs


def write(
    store: Store, folder: Path, name: str, made: Made, run: RunRecord, evaluation_loss: float | None, notice: str
) -> None:
    """Write README.md into a folder of weights.

    Args:
        evaluation_loss: as measured after the last step.
        notice: what the NOTICE says of artefacts and duties.
    """
    try:
        counted = records.read(store, keys.dataset_manifest(run.dataset), DatasetManifest)
    except ObjectNotFound:
        counted = None
    measured = model_card.losses(runs.read_steps(store, run.run_id), evaluation_loss)
    text = model_card.compose(name, made, run, measured, notice, load_facts(), counted)
    (folder / CARD).write_text(text, encoding="utf-8")
