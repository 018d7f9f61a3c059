"""What is asked of a set: which files, by which rules, for which tokenizer; and the digest of all that.

The same request has the same digest wherever and whenever it is made, so that its answer is found and not made again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster import records
from cluster.records import Record
from jobs.chat import Overlong
from jobs.config import DataConfig, DataLicence
from jobs.data.markers import Words, load_words
from jobs.data.rules import Rules

FORMAT = 2
"""Raised whenever the same request would have another answer: what was prepared before is then left alone."""

Split = Literal["evaluation", "rows"]
"""What a file is for; `rows` are trained on."""


class Source(Record):
    """A file of the request. `licence` is None where nobody said."""

    name: str
    split: Split
    size: int
    sha256: str
    licence: str | None = None
    teachers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """How rows become tokens: the tokenizer's files, and what a recipe says of length."""

    model: str
    files: Mapping[str, bytes]
    sequence_length: int
    overlong: Overlong

    @classmethod
    def of(cls, model: str, folder: Path, data: DataConfig) -> "Template":
        """Of a model's folder."""
        from jobs.dataset import TOKENIZER_FILES

        files = {
            name: (folder / name).read_bytes() for name in (*TOKENIZER_FILES, "config.json") if (folder / name).exists()
        }
        return cls(model, files, data.sequence_length, data.overlong)

    @property
    def described(self) -> list[object]:
        files = [(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(self.files.items())]
        return [files, self.sequence_length, self.overlong]


@dataclass(frozen=True)
class Request:
    """Two requests are equal when their digests are, so that a worker keeps what it has loaded for one.

    `sources` have the evaluation files first: of two rows that say the same, the earlier one stays.
    """

    digest: str
    rules: Rules = field(compare=False)
    sources: tuple[Source, ...] = field(compare=False)
    template: Template | None = field(compare=False)
    words: Words = field(compare=False)

    @property
    def rules_digest(self) -> str:
        return hashlib.sha256(self.rules.model_dump_json().encode()).hexdigest()


Files = Sequence[tuple[str, Path]]


def make_request(
    train: Files,
    evaluation: Files,
    rules: Rules,
    template: Template | None = None,
    licences: Mapping[str, DataLicence] | None = None,
) -> tuple[Request, list[Path]]:
    """The request, and where each of its sources is on this machine. Reads every file once, for its digest.

    Args:
        train, evaluation: (name, path) of each file.
        licences: what was said of a source, by its name.
    """
    given = [*_with("evaluation", evaluation), *_with("rows", train)]
    sources = []
    for split, name, path in given:
        file = records.describe_file(path, name)
        said = (licences or {}).get(name)
        sources.append(
            Source(
                name=name,
                split=split,
                size=file.size,
                sha256=file.sha256,
                licence=said.licence if said else None,
                teachers=said.teachers if said else (),
            )
        )
    words = _words(rules)
    described = {
        "format": FORMAT,
        "rules": rules.model_dump(mode="json"),
        "sources": [source.model_dump(mode="json") for source in sources],
        "template": template.described if template else None,
        "words": words.model_dump(mode="json"),
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:40]
    return Request(digest, rules, tuple(sources), template, words), [path for _, _, path in given]


def _words(rules: Rules) -> Words:
    """The lists of what is looked for, and of nothing else: a list that is not used decides nothing."""
    if rules.toxicity.do == rules.injection.do == "off":
        return Words()
    listed = load_words()
    return Words(
        toxicity=() if rules.toxicity.do == "off" else (*listed.toxicity, *rules.toxicity.words),
        injection=() if rules.injection.do == "off" else (*listed.injection, *rules.injection.words),
        harmless=listed.harmless,
    )


def _with(split: Split, files: Files) -> Iterable[tuple[Split, str, Path]]:
    return ((split, name, path) for name, path in files)
