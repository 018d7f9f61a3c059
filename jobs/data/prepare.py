"""A set checked and prepared, from its files to its card.

    1  parts   each examined by a Ray task, which writes what it found (stage.py); what an earlier attempt wrote stays
    2  whole   a small table of all rows on the driver: duplicates, leakage, balance
    3  rows    Ray tasks write the rows that stay, a file for each part
    4  card    written last: the set is there when its card is

Only a few parts are in memory at a time, here and in the tasks, whatever the size of the set.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from cluster import __version__, keys, records
from cluster.errors import DataError, ObjectExists, ObjectNotFound
from cluster.logs import say
from cluster.records import FileRecord
from cluster.store import Store
from jobs.data import balance, similar, stage, whole
from jobs.data.card import SHOWN, Card, Found, most, statistics
from jobs.data.examine import CHECKS, Check, Outcome
from jobs.data.parts import read_parts
from jobs.data.progress import Progress
from jobs.data.request import FORMAT, Request
from jobs.data.rules import SOURCE
from jobs.data.stage import RowExample
from jobs.data.table import Table, gather
from jobs.tasks import bounded

LIBRARIES = ("ftfy", "py3langid", "phonenumbers", "python-stdnum", "detect-secrets", "transformers")
NAMED = 5
"""Refused rows that an error names."""

Tell = Callable[[str], None]
Take = npt.NDArray[np.uint16]


def answered(request: Request, store: Store, with_rows: bool) -> Card | None:
    """The card of the same request made before; one of a check will do where no rows are wanted."""
    for key in (keys.prepared_card(request.digest), *([] if with_rows else [keys.prepared_check(request.digest)])):
        with suppress(ObjectNotFound):
            return records.read(store, key, Card)
    return None


def check(request: Request, paths: Sequence[Path], store: Store, tell: Tell = say) -> Card:
    """What is to be found in the set, and what would become of it; no rows are written.

    What was examined is kept in the store, for `prepare` to go on from. Raises DataError for a file that is unreadable.
    """
    if card := answered(request, store, with_rows=False):
        return card
    card, _, _ = _examined(request, paths, store, tell)
    with suppress(ObjectExists):
        store.create(keys.prepared_check(request.digest), card.to_bytes())
    return card


def prepare(request: Request, paths: Sequence[Path], store: Store, tell: Tell = say) -> Card:
    """The prepared set, made unless the store has it.

    Raises:
        DataError: a file cannot be read, a rule refuses a row, or no row is left.
    """
    if card := answered(request, store, with_rows=True):
        return card
    began = time.monotonic()
    card, table, take = _examined(request, paths, store, tell)
    refuse(card, store)
    written = _write(request, table, take, store)
    files = {split: tuple(file for file in written if file.file.startswith(split)) for split in ("rows", "evaluation")}
    card = card.model_copy(
        update={
            "files": files["rows"],
            "evaluation_files": files["evaluation"],
            "seconds": round(time.monotonic() - began, 1),
            "created_at": records.now(),
        }
    )
    with suppress(ObjectExists):  # another job prepared the same set meanwhile
        store.create(keys.prepared_card(request.digest), card.to_bytes())
    for item in list(store.list(keys.prepared_parts_prefix(request.digest))):
        store.delete(item.key)
    store.delete(keys.prepared_check(request.digest))
    return card


def _examined(request: Request, paths: Sequence[Path], store: Store, tell: Tell) -> tuple[Card, Table, Take]:
    """Stages 1 and 2: the card without files, the table, and how often each row is taken."""
    began = time.monotonic()
    parts = _examine(request, paths, store, tell)
    table = gather(
        (stage.read_part(store.get(keys.prepared_part(request.digest, n))) for n in range(parts)), request.sources
    )
    before = (~table.is_evaluation).astype(np.uint16)
    found = _found(table)
    _find_twins(table, request, store, found)
    take, weights = _taken(table, request)
    warnings = _warnings(table, request, take)
    has_tokens = request.template is not None
    card = Card(
        digest=request.digest,
        rules=request.rules.model_dump(mode="json"),
        rules_digest=request.rules_digest,
        sources=request.sources,
        model=request.template.model if request.template else None,
        sequence_length=request.template.sequence_length if request.template else None,
        before=statistics(table, before, has_tokens, as_read=True),
        after=statistics(table, np.where(table.is_evaluation, 0, take), has_tokens),
        evaluation=statistics(table, np.where(table.is_evaluation, take, 0), has_tokens)
        if table.is_evaluation.any()
        else None,
        found=found,
        weights=weights,
        warnings=warnings,
        versions={"luthier": __version__, "format": str(FORMAT)} | {name: version(name) for name in LIBRARIES},
        seconds=round(time.monotonic() - began, 1),
        created_at=records.now(),
    )
    return card, table, take


def _examine(request: Request, paths: Sequence[Path], store: Store, tell: Tell) -> int:
    """Stage 1; how many parts there are."""
    prefix, ending = keys.prepared_parts_prefix(request.digest), ".arrow"
    there = {item.key for item in store.list(prefix) if item.key.endswith(ending)}
    progress = Progress(sum(source.size for source in request.sources), tell)
    shipped = ray.put(request)
    task = ray.remote(num_cpus=1, max_retries=3)(stage.examine_part)
    parts = 0

    def calls() -> Iterator[tuple[Any, int]]:
        nonlocal parts
        before = 0
        for part in read_parts(request.sources, paths, request.rules.rows_per_part):
            parts += 1
            if keys.prepared_part(request.digest, part.index) in there:
                progress.skip(part.bytes_before - before)
            else:
                yield task.remote(shipped, part, store), part.bytes_before
            before = part.bytes_before

    if there:
        tell(f"data: {len(there):,} parts were examined before, and are not again")
    for rows, bytes_done in bounded(calls()):
        progress.done(rows, bytes_done)
    tell(f"data: examined {progress.end()}")
    return parts


def _found(table: Table) -> dict[Check, Found]:
    """What the parts' reports say together."""
    counts: dict[Check, Counter[Outcome]] = defaultdict(Counter)
    details: dict[Check, Counter[str]] = defaultdict(Counter)
    examples: dict[Check, dict[Outcome, list[RowExample]]] = defaultdict(lambda: defaultdict(list))
    for report in table.reports:
        for check_, found in report.counts.items():
            counts[check_].update(found)
            details[check_].update(report.details[check_])
            for outcome, rows in report.examples[check_].items():
                examples[check_][outcome] += rows[: SHOWN - len(examples[check_][outcome])]
    return {
        check_: Found(
            counts=dict(counts[check_]),
            details=most(dict(details[check_])),
            examples={outcome: tuple(rows) for outcome, rows in examples[check_].items()},
        )
        for check_ in CHECKS
        if check_ in counts
    }


