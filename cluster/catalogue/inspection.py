"""A model's folder explained: what it is, what is in it, what is missing or unsafe, and what to do about it.

Nothing is loaded and nothing of the folder runs: JSON is read, safetensors by their headers, the template in a sandbox.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.catalogue import links, remote_code
from cluster.catalogue.convert import PICKLES, pickled_weights
from cluster.catalogue.definition import Definition, compare, read_definition
from cluster.catalogue.finding import Finding, Level
from cluster.catalogue.tokenizer import TokenizerFacts, read_tokenizer
from cluster.catalogue.weights import INDEX, Tensor, read_header, read_index
from cluster.errors import ModelError
from cluster.licences.card import CARD, read_card
from cluster.licences.evidence import contradictions
from cluster.licences.facts import Facts

_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class WeightFacts:
    """The safetensors files of a folder, by their headers."""

    files: tuple[str, ...]
    file_bytes: int
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    tied: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "files": list(self.files),
            "bytes": self.file_bytes,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "dtypes": self.dtypes,
            "tied": self.tied,
        }


@dataclass(frozen=True)
class Inspection:
    """All that was found. `licence` and `made_from` are the card's words."""

    folder: str
    definition: Definition | None
    weights: WeightFacts | None
    tokenizer: TokenizerFacts
    licence: str | None
    made_from: tuple[str, ...]
    licence_files: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def is_usable(self) -> bool:
        """Whether nothing is unsafe, missing or broken."""
        return not self.stops

    @property
    def stops(self) -> tuple[Finding, ...]:
        """Why it is not."""
        return tuple(each for each in self.findings if each.level in (Level.REFUSED, Level.FAULT))

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "usable": self.is_usable,
            "definition": self.definition.to_dict() if self.definition else None,
            "weights": self.weights.to_dict() if self.weights else None,
            "tokenizer": self.tokenizer.to_dict(),
            "card": {
                "licence": self.licence,
                "made_from": list(self.made_from),
                "licence_files": list(self.licence_files),
            },
            "findings": [each.to_dict() for each in self.findings],
        }


