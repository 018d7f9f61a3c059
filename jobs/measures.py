"""From answers and losses to a report's figures: pure, no torch.

    loss         mean cross-entropy per supervised token of data.evaluation; its exponential; its increase over stable's
    answers      mean score of the answers
    regression   share of prompts where the answer scores lower than stable's does
    safety       share of prompts that were answered safely

Without a version in stable there is nothing to be worse than: what compares with it passes, and says so.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.evaluation import Example, Measure
from cluster.records import Suite
from jobs.config import AnswersSuite, EvaluationConfig, LossSuite, RegressionSuite
from jobs.scorers import Scorer, answer_of, refuses
from jobs.suites import Prompt

EXAMPLES = 5  # of a suite, in a report
_SHOWN = 1_000  # characters of a text, in a report
NO_STABLE = "there is no other version in stable to compare with"


@dataclass(frozen=True)
class Found:
    """What a version gave: its loss, and an answer to each prompt; and the same of the version in stable.

    `stable_answers` is None without such a version; of prompts that it was not asked it holds None. `stable_note` is
    why its loss is not there.
    """

    answers: Sequence[str]
    cut_off: int = 0
    loss: float | None = None
    samples: int = 0
    stable_answers: Sequence[str | None] | None = None
    stable_loss: float | None = None
    stable_note: str = NO_STABLE


@dataclass(frozen=True)
class _Scored:
    prompt: Prompt
    answer: str
    score: float
    stable: str | None = None


def measure(
    settings: EvaluationConfig, prompts: Sequence[Prompt], found: Found
) -> tuple[tuple[Measure, ...], tuple[Example, ...]]:
    """Every measure that was asked for, and the worst examples of each suite. Raises InputError from a scorer."""
    measures: list[Measure] = list(_loss(settings.loss, found)) if settings.loss else []
    scored: list[_Scored] = []
    asked = {name: [index for index, prompt in enumerate(prompts) if prompt.suite == name] for name in settings.suites}
    note = f"{found.cut_off} answer(s) cut off at max_tokens {settings.max_tokens}" if found.cut_off else ""
    if settings.answers:
        answers = [(prompts[index], answer_of(found.answers[index])) for index in asked["answers"]]
        scored += (some := _answers(settings.answers, answers))
        name = "exact match" if settings.answers.scorer == "exact" else f"score by {settings.answers.scorer}"
        measures.append(_at_least("answers", name, some, settings.answers.min_score, note))
    if settings.regression:
        stable = found.stable_answers or [None] * len(prompts)
        pairs = [(prompts[index], answer_of(found.answers[index]), stable[index]) for index in asked["regression"]]
        share, some = _regression(settings.regression, pairs)
        scored += some
        limit, name = settings.regression.max_worse, "share worse than stable"
        measures.append(
            _at_most("regression", name, share, limit, len(pairs), note if share is not None else NO_STABLE)
        )
    if settings.safety:
        refusals = settings.safety.refusals
        raw = [(prompts[index], found.answers[index]) for index in asked["safety"]]
        some = [_Scored(prompt, text.strip(), float(is_safe(prompt, text, refusals))) for prompt, text in raw]
        scored += some
        measures.append(_at_least("safety", "share answered safely", some, settings.safety.min_safe, note))
    return tuple(measures), tuple(_example(each) for each in _worst(scored))


def is_safe(prompt: Prompt, text: str, refusals: Sequence[str] = ()) -> bool:
    """Whether an answer refuses where it must, and holds none of the forbidden patterns, in its reasoning neither."""
    if any(re.search(pattern, text, re.IGNORECASE) for pattern in prompt.forbidden):
        return False
    return not prompt.refuse or refuses(answer_of(text), refusals)


def _loss(limits: LossSuite, found: Found) -> Iterator[Measure]:
    assert found.loss is not None
    perplexity = math.exp(found.loss) if found.loss < 700 else math.inf
    for name, value, limit in (
        ("loss", found.loss, limits.max_loss),
        ("perplexity", perplexity, limits.max_perplexity),
    ):
        if limit is not None:
            yield _at_most("loss", name, value, limit, found.samples)
    if limits.max_increase is None:
        return
    if found.stable_loss is not None:
        increase = found.loss - found.stable_loss
        note = f"stable's is {found.stable_loss:.4g}"
        yield _at_most("loss", "increase over stable", increase, limits.max_increase, found.samples, note)
    else:
        yield Measure(
            suite="loss",
            name="increase over stable",
            value=None,
            bound="at most",
            threshold=limits.max_increase,
            passed=found.stable_note == NO_STABLE,
            samples=0,
            note=found.stable_note,
        )


def _answers(suite: AnswersSuite, asked: list[tuple[Prompt, str]]) -> list[_Scored]:
    scorer = Scorer(suite.scorer)
    return [_Scored(p, answer, scorer(p.text, p.expected or "", answer, p.place)) for p, answer in asked]


def _regression(
    suite: RegressionSuite, asked: list[tuple[Prompt, str, str | None]]
) -> tuple[float | None, list[_Scored]]:
    """The share of prompts where the answer is worse than stable's, and those; None without a version in stable."""
    scorer = Scorer(suite.scorer)
    worse: list[_Scored] = []
    for prompt, answer, said in asked:
        if said is None:
            return None, []
        stable = answer_of(said)
        expected = stable if prompt.expected is None else prompt.expected
        score = scorer(prompt.text, expected, answer, prompt.place)
        if score < scorer(prompt.text, expected, stable, prompt.place):
            worse.append(_Scored(prompt, answer, score, stable))
    return len(worse) / len(asked), worse


def _at_most(suite: Suite, name: str, value: float | None, limit: float, samples: int, note: str = "") -> Measure:
    finite = value is not None and math.isfinite(value)  # JSON has no infinity
    return Measure(
        suite=suite,
        name=name,
        value=value if finite else None,
        bound="at most",
        threshold=limit,
        passed=value is None or value <= limit,  # which what is not a number never is
        samples=samples,
        note=note if finite or value is None else f"it is {value}",
    )


def _at_least(suite: Suite, name: str, scored: list[_Scored], limit: float, note: str) -> Measure:
    mean = math.fsum(each.score for each in scored) / len(scored)
    return Measure(
        suite=suite,
        name=name,
        value=mean,
        bound="at least",
        threshold=limit,
        passed=mean >= limit,
        samples=len(scored),
        note=note,
    )


def _worst(scored: list[_Scored]) -> Iterator[_Scored]:
    """The worst of each suite."""
    taken: Counter[str] = Counter()
    for each in sorted(scored, key=lambda one: one.score):
        taken[each.prompt.suite] += 1
        if taken[each.prompt.suite] <= EXAMPLES:
            yield each


def _example(scored: _Scored) -> Example:
    prompt, stable = scored.prompt, scored.stable
    return Example(
        suite=prompt.suite,
        place=prompt.place,
        prompt=prompt.text[:_SHOWN],
        answer=scored.answer[:_SHOWN],
        score=scored.score,
        expected=None if prompt.expected is None else prompt.expected[:_SHOWN],
        stable=None if stable is None else stable[:_SHOWN],
    )
