"""Words of hate and insult, and the phrases by which a text tries to command the model that reads it.

The lists are configs/policy/markers.yaml, for anybody to edit. Words in Latin letters count whole and in any case, so
that `Scunthorpe` and `class` hold nothing; a `*` at a word's end takes its endings too, and between the words of a
phrase may stand any white space. What has Chinese characters counts wherever it stands, but not within a `harmless`
word.
"""

import re
from functools import lru_cache
from pathlib import Path

from cluster.config import Config, load
from jobs.data.hits import Hit, fold

MARKERS = Path(__file__).resolve().parents[2] / "configs" / "policy" / "markers.yaml"


class Words(Config):
    """The lists; a hit's kind is the name of its list."""

    toxicity: tuple[str, ...] = ()
    injection: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    """Longer words and phrases that hold one of the lists', and mean something else."""


Span = tuple[int, int]

KINDS = ("toxicity", "injection")

_LETTER = r"[0-9A-Za-z_\u00C0-\u024F]"
_GAP = r"[\s_-]+"
_HAN = re.compile(r"[\u3400-\u9fff]")


def load_words(path: Path = MARKERS) -> Words:
    """Raises ConfigError."""
    return load(path, Words)


def find(text: str, words: Words) -> list[Hit]:
    """All markers in order of place; of those of a list that overlap, the first and longest. What is on both lists
    counts twice."""
    plain = fold(text).lower().replace("\u2019", "'")
    if len(plain) != len(text):  # one of the few letters whose lower case is longer; then case counts
        plain = fold(text)
    hits: list[Hit] = []
    for kind, marks in zip(KINDS, _compiled(words), strict=True):
        spans = [found.span() for needle, pattern in marks if needle in plain for found in pattern.finditer(plain)]
        if spans:
            meant = [found.span() for pattern in _harmless(words) for found in pattern.finditer(plain)]
            hits += [Hit(start, end, kind, text[start:end]) for start, end in _outside(spans, meant)]
    return sorted(hits, key=lambda hit: (hit.start, hit.end, hit.kind))


def _outside(spans: list[Span], harmless: list[Span]) -> list[Span]:
    """Spans that lie within none of the harmless ones, without overlaps."""
    kept: list[Span] = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        within = any(first <= start and end <= last for first, last in harmless)
        if not within and (not kept or start >= kept[-1][1]):
            kept.append((start, end))
    return kept


@lru_cache(maxsize=8)
def _compiled(words: Words) -> tuple[list[tuple[str, re.Pattern[str]]], ...]:
    """For each list its marks, each with its longest word: that such a word is not in a text is known in 0.2 µs, where
    one expression of all marks took 1 ms."""
    return tuple(
        [(max(_parts(word), key=len), re.compile(_pattern(word))) for word in listed]
        for listed in (words.toxicity, words.injection)
    )


@lru_cache(maxsize=8)
def _harmless(words: Words) -> list[re.Pattern[str]]:
    return [re.compile(_pattern(word)) for word in words.harmless]


def _parts(word: str) -> list[str]:
    return word.lower().removesuffix("*").split()


def _pattern(word: str) -> str:
    parts = list(map(re.escape, _parts(word)))
    if _HAN.search(word):
        return r"\s*".join(parts)
    endings = f"{_LETTER}*" if word.endswith("*") else ""
    return rf"(?<!{_LETTER}){_GAP.join(parts)}{endings}(?!{_LETTER})"
