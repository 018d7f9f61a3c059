"""White space, Unicode and HTML of a text, put right without a change to what it says.

What looks like a fault and is not stays: the fullwidth punctuation of Chinese, curly quotes, the indentation of code,
joiners inside emoji and Persian words, everything between ``` fences where tags are concerned, and `List<String>`.
"""

import html
import re
from typing import Literal

from jobs.data.rules import Rules

Kind = Literal["unicode", "html", "whitespace"]
KINDS: tuple[Kind, ...] = ("unicode", "html", "whitespace")

# Tags that pages are made of. Any `<word>` would be wrong: programs and templates are full of those.
_NAMES = "a|abbr|b|blockquote|body|br|center|div|em|font|h[1-6]|head|hr|html|i|img|li|ol|p|span|strong|sub|sup|table"
_TAG = re.compile(rf"</?(?:{_NAMES}|tbody|td|th|thead|tr|u|ul)(?:\s[^<>]*)?/?>", re.IGNORECASE)
_HIDDEN = re.compile(r"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_LINE = re.compile(r"<(?:br|hr)\s*/?>|</(?:p|div|h[1-6]|li|tr|blockquote|table|ul|ol)\s*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:[a-z]{2,8}|#\d{2,6}|#x[0-9a-f]{2,6});", re.IGNORECASE)
_FENCE = re.compile(r"(```.*?(?:```|\Z))", re.DOTALL)

_UNSEEN = re.compile("[\u200b\u2060\ufeff]")  # not \u200c and \u200d, which join letters and emoji
_TRAILING = re.compile(r"[ \t\u00a0\u3000]+(?=\n)")
_BLANKS = re.compile(r"\n{4,}")
_PLAIN = re.compile(r"[\t\n\x20-\x7e]*")
# A row's own columns whose first and last spaces are part of what is learned: prompt and completion are joined as is.
JOINED = frozenset({"prompt", "completion", "text"})


def tidy(text: str, rules: Rules, key: str = "") -> tuple[str, tuple[Kind, ...]]:
    """The text as the rules would have it, and of which kinds there was something to mend; `warn` only tells.

    Args:
        key: the column or field that it stands in.
    """
    found: list[Kind] = []
    for kind in KINDS:
        do = getattr(rules, kind)
        if do == "off":
            continue
        better = _MENDERS[kind](text) if kind != "whitespace" else _whitespace(text, key in JOINED)
        if better != text:
            found.append(kind)
            if do == "mend":
                text = better
    return text, tuple(found)


def _unicode(text: str) -> str:
    """Text that was decoded by the wrong table, control characters, letters and accents apart (NFC)."""
    if _PLAIN.fullmatch(text):
        return text
    import ftfy

    better: str = ftfy.fix_text(
        text, unescape_html=False, uncurl_quotes=False, fix_character_width=False, explain=False, normalization="NFC"
    )
    return better


def _html(text: str) -> str:
    if "<" not in text and "&" not in text:
        return text
    outside = _FENCE.split(text)
    outside[::2] = [_without_tags(piece) for piece in outside[::2]]
    return "".join(outside)


def _without_tags(text: str) -> str:
    if _TAG.search(text) or _HIDDEN.search(text):
        text = _TAG.sub("", _LINE.sub("\n", _HIDDEN.sub("", text)))
    return html.unescape(text) if _ENTITY.search(text) else text


def _whitespace(text: str, joined: bool) -> str:
    better = _UNSEEN.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    better = _BLANKS.sub("\n\n\n", _TRAILING.sub("", better))
    return better if joined else better.strip()


_MENDERS = {"unicode": _unicode, "html": _html}
