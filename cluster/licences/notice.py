"""The NOTICE and the licence texts that go with what is made."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import LicenceRefused
from cluster.licences.chain import Judgement
from cluster.licences.facts import normal, table_path
from cluster.records import Artefact, distinct

NOTICE = "NOTICE"
TEXTS = Path("configs") / "policy" / "texts"
"""Texts of licences, `ID.txt`, for models whose folder has none."""

_LICENCES = ("LICENSE*", "LICENCE*", "USE_POLICY*")


def compose(artefacts: Sequence[Artefact], judged: Judgement) -> str:
    """What a NOTICE says of all that a model was made from.

    Args:
        judged: for giving it away, whatever the use is: a file outlives the use that it was made for.
    """
    lines = ["It was made from:"]
    for artefact in distinct(artefacts):
        of = f" (of {artefact.of})" if artefact.of else ""
        lines.append(f"  {artefact.kind}: {artefact.name}{of}, licence {artefact.licence or 'not stated'}")
    lines += ["", "Changed by fine-tuning. To be kept by whoever uses it or passes it on:"]
    owed = [duty for duty in judged.duties if duty.kind != "sign-off"]
    said = ("notice", "built with")  # these are said here, in their own words
    lines += [f"  {duty.licence}: {duty.words if duty.kind in said else duty.text}" for duty in owed] or ["  nothing"]
    if not judged.passes:
        lines += ["", "As judged then, it may not be given to others:"]
        lines += [f"  {reason.text}" for reason in judged.reasons]
    return "\n".join(lines) + "\n"


def add_licences(base_folder: Path, folder: Path) -> None:
    """Copy the base's licence files into `folder`, and put its own NOTICE behind ours."""
    for pattern in _LICENCES:
        for path in base_folder.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copy(path, folder / path.name)
    for path in sorted(base_folder.glob(f"{NOTICE}*")):
        with (folder / NOTICE).open("a") as file:
            file.write(f"\n{path.name} of the base model:\n\n{path.read_text(errors='replace')}")


def add_texts(folder: Path, judged: Judgement) -> None:
    """Put the text of each licence that has to go along into `folder`, as LICENSE.ID.txt.

    Where no text is kept here, what the base model's folder had must do. Raises LicenceRefused when there is none.
    """
    has_any = any(path for pattern in _LICENCES[:2] for path in folder.glob(pattern))
    for licence in dict.fromkeys(duty.licence for duty in judged.duties if duty.kind == "licence copy"):
        text = text_of(licence)
        if text:
            shutil.copy(text, folder / f"LICENSE.{text.name}")
        elif not has_any:
            raise LicenceRefused(
                f"the text of {licence} has to go along, and was in no file of the base model; save it as "
                f"{TEXTS / licence}.txt"
            )


def text_of(licence: str) -> Path | None:
    """The file with a licence's text, of the current folder or of this checkout."""
    folders = dict.fromkeys((TEXTS, table_path(TEXTS), Path(__file__).resolve().parents[2] / TEXTS))
    found = (path for folder in folders for path in sorted(folder.glob("*.txt")))
    return next((path for path in found if normal(path.stem) == normal(licence)), None)
