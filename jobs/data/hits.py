"""What a check has found in a text: a span, its kind, its value; and the text made plain for searching.

`fold` keeps every offset: full-width digits and letters (１３８…, ＠), the dashes and the spaces of typesetting become
their ASCII ones, one character for one, so that what is found in the folded text stands at the same place in the
original.
"""

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
