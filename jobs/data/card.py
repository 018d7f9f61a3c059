"""A data card: what a set was before and after, what was found and done, with examples, and under which licences.

It is the commit of a prepared set. Of personal data it has the kind and the place, never the value.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.records import FileRecord, Record
from jobs.data.examine import CHECKS, Check, Outcome
from jobs.data.request import Source
from jobs.data.stage import RowExample
from jobs.data.table import Table

SHOWN = 5
"""Examples of each check and outcome."""
MOST_GROUPS = 50
"""Groups, languages and details that a card names; the rest is summed up as `others`."""


class Spread(Record):
    """How a length is spread over rows."""

    total: int
    median: int
    p95: int
    longest: int


class Statistics(Record):
    """A set in figures. `tokens` is None where no tokenizer was at hand; a row taken twice counts twice."""

    rows: int
    characters: Spread | None
    tokens: Spread | None
    languages: dict[str, int]
    sources: dict[str, int]
    groups: dict[str, int]
    synthetic: int


class Found(Record):
    """What one check found, by outcome; `details` says of what kind, and how often."""

    counts: dict[Outcome, int]
    details: dict[str, int]
    examples: dict[Outcome, tuple[RowExample, ...]]


class Card(Record):
    """One set, checked or prepared. `files` are those to train on, `evaluation_files` those to measure on; a check
    that was not asked for rows has none. `weights` is how often a row of each group was taken, on average."""

    digest: str
    rules: dict[str, Any]
    rules_digest: str
    sources: tuple[Source, ...]
    model: str | None
    sequence_length: int | None
    before: Statistics
    after: Statistics
    evaluation: Statistics | None
    found: dict[Check, Found]
    weights: dict[str, float]
    warnings: tuple[str, ...]
    files: tuple[FileRecord, ...] = ()
    evaluation_files: tuple[FileRecord, ...] = ()
    versions: dict[str, str]
    seconds: float
    created_at: str

    @property
    def refused(self) -> int:
        return sum(found.counts.get("refused", 0) for found in self.found.values())

    @property
    def removed(self) -> int:
        return sum(found.counts.get("removed", 0) for found in self.found.values())


def statistics(table: Table, take: npt.NDArray[np.integer[Any]], has_tokens: bool, as_read: bool = False) -> Statistics:
    """Of a table's rows, each as often as `take` says.

    Args:
        take: [rows].
        as_read: characters are those before anything was put right. Tokens there are not: no row is rendered twice,
            and one that was given up has none.
    """
    characters = table.characters_before if as_read else table.characters
    has_tokens = has_tokens and bool(table.tokens[take > 0].any())
    rows = int(take.sum())
    return Statistics(
        rows=rows,
        characters=_spread(characters, take) if rows else None,
        tokens=_spread(table.tokens, take) if rows and has_tokens else None,
        languages=_counts(table.language, table.languages, take),
        sources=_counts(table.source, [source.name for source in table.sources], take),
        groups=_counts(table.group, table.groups, take),
        synthetic=int(take[table.synthetic].sum()),
    )


def _spread(lengths: npt.NDArray[np.uint32], take: npt.NDArray[np.integer[Any]]) -> Spread:
    order = np.argsort(lengths, kind="stable")
    upto = np.cumsum(take[order])
    median, p95 = (int(lengths[order[np.searchsorted(upto, share * upto[-1])]]) for share in (0.5, 0.95))
    used = take > 0
    return Spread(
        total=int((lengths.astype(np.int64) * take).sum()), median=median, p95=p95, longest=int(lengths[used].max())
    )


def _counts(
    codes: npt.NDArray[np.integer[Any]], names: Sequence[str], take: npt.NDArray[np.integer[Any]]
) -> dict[str, int]:
    """Rows by name, the most frequent first; "" is what has no name."""
    sums = np.bincount(codes, take, len(names))
    return most({name: int(count) for name, count in zip(names, sums, strict=True) if name and count})


def most(counts: dict[str, int]) -> dict[str, int]:
    """The most frequent ones, and the sum of all others."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[MOST_GROUPS:])
    return dict(ranked[:MOST_GROUPS]) | ({"others": rest} if rest else {})


def markdown(card: Card) -> str:
    """The card for people, as Markdown."""
    return "\n".join(_lines(card)) + "\n"


def _lines(card: Card) -> Iterator[str]:
    yield f"# Data card {card.digest[:12]}"
    yield ""
    yield f"Made {card.created_at} in {card.seconds:,.0f} s by rules {card.rules_digest[:12]}."
    if card.model:
        yield f"Tokens are those of {card.model}, at most {card.sequence_length:,} a row."
    for warning in card.warnings:
        yield f"**Warning:** {warning}."
    yield from [
        "",
        "## Sources",
        "",
        "| file | for | bytes | licence | made by models | sha256 |",
        "|---|---|---|---|---|---|",
    ]
    for source in card.sources:
        purpose = "training" if source.split == "rows" else "evaluation"
        licence = source.licence or "not known"
        teachers = ", ".join(source.teachers) or "-"
        yield f"| {_cell(source.name)} | {purpose} | {source.size:,} | {licence} | {teachers} | {source.sha256[:12]} |"
    yield from ["", "## Before and after", "", "| | before | after |", "|---|---|---|"]
    for name, before, after in _compared(card.before, card.after):
        yield f"| {name} | {before} | {after} |"
    if card.evaluation:
        yield f"\nEvaluation data: {card.evaluation.rows:,} rows after its own checks."
    yield from _balance(card)
    yield from ["", "## What was found", ""]
    if not card.found:
        yield "Nothing."
    for check in CHECKS:
        if check in card.found:
            yield from _check(check, card.found[check])
    if card.files:
        yield from ["", "## Files", "", "| file | bytes | sha256 |", "|---|---|---|"]
        for file in (*card.files, *card.evaluation_files):
            yield f"| {file.file} | {file.size:,} | {file.sha256} |"


def _compared(before: Statistics, after: Statistics) -> Iterator[tuple[str, str, str]]:
    yield "rows", f"{before.rows:,}", f"{after.rows:,}"
    for name in ("characters", "tokens"):
        for part in ("total", "median", "p95", "longest"):
            one, other = getattr(before, name), getattr(after, name)
            if one or other:
                values = [f"{getattr(spread, part):,}" if spread else "-" for spread in (one, other)]
                yield f"{name}, {part}", values[0], values[1]
    if before.synthetic:
        yield "synthetic rows", f"{before.synthetic:,}", f"{after.synthetic:,}"
    for what in ("languages", "sources", "groups"):
        ones, others = getattr(before, what), getattr(after, what)
        for name in ones:
            yield f"{what[:-1]} {_cell(name)}", f"{ones[name]:,}", f"{others.get(name, 0):,}"


def _balance(card: Card) -> Iterator[str]:
    if any(weight != 1 for weight in card.weights.values()):
        yield from ["", f"A row was taken, on average, so often by its {card.rules['balance']['by']}:", ""]
        for name, weight in card.weights.items():
            yield f"- {name}: {weight:.3g}"


def _check(check: Check, found: Found) -> Iterator[str]:
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in found.counts.items())
    yield f"### {check[0].upper()}{check[1:]}: {counts}"
    yield ""
    if list(found.details) != [check]:
        yield "; ".join(f"{detail} {count:,}" for detail, count in found.details.items())
        yield ""
    for outcome, examples in found.examples.items():
        for example in examples:
            yield f"- {outcome}: `{example.place}`: {example}"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
