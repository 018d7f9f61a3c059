"""`luthier.json`: how the weights in a folder came to be, so that it is known wherever the folder goes."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from cluster.errors import ModelError
from cluster.records import AdapterRecord, AdapterRef, LicenceRecord, Made, RunRecord

FILE = "luthier.json"


def write(folder: Path, made: Made) -> None:
    """Put it into a folder, in place of the one that its base may have had."""
    (folder / FILE).write_bytes(made.to_bytes())


def read(folder: Path) -> Made | None:
    """What a folder says of itself; None where it says nothing. Raises ModelError for what cannot be read."""
    path = folder / FILE
    try:
        return Made.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[-1]
        raise ModelError(f"{path} does not say how the weights were made: {reason}; export them again") from None


def of_run(run: RunRecord, kind: Literal["adapter", "model"], step: int, licences: LicenceRecord) -> Made:
    """Of what a run has trained: an adapter that has no version yet, or all weights."""
    return Made(
        kind=kind,
        run_id=run.run_id,
        step=step,
        base=run.base,
        digests=run.digests,
        artefacts=licences.artefacts,
    )


def of_adapter(record: AdapterRecord, *, merged: bool) -> Made:
    """Of an adapter version, or of its base with that version merged into it."""
    return Made(
        kind="merged" if merged else "adapter",
        run_id=record.run_id,
        step=record.step,
        base=record.base,
        adapter=AdapterRef(name=record.name, version=record.version, digest=record.digest),
        digests=record.digests,
        artefacts=record.chain,
    )
