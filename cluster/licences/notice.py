"""The NOTICE that goes with what is made, and the licence files that go along. Pure text, and one look at a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.records import Artefact

if TYPE_CHECKING:
    from cluster.licences.gate import Gate

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def text(gate: "Gate", artefacts: Sequence[Artefact]) -> str:
    """What is said of everything that a model was made from, with all that giving it away would oblige to.

    All of it is written whatever the use is, because a file outlives the use it was made for.
    """
    judged = gate.judge(artefacts, "distribute")
    lines = ["It was made from:"]
    for artefact in dict.fromkeys(artefacts):
        of = f", of which {artefact.of} was made" if artefact.of else ""
        lines.append(f"  {artefact.kind} {artefact.name}, licence {artefact.licence or 'not stated'}{of}")
    lines += ["", "The weights were changed by fine-tuning. Their terms apply to whoever uses or passes on this:"]
    lines += [f"  {duty.licence}: {duty.text}" for duty in judged.duties if duty.kind != "sign-off"] or ["  none"]
    if not judged.passes:
        lines += ["", "As it is, it may not be given to others:"]
        lines += [f"  {reason.text}" for reason in judged.reasons]
    return "\n".join(lines) + "\n"


def licence_files(folder: Path) -> list[Path]:
    """The licence files of a model's folder."""
    return sorted({path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file()})
