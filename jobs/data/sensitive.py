"""Personal data, secrets and markers of a row, by the rules; and texts that may be shown.

What is found is counted by kind. A value itself goes nowhere: not into a card, not into a log.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from jobs.data import embedded, markers, personal
from jobs.data.hits import Hit
from jobs.data.numbers import REGIONS
from jobs.data.replace import Replacer
from jobs.data.rules import Rules

SHOWN_CHARACTERS = 80
_MASK = Replacer("mask", 0)


class Sensitive:
    """The rules for what is personal, secret or marked, ready to be used on texts."""

    def __init__(self, rules: Rules, words: markers.Words) -> None:
        self._words = words
        self._languages = rules.personal.languages
        self._regions = rules.personal.regions or REGIONS
        kinds = rules.personal.kinds if rules.personal.do != "off" else ()
        self._kinds: tuple[str, ...] = (*kinds, *(["secret"] if rules.secrets.do != "off" else []))
        self._replacers: dict[str, Replacer] = {}
        for rule, of in ((rules.personal, kinds), (rules.secrets, ("secret",))):
            if rule.do in ("mask", "replace"):
                self._replacers |= dict.fromkeys(of, Replacer(rule.do, rule.seed))

    @property
    def is_on(self) -> bool:
        return bool(self._kinds)

    def mask(self, text: str) -> tuple[str, Counter[str]]:
        """The text with what is to be masked or replaced, and how often each kind was found."""
        hits = self._find(text)
        if not hits:
            return text, Counter()
        kinds = Counter(hit.kind for hit in hits)
        hits = [hit for hit in hits if hit.kind in self._replacers]
        if hits and embedded.is_json(text):
            return embedded.replaced(text, hits, self._stand_in), kinds
        parts, done = [], 0
        for hit in hits:
            parts += [text[done : hit.start], self._stand_in(hit)]
            done = hit.end
        return "".join([*parts, text[done:]]), kinds

    def mask_number(self, number: int, key: str) -> tuple[int | str, Counter[str]]:
        """As `mask`, of a number; the name of its field tells an order's from a telephone's."""
        start = len(key) + 2
        hits = [hit for hit in self._find(f"{key.replace('_', ' ')}: {number}") if hit.end > start]
        masked: int | str = number
        for hit in hits[:1]:
            if hit.kind in self._replacers:
                masked = self._stand_in(hit)
        return masked, Counter(hit.kind for hit in hits)

    def names(self, columns: Iterable[str]) -> Counter[str]:
        """What is found in names of columns."""
        return Counter(hit.kind for column in columns for hit in self._find(column))

    def safe(self, told: str) -> str:
        """What is to be told of a row, with everything personal masked: all kinds, and those of the rules."""
        kinds = {*personal.KINDS, *self._kinds}
        return _MASK.apply(told, personal.find(told, kinds, self._languages, self._regions))

    def _find(self, text: str) -> list[Hit]:
        return personal.find(text, self._kinds, self._languages, self._regions)

    def _stand_in(self, hit: Hit) -> str:
        return self._replacers[hit.kind].stand_in(hit)

    def markers(self, text: str) -> dict[Literal["toxicity", "injection"], list[str]]:
        """The marked words of each list that are in the text."""
        found: dict[Literal["toxicity", "injection"], list[str]] = {}
        if self._words.toxicity or self._words.injection:
            hits: list[Hit] = markers.find(text, self._words)
            for kind in ("toxicity", "injection"):
                if values := list(dict.fromkeys(hit.value.lower() for hit in hits if hit.kind == kind)):
                    found[kind] = values
        return found


def excerpt(text: str, at: int = 0) -> str:
    """A few words of a text from a place on, on one line, with everything personal masked."""
    masked = _MASK.apply(text, personal.find(text))
    start = max(0, at - SHOWN_CHARACTERS // 4)
    shown = " ".join(masked[start : start + SHOWN_CHARACTERS].split())
    before, after = "…" if start else "", "…" if len(masked) > start + SHOWN_CHARACTERS else ""
    return f"{before}{shown}{after}"


def excerpt_of_change(before: str, after: str) -> str:
    """Where a text was first put right, as it is now: what it was might hide a value from what looks for values."""
    masked = _MASK.apply(after, personal.find(after))
    pairs = enumerate(zip(before, masked, strict=False))
    return excerpt(after, next((n for n, (one, other) in pairs if one != other), 0))
