"""Personal data and secrets in a text, in any language, Chinese without word boundaries among them.

A cheap scan finds candidates, a library decides: phonenumbers for telephone numbers, python-stdnum for cards, IBAN and
national ids, ipaddress for IP addresses, detect-secrets' plugins for keys (secrets.py), spaCy for names of people.
A row that holds no digit, no @ and no word such as `key` costs a few microseconds.

Personal is what may lead to somebody. Not personal are order numbers, versions, dates, prices, ISBNs, UUIDs, digests,
loopback addresses and networks. Where a number's digits don't tell, the words before it do.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence

from jobs.data.hits import RANKS, Hit, Kind, Unescaped, fold, settle
from jobs.data.identities import find_ids
from jobs.data.numbers import REGIONS, find_cards, find_ibans, find_ips, find_phones, without_other_numbers
from jobs.data.secrets import find_secrets

KINDS: tuple[Kind, ...] = tuple(kind for kind in RANKS if kind != "name")
"""What is looked for unless told otherwise; `name` needs spaCy and a model."""

Span = tuple[int, int]

_DIGITS = re.compile(r"\d[\d ().\-/]{5,}\d|\d{3}[A-Za-z-]|\d{1,3}\.\d")
_NUMERIC: tuple[tuple[Kind, Callable[[str], Iterator[Span]]], ...] = (
    ("card", find_cards),
    ("national_id", find_ids),
)

# Web addresses in CSS and file names have an @ too: icon@2x.png
_FILES = frozenset({"png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "js", "json", "html", "py", "md", "txt"})
_LOCAL = re.compile(r"[A-Za-z0-9À-ÖØ-öø-ɏ.!#$%&'*+/=?^_`{|}~-]{1,64}\Z")
_LOGIN = re.compile(r"://[^\s/@]*:[^\s/@]*\Z")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}(?:xn--[a-z0-9-]{2,59}|[A-Za-z]{2,24})")
# Of other letters too, where a top-level domain of the same script ends them: Chinese goes on without a space.
_FOREIGN = re.compile(
    r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}"
    r"(?:xn--[a-z0-9-]{2,59}|[A-Za-z]{2,24}|[\u0370-\u1cff]{2,24}|"
    r"中国|中國|公司|网络|網絡|在线|中文网|网址|网站|商城|集团|我爱你|香港|台湾|台灣|新加坡|移动|政务|公益|みんな|한국)"
)


def find(
    text: str,
    kinds: Collection[str] = KINDS,
    languages: Sequence[str] = ("en", "zh"),
    regions: Sequence[str] = REGIONS,
) -> list[Hit]:
    """All personal data and secrets of these kinds, in order of place, none overlapping.

    Args:
        languages: ISO codes; says which spaCy models look for names, and nothing else.
        regions: ISO country codes, in whose national format a telephone number may be written. Numbers with a country
            code (+49 …) are found anyway.

    Raises:
        ConfigError: names are asked for, and spaCy or its model for a language is not installed.
    """
    unescaped = Unescaped(text)
    plain = fold(unescaped.text)
    spans: list[tuple[Kind, Span]] = []
    if "email" in kinds and "@" in plain:
        spans += (("email", span) for span in find_emails(plain))
    if "secret" in kinds:
        spans += (("secret", span) for span in find_secrets(plain))
    if "ip" in kinds:
        spans += (("ip", span) for span in find_ips(plain))
    if _DIGITS.search(plain):
        if "iban" in kinds:
            spans += (("iban", span) for span in find_ibans(plain))
        numbers = without_other_numbers(plain)
        for kind, search in _NUMERIC:
            if kind in kinds:
                spans += ((kind, span) for span in search(numbers))
        if "phone" in kinds:
            spans += (("phone", span) for span in find_phones(numbers, tuple(regions)))
    if "name" in kinds:
        from jobs.data.names import find_names  # spaCy takes seconds to import

        spans += (("name", span) for span in find_names(unescaped.text, languages))
    if not spans:
        return []
    placed = [(kind, *unescaped.span(*span)) for kind, span in spans]
    return settle(text, [Hit(start, end, kind, text[start:end]) for kind, start, end in placed])


def find_emails(text: str) -> Iterator[Span]:
    """Addresses in the form that HTML's `<input type=email>` takes (WHATWG), with at least one dot in the domain."""
    at = text.find("@")
    while at >= 0:
        local = _LOCAL.search(text, max(0, at - 64), at)
        domain = _DOMAIN.match(text, at + 1) or (None if text.isascii() else _FOREIGN.match(text, at + 1))
        if local and domain:
            start = local.end() - len(local[0].lstrip(".!#$%&'*/=?^`{|}~-"))
            last = domain[0].rpartition(".")[2].lower()
            remote = local[0] == "git" and text.startswith(":", domain.end())  # git@host:owner/name
            login = _LOGIN.search(text, max(0, at - 200), at)  # scheme://name:password@host: find_secrets has it
            if start < at and text[at - 1] != "." and last not in _FILES and not remote and not login:
                yield start, domain.end()
        at = text.find("@", at + 1)
