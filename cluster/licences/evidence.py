"""What a model's folder shows of its licence beside the tag: the text in LICENSE, and whose weights config.json names.

A tag is the word of whoever published the folder last. Where the licence's own text lies beside it, or the config still
names the model that it was loaded from, and that asks for more than was declared, both are kept: as a tag is that its
base contradicts. A text is known by its title; one that no row's name begins with says nothing.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from cluster.licences.card import origin
from cluster.licences.facts import Facts, Terms
from cluster.records import Artefact

_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
_HEAD_BYTES = 2000
_TITLE_WORDS = 30
"""A title, and what may stand before it: a copyright line, `Creative Commons`, `Model`."""
_LEFT_OUT = {"the", "version", "creative", "commons"}


def contradictions(folder: Path, name: str, declared: Iterable[Artefact], facts: Facts) -> list[tuple[str, Artefact]]:
    """What the folder shows and nobody declared, where it asks for anything, each with the file that shows it.

    Args:
        name: what the model is called among `declared`.
    """
    held = {terms for each in declared for terms in _declared(each, facts)}
    shown = [(file, Artefact(kind="base", name=name, licence=terms.id)) for file, terms in _texts(folder, facts)]
    if (loaded_from := _loaded_from(folder)) and loaded_from != name:
        shown += [("config.json", each) for each in origin(loaded_from, "base", facts, name)]
    rows = [(file, each, facts.find(each.licence or "")) for file, each in shown]
    rows = [each for each in rows if each[2] and (each[2].restrictions or each[2].needs_review)]
    return [(file, each) for file, each, row in rows if row not in held]


def _texts(folder: Path, facts: Facts) -> list[tuple[str, Terms]]:
    """The licence files of a folder that are known by their title, each with its row."""
    found = []
    for path in sorted({path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES).decode(errors="replace")
        if row := of_title(head, facts):
            found.append((path.name, row))
    return found


def of_title(head: str, facts: Facts) -> Terms | None:
    """The row whose name stands first in a text's title; of two that begin at one word, the longer name."""
    words = _words(head)[:_TITLE_WORDS]
    found = [
        (place, -len(title), terms.id)
        for terms in facts.licences
        if len(title := _words(terms.name.partition("(")[0])) > 1
        for place in range(len(words))
        if words[place : place + len(title)] == title
    ]
    return facts.find(min(found)[2]) if found else None


def _words(text: str) -> list[str]:
    """For comparing: lower case, `v3`, `Version 3` and `3` alike, without what titles have or leave out."""
    words = re.findall(r"[a-z0-9+]+(?:\.[0-9]+)*", text.lower())
    words = [re.sub(r"^v(?=\d)", "", word) for word in words]
    return [word for word in words if word not in _LEFT_OUT]


def _declared(artefact: Artefact, facts: Facts) -> set[Terms]:
    known = facts.known_as(artefact.name)
    tags = [artefact.licence, known.licence if known else None]
    return {terms for tag in tags if tag for held in facts.alternatives(tag) for terms in held}


def _loaded_from(folder: Path) -> str | None:
    """The Hub id that config.json was loaded from, as transformers notes it."""
    try:
        said = json.loads((folder / "config.json").read_text()).get("_name_or_path")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None  # what is wrong with it, an inspection says
    return said if isinstance(said, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", said) else None
