"""Every check that a row alone decides: put right, then looked at as what training would make of it.

    line → row → tidy → personal data → format → language → markers → template → digest

A row is given up at the first check that removes or refuses it; what was found until then is told all the same.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from jobs.chat import Renderer
from jobs.data.request import Request, Template
from jobs.data.rules import SOURCE, Language
from jobs.data.sensitive import Sensitive
from jobs.data.tidy import KINDS, tidy
from jobs.formats import Conversation, Example, normalise
from jobs.rows import Row, Unusable, parse_line

Check = Literal[
    "format",
    "template",
    "whitespace",
    "unicode",
    "html",
    "language",
    "personal",
    "secrets",
    "toxicity",
    "injection",
    "duplicates",
    "near duplicates",
    "leakage",
    "near leakage",
]
CHECKS: tuple[Check, ...] = get_args(Check)
KEPT = 0
"""What `Examined.why` and the table say of a row that stays; else 1 + the index of the check that took it out."""

Outcome = Literal["warned", "mended", "removed", "refused"]
OUTCOMES: dict[str, Outcome] = {
    "warn": "warned",
    "mend": "mended",
    "mask": "mended",
    "replace": "mended",
    "remove": "removed",
    "refuse": "refused",
}

STRUCTURE = frozenset({"role", "from", "type"})
"""Fields that hold no text of anybody."""


@dataclass(frozen=True)
class Finding:
    """What a check found in a row. `detail` is what it is counted by; `note` says it of this row; `now` is
    a text before and after it was put right."""

    check: Check
    outcome: Outcome
    detail: str
    note: str = ""
    now: tuple[str, str] | None = None


@dataclass
class Examined:
    """A row after all checks; `row` and `text` are empty where it was given up. `characters_before` are those of the
    row as it was read."""

    row: Row | None = None
    why: int = KEPT
    digest: bytes = bytes(16)
    text: str = ""
    characters_before: int = 0
    characters: int = 0
    tokens: int = 0
    language: str = ""
    group: str = ""
    synthetic: bool = False
    teacher: str = ""
    findings: list[Finding] = field(default_factory=list)

    def note(self, check: Check, do: str, detail: str, note: str = "", now: tuple[str, str] | None = None) -> bool:
        """Note a finding; whether the row stays."""
        outcome = OUTCOMES[do]
        self.findings.append(Finding(check, outcome, detail, note or detail, now))
        if outcome in ("removed", "refused"):
            self.why, self.row = CHECKS.index(check) + 1, None
        return self.row is not None


class Examiner:
    """The checks of one request, with all that they have to load."""

    def __init__(self, request: Request) -> None:
        self._rules = request.rules
        self._renderer = _renderer(request.template) if request.template else None
        self._sensitive = Sensitive(request.rules, request.words)
        self._language = _identifier() if request.rules.language.do != "off" else None

    def examine(self, raw: Row | Unusable | bytes) -> Examined:
        """One row, as it was read. What is told of it is masked: a reason may quote the row."""
        found = self._examined(raw)
        safe = self._sensitive.safe if self._sensitive.is_on else str
        found.findings = [replace(it, detail=safe(it.detail)[:120], note=safe(it.note)) for it in found.findings]
        found.group, found.teacher = safe(found.group)[:80], safe(found.teacher)
        return found

    def _examined(self, raw: Row | Unusable | bytes) -> Examined:
        row = parse_line(raw) if isinstance(raw, bytes) else raw
        found = Examined()
        if isinstance(row, Unusable):
            found.characters_before = len(raw.decode("utf-8", "replace")) if isinstance(raw, bytes) else 0
            found.note("format", self._rules.format, "no row", row.reason)
            return found
        found.characters_before = characters_in(row)
        found.synthetic = row.get("synthetic") is True
        if found.synthetic and isinstance(made := row.get("synthetic_by"), dict):
            found.teacher = str(made.get("teacher", ""))
        found.row = self._tidied(row, found)
        if not self._is_discreet(found):
            return found
        if self._rules.balance.by != SOURCE:
            found.group = str(found.row.get(self._rules.balance.by, ""))
        example = normalise(found.row)
        if isinstance(example, Unusable):
            found.note("format", self._rules.format, "no known format", example.reason)
            return found
        found.text = text_of(example)
        found.characters = len(found.text)
        if self._is_foreign(found) or self._is_marked(found) or not self._is_teachable(example, found):
            return found
        found.digest = digest_of(example)
        return found

    def _tidied(self, row: Row, found: Examined) -> Row:
        seen: dict[str, tuple[str, str]] = {}

        def mend(text: str, key: str) -> str:
            better, kinds = tidy(text, self._rules, key)
            for kind in kinds:
                seen.setdefault(kind, (text, better))
            return better

        tidied: Row = {key: _mapped(value, mend, key) for key, value in row.items()}
        for kind in KINDS:
            if kind in seen:
                found.note(kind, getattr(self._rules, kind), kind, now=seen[kind])
        return tidied

    def _is_discreet(self, found: Examined) -> bool:
        """Whether the row stays, its personal data and secrets masked or replaced where the rules say so."""
        if not self._sensitive.is_on:
            return True
        kinds: Counter[str] = Counter()
        first: dict[str, tuple[str, str]] = {}

        def mask(value: Any, key: str) -> Any:
            better, hits = (
                self._sensitive.mask(value) if isinstance(value, str) else self._sensitive.mask_number(value, key)
            )
            kinds.update(hits)
            for kind in hits:
                first.setdefault(kind, (str(value), str(better)))
            return better

        assert found.row is not None
        for kind, count in self._sensitive.names(found.row).items():
            check: Check = "secrets" if kind == "secret" else "personal"
            do = getattr(self._rules, check).do
            # One row's column cannot have another name than all others'.
            do = "refuse" if do in ("mask", "replace") else do
            if not found.note(check, do, kind, f"{kind} in the names of {count} columns: rename them"):
                return False
        found.row = {key: _masked(value, mask, key) for key, value in found.row.items()}
        for kind, count in kinds.items():
            check = "secrets" if kind == "secret" else "personal"
            times = f" {count} times" if count > 1 else ""
            if not found.note(check, getattr(self._rules, check).do, kind, f"{kind}{times}", first[kind]):
                return False
        return True

    def _is_marked(self, found: Examined) -> bool:
        """Whether the row is left out for a word or phrase in it."""
        for check, words in self._sensitive.markers(found.text).items():
            if not found.note(check, getattr(self._rules, check).do, words[0], ", ".join(words)):
                return True
        return False

    def _is_foreign(self, found: Examined) -> bool:
        """Whether the row is left out for its language."""
        rule = self._rules.language
        if self._language is None:
            return False
        found.language = language_of(found.text, rule, self._language)
        if found.language in ("", *rule.allowed):
            return False
        return not found.note("language", rule.do, found.language)

    def _is_teachable(self, example: Example, found: Examined) -> bool:
        if self._renderer is None or self._rules.template == "off":
            return True
        sample = self._renderer.render(example)
        if isinstance(sample, Unusable):
            # What the recipe has agreed to leave out (data.overlong: drop) is no fault of the row.
            return found.note(
                "template", "remove" if sample.agreed else self._rules.template, _plain(sample.reason), sample.reason
            )
        found.tokens = len(sample.input_ids)
        # That rows are cut is the recipe's word (data.overlong: truncate); which ones are is worth knowing.
        return not sample.cut or found.note("template", "warn", "cut", f"{sample.cut:,} tokens are cut off")


@lru_cache(maxsize=1)
def examiner(request: Request) -> Examiner:
    """This process's own, loaded once for a request."""
    return Examiner(request)