def inspect(folder: Path, facts: Facts) -> Inspection:
    """Look at a folder. Raises ModelError where there is none."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give a model's folder, or its name in a --store")
    if out := links.leading_out(folder):
        return _unread(folder, out)
    definition, found = read_definition(folder)
    weights, tensors, more = _weights(folder, definition)
    found += more
    if definition and tensors:
        found += compare(definition, tensors)
    tokenizer, more = read_tokenizer(folder, definition)
    found += more
    licence, made_from, more = _card(folder, facts)
    found += [*more, *_unsafe(folder, bool(tensors))]
    return Inspection(
        folder=str(folder),
        definition=definition,
        weights=weights,
        tokenizer=tokenizer,
        licence=licence,
        made_from=made_from,
        licence_files=tuple(sorted(path.name for each in _LICENCE_FILES for path in folder.glob(each))),
        findings=tuple(sorted(found, key=lambda each: list(Level).index(each.level))),
    )


def _unread(folder: Path, out: tuple[str, ...]) -> Inspection:
    """Of a folder that would lead us to other files: none of it is read."""
    text = f"{', '.join(out)}: links out of the folder, so nothing of it was read"
    fix = "put a copy there of what is part of the model, and remove the rest"
    finding = Finding(Level.REFUSED, "links", text, fix)
    return Inspection(str(folder), None, None, TokenizerFacts(kind="not read"), None, (), (), (finding,))


def _weights(
    folder: Path, definition: Definition | None
) -> tuple[WeightFacts | None, dict[str, Tensor], list[Finding]]:
    """The headers of all weights together, and whether they are all that the index promises."""
    found: list[Finding] = []
    again = "fetch the weights again, all shards"
    headers = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            headers.append(read_header(path))
        except ModelError as error:
            found.append(Finding(Level.FAULT, "weights", str(error), again))
    if not headers:
        return None, {}, found
    where: dict[str, str] = {}
    for header in headers:
        for name in header.tensors:
            if name in where:
                text = f"the tensor {name} is in {where[name]} and in {header.file}"
                found.append(Finding(Level.FAULT, "weights", text, "keep the files of one copy of the model alone"))
            where[name] = header.file
    if (folder / INDEX).is_file():
        found += _index(folder / INDEX, where, again)
    elif len(headers) > 1:
        found.append(Finding(Level.FAULT, "weights", f"there are {len(headers)} shards and no {INDEX}", "fetch it"))
    tensors = {name: each for header in headers for name, each in header.tensors.items()}
    dtypes: dict[str, int] = {}
    for each in tensors.values():
        dtypes[each.dtype] = dtypes.get(each.dtype, 0) + each.elements
    facts = WeightFacts(
        files=tuple(header.file for header in headers),
        file_bytes=sum(header.file_bytes for header in headers),
        tensors=len(tensors),
        parameters=sum(each.elements for each in tensors.values()),
        dtypes=dtypes,
        tied=definition.shape.tie_word_embeddings if definition else False,
    )
    return facts, tensors, found


def _index(path: Path, where: dict[str, str], again: str) -> Iterator[Finding]:
    try:
        index = read_index(path)
    except ModelError as error:
        yield Finding(Level.FAULT, "weights", str(error), again)
        return
    if gone := sorted(set(index.values()) - {each.name for each in path.parent.glob("*.safetensors")}):
        yield Finding(Level.FAULT, "weights", f"{INDEX} names {gone[0]}, which is not there", again)
    elif missing := sorted(name for name, file in index.items() if where.get(name) != file):
        text = f"{INDEX} says that {missing[0]} is in {index[missing[0]]}, and it is not ({len(missing)} such tensors)"
        yield Finding(Level.FAULT, "weights", text, again)
    if more := sorted(set(where) - set(index)):
        text = f"{INDEX} does not name {more[0]} ({len(more)} such tensors), so it would not be loaded"
        yield Finding(Level.WARNING, "weights", text, "take the index that belongs to these files")


def _card(folder: Path, facts: Facts) -> tuple[str | None, tuple[str, ...], list[Finding]]:
    part = "meta information"
    give = "name the licence by --licence, as it was agreed on"
    if not (folder / CARD).is_file():
        return None, (), [Finding(Level.WARNING, part, f"there is no card ({CARD}), so no licence is said", give)]
    try:
        itself, *rest = read_card(folder, folder.resolve().name, facts)
    except ModelError as error:
        return None, (), [Finding(Level.WARNING, part, str(error), give)]
    found = [] if itself.licence else [Finding(Level.WARNING, part, "its card names no licence", give)]
    for file, shown in contradictions(folder, itself.name, (itself, *rest), facts) if itself.licence else ():
        what = f"its {file} is of {shown.licence}" if shown.name == itself.name else f"its {file} names {shown.name}"
        text = f"{what}, and its card says {itself.licence}: the terms of {shown.licence} are kept too"
        found.append(Finding(Level.WARNING, part, text, "ask its publisher which licence holds"))
    return itself.licence, tuple(f"{each.kind} {each.name}" for each in rest), found


def _unsafe(folder: Path, has_safetensors: bool) -> Iterator[Finding]:
    """Pickles, which run code when they are loaded, and code as such."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles and has_safetensors:
        yield Finding(Level.NOTE, "pickles", f"{', '.join(pickles)} would run code when loaded; they are left behind")
    elif pickles:
        text = f"the weights are pickled ({pickles[0]}), and loading a pickle runs whatever code it names"
        try:
            convertible = bool(pickled_weights(folder))
        except ModelError:
            convertible = False
        fix = "add it with --convert: a sandboxed process makes safetensors of them"
        other = "only pytorch_model*.bin with all its shards is converted; take the model as safetensors"
        yield Finding(Level.REFUSED, "pickles", text, fix if convertible else other)
    elif not has_safetensors and not list(folder.glob("*.safetensors")):
        yield Finding(Level.FAULT, "weights", "there are no *.safetensors", "fetch the whole folder again")
    if carried := remote_code.carried(folder):
        if found := remote_code.needed(folder):
            text = f"it can only be loaded by running its own code ({found}; {', '.join(carried)})"
            yield Finding(Level.REFUSED, "remote code", text, "it is never run: take a family that transformers has")
        else:
            text = f"{', '.join(carried)}: never run and left behind; transformers has the family of its own"
            yield Finding(Level.NOTE, "remote code", text)
