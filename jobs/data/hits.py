r"""What a check has found in a text: a span, its kind, its value; and the text made plain for searching.

`fold` keeps every offset: full-width digits and letters (１３８…, ＠), the dashes and the spaces of typesetting become
their ASCII ones, one character for one, so that what is found in the folded text stands at the same place in the
original.

`Unescaped` puts one character where code, JSON and web pages write several (`\n`, `\u006a`, `&#64;`, `%40`), and knows
where each came from: a hit then begins and ends beside an escape sequence, never within one. It reads every text so,
whether it is code or not: of a path C:\new a letter is not seen, and nothing else comes of it.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["email", "phone", "card", "iban", "national_id", "ip", "secret", "name"]

RANKS: tuple[Kind, ...] = ("secret", "iban", "card", "national_id", "email", "ip", "phone", "name")
"""Where two hits overlap, the kind that comes first names both: what has a check digit before what has only a shape."""


@dataclass(frozen=True)
class Hit:
    """Characters [start, end) of a text. `value` is the text there, as it was written."""

    start: int
    end: int
    kind: str
    value: str


_FOLDED = (
    {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
    | dict.fromkeys((0x3000, 0xA0, 0x2002, 0x2003, 0x2009, 0x202F), 0x20)
    | dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2212), 0x2D)
)


def fold(text: str) -> str:
    """The text with the same length, and typographic variants of ASCII characters as ASCII."""
    return text if text.isascii() else text.translate(_FOLDED)


_ESCAPES = re.compile(
    r"\\+(?:u(?P<four>[0-9a-fA-F]{4})|x(?P<two>[0-9a-fA-F]{2})|(?P<letter>[nrtbf\"'/]))|(?P<slashes>\\{2,})"
    r"|&#(?:[xX](?P<hex>[0-9a-fA-F]{1,6})|(?P<decimal>\d{1,7}));|(?P<percent>%40)"
)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t", "b": " ", "f": " "}


class Unescaped:
    """A text with one character for each escape sequence, however many backslashes: JSON within JSON doubles them.

    `span` gives back where characters of `text` stand in the original."""

    def __init__(self, original: str) -> None:
        pieces: list[str] = []
        # Where a piece of the text begins in `text`, and in the original; an escape is a piece of one character.
        self._starts, self._origins = [0], [0]
        length = done = 0
        if "\\" in original or "&#" in original or "%40" in original:
            for found in _ESCAPES.finditer(original):
                pieces += [original[done : found.start()], _character(found)]
                length += found.start() - done
                done = found.end()
                self._starts += [length, length + 1]
                self._origins += [found.start(), done]
                length += 1
        self.text = "".join([*pieces, original[done:]]) if pieces else original

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Characters [start, end) of `text`, in the original: whole escape sequences."""
        return self._origin(start), self._origin(end)

    def _origin(self, at: int) -> int:
        piece = bisect_right(self._starts, at) - 1
        return self._origins[piece] + at - self._starts[piece]


def _character(found: re.Match[str]) -> str:
    """What an escape sequence stands for; a space for what is no character by itself."""
    if found["letter"]:
        return _LETTERS.get(found["letter"], found["letter"])
    if found["percent"]:
        return "@"
    if found["slashes"]:
        return "\\"
    written = found["four"] or found["two"] or found["hex"]
    code = int(written, 16) if written else int(found["decimal"])
    return " " if code > 0x10FFFF or 0xD800 <= code < 0xE000 else chr(code)


def settle(text: str, hits: Iterable[Hit]) -> list[Hit]:
    """Hits in order of place, none overlapping. Those that overlap become one, of the first kind in RANKS, over the
    characters of all: so no part of any of them is left. Depends on the set of hits alone, not on their order."""
    order: dict[str, int] = {kind: rank for rank, kind in enumerate(RANKS)}
    settled: list[Hit] = []
    for hit in sorted(hits, key=lambda hit: (hit.start, -hit.end, order.get(hit.kind, len(order)), hit.kind)):
        if settled and hit.start < settled[-1].end:
            last = settled[-1]
            end = max(last.end, hit.end)
            kind = min(last.kind, hit.kind, key=lambda kind: (order.get(kind, len(order)), kind))
            settled[-1] = Hit(last.start, end, kind, text[last.start : end])
        else:
            settled.append(hit)
    return settled