def text_of(example: Example) -> str:
    """All that is said in it, as one text."""
    if isinstance(example, Conversation):
        return "\n".join(message.content for message in example.messages if message.content)
    return example.prompt + example.completion


def characters_in(row: Row) -> int:
    """How much is said in a row; where its format is not known, in all its columns."""
    example = normalise(row)
    return _all_characters(row) if isinstance(example, Unusable) else len(text_of(example))


def _all_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_all_characters, value.values()))
    return sum(map(_all_characters, value)) if isinstance(value, list | tuple) else 0


def digest_of(example: Example) -> bytes:
    """Sixteen bytes that two rows share when they say the same, whatever their format and white space."""
    said: list[object]
    if isinstance(example, Conversation):
        said = [
            (
                turn.role,
                _spaced(turn.content),
                [(call.name, call.arguments) for call in turn.tool_calls],
                turn.supervised,
            )
            for turn in example.messages
        ]
        said.append(example.tools)
    else:
        said = [_spaced(example.prompt), _spaced(example.completion)]
    written = json.dumps(said, sort_keys=True)
    return hashlib.blake2b(written.encode(), digest_size=16).digest()


def _spaced(text: str) -> str:
    return " ".join(text.split())


def language_of(text: str, rule: Language, identify: Callable[[str], tuple[str, float]]) -> str:
    """ISO 639-1, or "" where it cannot be told."""
    start = text[: rule.characters]
    if len(text) < rule.shortest:
        return ""
    language, confidence = identify(start)
    return language if confidence >= rule.confidence else ""


def _mapped(value: Any, change: Callable[[str, str], str], key: str) -> Any:
    """A nest of lists and dictionaries with every text in it changed, but for roles and types."""
    if isinstance(value, str):
        return value if key in STRUCTURE else change(value, key)
    if isinstance(value, dict):
        return {name: _mapped(item, change, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change, key) for item in value]
    return value


def _masked(value: Any, mask: Callable[[Any, str], Any], key: str) -> Any:
    """A nest of lists and dictionaries with every text, key and whole number in it masked."""
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return mask(value, key)
    if isinstance(value, dict):
        masked: dict[Any, Any] = {}
        for name, item in value.items():
            better = base = mask(name, key) if isinstance(name, str) else name
            count = 1
            while better in masked or (better != name and better in value):  # two keys must not become one
                count += 1
                better = f"{base} {count}"
            masked[better] = _masked(item, mask, str(name))
        return masked
    if isinstance(value, list | tuple):
        return [_masked(item, mask, key) for item in value]
    return value


def _plain(reason: str) -> str:
    """A reason without what differs from row to row, to count by."""
    return " ".join("N" if "@" not in word and any(map(str.isdigit, word)) else word for word in reason.split())


def _renderer(template: Template) -> Renderer:
    from jobs.model import load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        for file, content in template.files.items():
            (Path(name) / file).write_bytes(content)
        return Renderer(load_tokenizer(Path(name)), template.sequence_length, template.overlong)


def _identifier() -> Callable[[str], tuple[str, float]]:
    from py3langid import langid

    identify: Callable[[str], tuple[str, float]] = langid.LanguageIdentifier.from_model_file(
        langid.MODEL_FILE, norm_probs=True
    ).classify
    return identify
