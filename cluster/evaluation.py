"""The evaluation gate: reports on adapter versions, and whether an alias may move to one.

    adapters/<name>/<version>/record.json            `gate`: what the version must show; written at its publication
    adapters/<name>/<version>/evaluations/<n>.json   what it showed, when; the newest of that requirement decides

Reports are made by jobs (it has torch); whether one suffices is decided here, where aliases move, so that no command
goes around it.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from cluster import keys, records
from cluster.errors import ObjectDamaged, ObjectExists, ObjectNotFound
from cluster.records import AdapterRecord, BaseModelRef, Record, Requirement, Suite
from cluster.store import Store


class Measure(Record):
    """One figure of a report beside its threshold; `value` is None where it could not be measured, as `note` says."""

    suite: Suite
    name: str
    value: float | None
    bound: Literal["at most", "at least"]
    threshold: float
    passed: bool
    samples: int
    note: str = ""

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        note = f" ({self.note})" if self.note else ""
        return f"{self.suite}: {self.name} is {value}, and {self.bound} {self.threshold:.4g} is required{note}"


class Example(Record):
    """One prompt of a suite and what became of it, worst first; `stable` is the answer of the version in stable."""

    suite: Suite
    place: str
    prompt: str
    answer: str
    score: float
    expected: str | None = None
    stable: str | None = None


class Against(Record):
    """The version that was in `stable` then, which this one was compared with."""

    version: int
    digest: str


class EvaluationReport(Record):
    """What a version showed. `adapter` is the digest of its files, `versions` those of the libraries that measured."""

    name: str
    version: int
    number: int
    adapter: str
    base: BaseModelRef
    requirement: Requirement
    passed: bool
    measures: tuple[Measure, ...]
    examples: tuple[Example, ...] = ()
    against: Against | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    by: str
    created_at: str

    def rows(self) -> list[dict[str, Any]]:
        """The measures, for a table."""
        return [
            {
                "suite": each.suite,
                "measure": each.name,
                "value": None if each.value is None else round(each.value, 4),
                "required": f"{each.bound} {each.threshold:.4g}",
                "samples": each.samples,
                "passed": "yes" if each.passed else "NO",
                "note": each.note,
            }
            for each in self.measures
        ]


ROW_COLUMNS = ("suite", "measure", "value", "required", "samples", "passed", "note")


def add(store: Store, report: EvaluationReport) -> EvaluationReport:
    """Write a report under the next free number, which the returned one has."""
    number = sum(1 for _ in store.list(keys.evaluations_prefix(report.name, report.version))) + 1
    while True:
        numbered = report.model_copy(update={"number": number})
        try:
            store.create(keys.evaluation(report.name, report.version, number), numbered.to_bytes())
            return numbered
        except ObjectExists:
            number += 1


def reports(store: Store, name: str, version: int) -> Iterator[EvaluationReport]:
    """All reports on a version, the newest first."""
    for key in sorted((item.key for item in store.list(keys.evaluations_prefix(name, version))), reverse=True):
        yield records.read(store, key, EvaluationReport)


def newest(store: Store, record: AdapterRecord) -> EvaluationReport | None:
    """The newest report on these very weights that counts: by the version's own requirement, where it has one."""
    for report in reports(store, record.name, record.version):
        counts = record.gate is None or report.requirement.digest == record.gate.digest
        if counts and report.adapter == record.digest:
            return report
    return None


def state(store: Store, record: AdapterRecord) -> str:
    """In a word or two, what the newest report that counts says; empty where none is there and none is required."""
    try:
        report = newest(store, record)
    except ObjectDamaged:
        return "damaged"
    if report is None:
        return "required" if record.gate else ""
    return f"{'passed' if report.passed else 'failed'} ({report.number})"


def refusals(
    store: Store, record: AdapterRecord, stable: int | None, report: EvaluationReport | None = None
) -> tuple[str, ...]:
    """Why no alias may move to a version now, reason by reason; empty when one may.

    Args:
        stable: the version that is in `stable` now; whoever follows it must show no less.
        report: what it is promoted by; taken for a requirement where the version has none of its own.
    """
    requirement = record.gate or (report.requirement if report else None)
    lowered = _lowered(requirement, store, record.name, stable) if stable not in (None, record.version) else ()
    if record.gate is None:
        return lowered
    try:
        report = newest(store, record)
    except ObjectDamaged as error:  # must not keep anybody from going back
        return (f"a report cannot be read: {error}",)
    return (*judge(report, record.version, record.gate, stable), *lowered)


def _lowered(requirement: Requirement | None, store: Store, name: str, stable: int) -> tuple[str, ...]:
    """What the version in `stable` had to show, and this one need not: otherwise a recipe that leaves its evaluation
    out would be the way around it. Prompts cannot be compared: another file of them is taken for as good."""
    try:
        before = records.read(store, keys.adapter_record(name, stable), AdapterRecord).gate
    except ObjectNotFound:
        return ()
    return tuple(f"version {stable} in stable had to show {each}" for each in _less(requirement, before))


def _less(ours: Requirement | None, theirs: Requirement | None) -> Iterator[str]:
    for suite in theirs.suites if theirs else ():
        if ours is None or suite not in ours.suites:
            yield f"{suite}, and this one need not"
            continue
        wanted, asked = (dict(each.settings.get(suite) or {}) for each in (theirs, ours) if each)
        for name, limit in wanted.items():
            sign = {"max": 1, "min": -1}.get(name.partition("_")[0])
            if sign is None or limit is None:
                continue
            mine = asked.get(name)
            if mine is None or sign * mine > sign * limit:
                yield f"{suite}.{name} of {limit}, and this one {'nothing of it' if mine is None else mine}"


def judge(
    report: EvaluationReport | None, version: int, requirement: Requirement, stable: int | None
) -> tuple[str, ...]:
    """As `refusals`, by the report that counts."""
    if report is None:
        return (f"it was not evaluated by what it must show ({', '.join(requirement.suites)})",)
    failed = tuple(str(measure) for measure in report.measures if not measure.passed)
    if failed or not report.passed:
        return failed or (f"its report {report.number} says that it failed",)
    if requirement.compares and stable not in (None, version):
        compared = report.against.version if report.against else None
        if compared != stable:
            before = f"version {compared}" if compared else "no version"
            return (f"its report {report.number} compares it with {before}, and version {stable} is in stable now",)
    return ()


def way_out(record: AdapterRecord, alias: str, url: str) -> str:
    """What one who is refused can do."""
    reference = f"{record.name}@{record.version}"
    return (
        f"`luthier jobs evaluate {reference} --store {url}` evaluates it; a version that {alias} has held before "
        f"can always be gone back to; `luthier cluster alias {record.name}@{alias} --version {record.version} "
        f'--override-gate --why "…" --store {url}` moves it all the same, and the log keeps who and why'
    )
