"""National identity numbers: the shape finds a candidate, python-stdnum checks dates, places and check digits.

A shape that many other numbers have too (nine digits, say) counts only after a word that announces it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

Span = tuple[int, int]


@dataclass(frozen=True)
class Identity:
    """One country's number. `checker` is a module of stdnum, or "" where the shape has to do; `word` must stand before
    it, where it is given."""

    country: str
    shape: str
    checker: str
    word: str = ""


IDENTITIES = (
    Identity("CN", r"\d{17}[\dXx]", "cn.ric"),
    Identity("CN", r"\d{6}[ -](?:\d{8}|\d{4}[ -]\d{4}|\d{4}[ -]\d{2}[ -]\d{2})[ -]\d{3}[\dXx]", "cn.ric"),
    Identity("US", r"\d{3}-\d{2}-\d{4}", "us.ssn"),
    Identity("US", r"\d{3}[ .]?\d{2}[ .]?\d{4}", "us.ssn", r"ssn|social security|社会安全"),
    Identity("US", r"(?!000|666)\d{3}-\d{2}-\d{4}", "", r"ssn|social security|\bitin"),
    Identity("BE", r"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}", "be.nn"),
    Identity("BR", r"\d{3}\.\d{3}\.\d{3}-\d{2}", "br.cpf"),
    Identity("CZ", r"\d{6}/\d{4}", "cz.rc"),
    Identity("DE", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", "de.idnr", r"steuer|idnr|tin\b|tax id"),
    Identity("DK", r"\d{6}-?\d{4}", "dk.cpr", r"cpr|personnummer"),
    Identity("ES", r"\d{8}-?[A-Z]", "es.dni"),
    Identity("ES", r"[XYZ]-?\d{7}-?[A-Z]", "es.nie"),
    Identity("FI", r"\d{6}[-+A]\d{3}[0-9A-Z]", "fi.hetu"),
    Identity("FR", r"[1278] ?\d{2} ?\d{2} ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}", "fr.nir"),
    Identity("GB", r"\d{3}[ -]?\d{3}[ -]?\d{4}", "gb.nhs", r"\bnhs"),
    Identity("IN", r"\d{4} ?\d{4} ?\d{4}", "in_.aadhaar", r"aadhaar|uid"),
    Identity("IT", r"[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z]", "it.codicefiscale"),
    Identity("NL", r"\d{4}\.?\d{2}\.?\d{3}", "nl.bsn", r"\bbsn|burgerservice|sofi"),
    Identity("PL", r"\d{11}", "pl.pesel", r"pesel"),
    Identity("PT", r"\d{9}", "pt.nif", r"\bnif|contribuinte"),
    Identity("RO", r"\d{13}", "ro.cnp", r"\bcnp|cod numeric"),
    Identity("SE", r"(?:\d{2})?\d{6}[-+]\d{4}", "se.personnummer"),
)
_FREE = r"(?=[0-9A-Z])(?<![0-9A-Za-z.\-/+])(?:{})(?![0-9A-Za-z]|[.\-/]\d)"
_WORD_CHARACTERS = 40


def find_ids(text: str) -> Iterator[Span]:
    """Spans of the numbers of all countries of the table."""
    for found in _plain_shapes().finditer(text):
        if any(shape.fullmatch(found[0]) and checker.is_valid(found[0].upper()) for shape, checker in _checkers(False)):
            yield found.span()
    lower = text.lower()
    for needles, word, shape, checker in _announced_shapes():
        if any(needle in lower for needle in needles):
            for found in shape.finditer(text):
                before = text[max(0, found.start() - _WORD_CHARACTERS) : found.start()].rpartition("\n")[2]
                if word.search(before) and checker.is_valid(found[0].upper()):
                    yield found.span()


def is_identity(text: str) -> bool:
    """Whether any country's checker takes the whole text."""
    return any(shape.fullmatch(text) and checker.is_valid(text.upper()) for shape, checker in _checkers(True))


@cache
def _plain_shapes() -> re.Pattern[str]:
    """All shapes that need no word before them, as one pattern: one pass over the text."""
    return re.compile(_FREE.format("|".join(identity.shape for identity in IDENTITIES if not identity.word)))


@cache
def _announced_shapes() -> list[tuple[list[str], re.Pattern[str], re.Pattern[str], Any]]:
    """(words, the same as a pattern, shape, checker) of all others."""
    return [
        (
            identity.word.replace(r"\b", "").split("|"),
            re.compile(identity.word, re.IGNORECASE),
            re.compile(_FREE.format(identity.shape)),
            _checker(identity.checker),
        )
        for identity in IDENTITIES
        if identity.word
    ]


@cache
def _checkers(with_announced: bool) -> list[tuple[re.Pattern[str], Any]]:
    chosen = [identity for identity in IDENTITIES if with_announced or not identity.word]
    return [(re.compile(identity.shape), _checker(identity.checker)) for identity in chosen]


def _checker(module: str) -> Any:
    if not module:
        return _Shape
    own = {"cn.ric": _Resident, "us.ssn": _Social}
    return own.get(module) or import_module(f"stdnum.{module}")


class _Shape:
    """Takes whatever has the shape."""

    @staticmethod
    def is_valid(number: str) -> bool:
        return bool(number)


class _Social:
    """stdnum's checks, which know hyphens only."""

    @staticmethod
    def is_valid(number: str) -> bool:
        from stdnum.us import ssn

        return bool(ssn.is_valid(re.sub("[ .-]", "", number)))


class _Resident:
    """stdnum's checks of a Chinese identity number, but for one: that the county's code was in use in the birth year.
    Codes are given at registration, often years later."""

    @staticmethod
    def is_valid(number: str) -> bool:
        from stdnum import numdb
        from stdnum.cn import ric
        from stdnum.exceptions import ValidationError

        number = re.sub("[ -]", "", number)
        try:
            born = ric.get_birth_date(number).year
        except ValidationError:
            return False
        county = any(properties for _, properties in numdb.get("cn/loc").info(number[:6]))
        return county and 1900 <= born < 2100 and ric.calc_check_digit(number) == number[-1]