def _find_twins(table: Table, request: Request, store: Store, found: dict[Check, Found]) -> None:
    """Duplicates and leakage, exact ones first, added to what was found."""
    rules = request.rules
    for kind in ("exact", "near"):
        if getattr(rules.duplicates, kind) == getattr(rules.leakage, kind) == "off":
            continue
        exact = kind == "exact"
        pairs = (
            whole.exact(table) if exact else similar.pairs(table, request.digest, rules.duplicates.similarity, store)
        )
        counts: dict[Check, Counter[Outcome]] = defaultdict(Counter)
        examples: dict[Check, dict[Outcome, list[RowExample]]] = defaultdict(lambda: defaultdict(list))
        for twin in whole.judge(table, pairs, rules, kind):
            counts[twin.check][twin.outcome] += 1
            shown = examples[twin.check][twin.outcome]
            if len(shown) < SHOWN:
                alike = "says the same as" if exact else f"{twin.similarity:.0%} like"
                shown.append(RowExample(place=table.place(twin.index), note=f"{alike} {table.place(twin.of)}"))
        for check_ in counts:
            found[check_] = Found(
                counts=dict(counts[check_]),
                details={check_: counts[check_].total()},
                examples={outcome: tuple(rows) for outcome, rows in examples[check_].items()},
            )


def _taken(table: Table, request: Request) -> tuple[Take, dict[str, float]]:
    """How often each row is taken, and how often a row of each group is on average."""
    rule = request.rules.balance
    trained = whole.alive(table) & ~table.is_evaluation
    codes = table.source.astype(np.int64) if rule.by == SOURCE else table.group.astype(np.int64)
    names = [source.name for source in request.sources] if rule.by == SOURCE else table.groups
    counts = np.bincount(codes[trained], minlength=len(names))
    weights = balance.weights({name: int(n) for name, n in zip(names, counts, strict=True) if n}, rule)
    by_code = np.array([weights.get(name, 0.0) for name in names])
    take = balance.copies(np.where(trained, by_code[codes], 0.0), rule.seed)
    take[whole.alive(table) & table.is_evaluation] = 1
    return take, weights


def _warnings(table: Table, request: Request, take: Take) -> tuple[str, ...]:
    found = []
    told = {(report.source, teacher) for report in table.reports for teacher in report.teachers}
    for number, teacher in sorted(told):
        source = request.sources[number]
        if teacher not in source.teachers:
            found.append(
                f"{source.name} has rows by the model {teacher}, which data.licences does not name as a teacher"
            )
    rule = request.rules.balance
    codes = table.source if rule.by == SOURCE else table.group
    sums = np.bincount(codes, np.where(table.is_evaluation, 0, take))
    counts = sums[sums > 0]
    if len(counts) > 1 and counts.max() > rule.warn_above * counts.min():
        ratio = counts.max() / counts.min()
        found.append(f"the largest group by {rule.by} has {ratio:,.0f} times the rows of the smallest")
    return tuple(found)


def refuse(card: Card, store: Store) -> None:
    """Raise DataError where a rule refuses a row, or nothing is left."""
    refused = [
        f"\n  {example.place}: {check_}: {example}"
        for check_, found in card.found.items()
        for example in found.examples.get("refused", ())
    ]
    if refused:
        # A check keeps fewer examples than it counts.
        left = card.refused - len(refused[:NAMED])
        more = f"\n  and {left:,} more" if left else ""
        raise DataError(
            f"{card.refused:,} of {card.before.rows:,} rows are refused by data.rules; mend them, or write warn or "
            f"remove there instead of refuse:{''.join(refused[:NAMED])}{more}"
        )
    if not card.after.rows:
        raise DataError(
            f"no row is left to train on: {card.removed:,} of {card.before.rows:,} rows are removed; "
            f"`luthier jobs data check` says why ({store.url})"
        )


def _write(request: Request, table: Table, take: Take, store: Store) -> list[FileRecord]:
    """Stage 3: the files of the prepared set, in the order of the parts."""
    task = ray.remote(num_cpus=1, max_retries=3)(stage.write_rows)
    # Rows that their own checks took out are not in a part's rows; those that the whole took out are.
    lines = whole.has_line(table)

    def calls() -> Iterator[tuple[Any, int]]:
        for index, (start, end) in enumerate(zip(table.starts[:-1], table.starts[1:], strict=True)):
            split = request.sources[table.reports[index].source].split
            yield task.remote(request.digest, index, split, take[start:end][lines[start:end]], store), index

    written = {index: result for result, index in bounded(calls())}
    return [written[index][0] for index in sorted(written) if written[index]]
