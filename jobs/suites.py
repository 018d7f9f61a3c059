"""The prompts that a version is evaluated by: from the files that a recipe names to what a run's record keeps.

    recipe's `evaluation`  ─▸  files, read and checked  ─▸  suites/<sha256>.jsonl in the store  ─▸  Requirement

What a version must show is decided before it is trained. The files are kept in the store, so that it can be evaluated
by the same ones from anywhere, at any time. No torch.

A row is `{"messages": [… the last one a user's], "expected": "…"}`; or `{"prompt": "…", "expected": "…"}`, which passes
no chat template, as a row of prompt and completion does not when it is trained on; or any row that could be trained
on, whose last answer is then expected. A row of a safety suite has `"refuse": true` or `"must_not_contain": [pattern]`.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster import records
from cluster.errors import DataError, ObjectExists, ObjectNotFound
from cluster.licences.facts import table_path
from cluster.models import cache_folder
from cluster.records import Requirement, Suite, SuiteFile
from cluster.store import Store
from jobs.config import EvaluationConfig
from jobs.formats import Example, Text, normalise
from jobs.rows import Row, Unusable, kind_of, locate, read_rows
from jobs.scorers import Scorer, source_digest

SHIPPED = Path("configs") / "policy" / "safety.jsonl"
_FAULTS_SHOWN = 5
_NOTHING = "-"  # stands where a row expects no answer, since a conversation ends with one


@dataclass(frozen=True)
class Prompt:
    """One question. `example` ends with an answer, which the model is not shown; `expected` is None where any may do.

    `refuse`: only a refusal is safe; `forbidden`: patterns that no safe answer holds.
    """

    suite: Suite
    place: str
    example: Example
    expected: str | None
    refuse: bool = False
    forbidden: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What is asked, for a scorer and for people: the text, or the last turn."""
        return self.example.prompt if isinstance(self.example, Text) else self.example.messages[-2].content


@dataclass(frozen=True)
class Suites:
    """The files of a recipe's evaluation, on this machine: (suite, source, path)."""

    settings: EvaluationConfig
    files: tuple[tuple[Suite, str, Path], ...]

    @classmethod
    def locate(cls, settings: EvaluationConfig, store: Store, base: Path) -> "Suites":
        """Find, read and check every file, and try every scorer on the first prompt. Raises DataError, InputError."""
        cache = cache_folder() / "data"
        found: list[tuple[Suite, str, Path]] = []
        for suite, sources in _sources(settings):
            found += [(suite, source, locate(source, store, cache, base)) for source in sources]
        if settings.safety and settings.safety.shipped:
            found.append(("safety", str(SHIPPED), table_path(SHIPPED)))
        suites = cls(settings, tuple(found))
        _try_scorers(settings, read(suites.files))
        return suites

    def require(self, store: Store, dataset: str | None) -> Requirement:
        """Keep the files in the store. Returns what a version must show.

        Args:
            dataset: digest of the tokenised data.evaluation, if the loss is asked for.
        """
        kept = []
        for suite, source, path in self.files:
            file = SuiteFile(suite=suite, source=source, sha256=records.describe_file(path, "").sha256)
            with suppress(ObjectExists):
                store.create(file.key, path.read_bytes())
            kept.append(file)
        return Requirement.of(
            suites=self.settings.suites,
            settings=self.settings.model_dump(mode="json"),
            compares=self.settings.compares,
            dataset=dataset if self.settings.loss else None,
            files=tuple(kept),
            scorers={name: source_digest(name) for name in self.settings.scorers},
        )


def fetch(requirement: Requirement, store: Store) -> list[Prompt]:
    """The prompts of a requirement, from the store. Raises DataError, StoreError."""
    folder = cache_folder() / "suites"
    folder.mkdir(parents=True, exist_ok=True)
    located: list[tuple[Suite, str, Path]] = []
    for file in requirement.files:
        path = folder / Path(file.key).name
        try:
            digest = store.download(file.key, path)
        except ObjectNotFound:
            raise DataError(
                f"{file.source}: {store.url} has no {file.key} any more; evaluate with a --recipe"
            ) from None
        if digest != file.sha256:
            raise DataError(f"{store.url}/{file.key} is not what it was when {file.source} was put there")
        located.append((file.suite, file.source, path))
    return read(located)


def read(files: Iterable[tuple[Suite, str, Path]]) -> list[Prompt]:
    """All prompts of these files. Raises DataError with the place of each row that cannot be used."""
    prompts: list[Prompt] = []
    faults: list[str] = []
    for suite, source, path in files:
        for place, row in read_rows(path, source):
            made = row if isinstance(row, Unusable) else _prompt(suite, str(place), row)
            if isinstance(made, Unusable):
                faults.append(f"{place}: {made.reason}")
            else:
                prompts.append(made)
    if faults:
        more = f"\n  and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise DataError("\n  ".join(["prompts that cannot be used:", *faults[:_FAULTS_SHOWN]]) + more)
    return prompts


def _sources(settings: EvaluationConfig) -> list[tuple[Suite, tuple[str, ...]]]:
    return [
        ("answers", settings.answers.prompts if settings.answers else ()),
        ("regression", settings.regression.prompts if settings.regression else ()),
        ("safety", settings.safety.prompts if settings.safety else ()),
    ]


def _prompt(suite: Suite, place: str, row: Row) -> Prompt | Unusable:
    found = _example(row)
    if isinstance(found, Unusable):
        return found
    example, expected = found
    if suite != "safety":
        if suite == "answers" and expected is None:
            return Unusable("no `expected`: say which answer is right")
        return Prompt(suite, place, example, expected)
    forbidden = row.get("must_not_contain", [])
    if not isinstance(forbidden, list) or not all(isinstance(each, str) and each for each in forbidden):
        return Unusable(f"must_not_contain: a list of patterns, not {kind_of(forbidden)}")
    if row.get("refuse", False) not in (True, False):
        return Unusable(f"refuse: true or false, not {kind_of(row['refuse'])}")
    if not forbidden and not row.get("refuse"):
        return Unusable('what is safe? write "refuse": true, or "must_not_contain": [patterns]')
    for pattern in forbidden:
        try:
            re.compile(pattern)
        except re.error as error:
            return Unusable(f"must_not_contain: {pattern!r} is no pattern: {error}")
    return Prompt(suite, place, example, expected, row.get("refuse") is True, tuple(map(str, forbidden)))


def _example(row: Row) -> tuple[Example, str | None] | Unusable:
    """The row as a question that ends with an answer, and the answer that it expects, if it does."""
    expected = row.get("expected")
    if expected is not None and not (isinstance(expected, str) and expected.strip()):
        return Unusable(f"expected: the right answer as text, not {kind_of(expected)}")
    turns = row.get("messages", row.get("prompt") if isinstance(row.get("prompt"), list) else None)
    ends_itself = isinstance(turns, list) and _is_answer(turns[-1:])
    is_question = "completion" not in row and not ends_itself
    if isinstance(turns, list) and is_question:
        answer = {"role": "assistant", "content": expected or _NOTHING}
        row = {"messages": [*turns, answer], "tools": row.get("tools")}
    elif isinstance(row.get("prompt"), str) and is_question:
        row = {"prompt": row["prompt"], "completion": expected or _NOTHING}
    elif expected is not None:
        return Unusable("has `expected`, and an answer of its own or no question: leave one out, or give messages")
    else:
        is_question = False
    made = normalise(row)
    if isinstance(made, Unusable):
        return made
    if isinstance(made, Text):
        answered, is_asked = made.completion, bool(made.prompt)
    else:
        answered, is_asked = made.messages[-1].content, True
    if not answered or not is_asked:
        return Unusable("a prompt and an answer in words are needed: no scorer here compares calls of tools")
    return made, expected if is_question else answered


def _is_answer(last: list[object]) -> bool:
    return bool(last) and isinstance(last[0], dict) and last[0].get("role") == "assistant"


def _try_scorers(settings: EvaluationConfig, prompts: list[Prompt]) -> None:
    """A scorer that cannot be imported or called is found before anything is spent."""
    for suite, name in (("answers", settings.answers), ("regression", settings.regression)):
        if name and name.scorer != "exact":
            first = next(prompt for prompt in prompts if prompt.suite == suite)
            expected = first.expected or first.text
            Scorer(name.scorer)(first.text, expected, expected, first.place)
