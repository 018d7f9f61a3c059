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
    """One country's number. `checker` is a module of stdnum; `word` must stand before it, where it is given."""

    country: str
    shape: str
    checker: str
    word: str = ""


IDENTITIES = (
    Identity("CN", r"\d{17}[\dXx]", "cn.ric"),
    Identity("US", r"\d{3}-\d{2}-\d{4}", "us.ssn"),
    Identity("US", r"\d{3} ?\d{2} ?\d{4}", "us.ssn", r"ssn|social security"),
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
_NEAR = r"[^\n]{0,24}?"


def find_ids(text: str) -> Iterator[Span]:
    """Spans of the numbers of all countries of the table."""
    for shape, word, checker in _compiled():
        for found in shape.finditer(text):
            start, end = found.span()
            if word and not word.search(text, max(0, start - 40), start):
                continue
            if checker.is_valid(found[0].upper()):
                yield start, end


@cache
def _compiled() -> list[tuple[re.Pattern[str], re.Pattern[str] | None, Any]]:
    return [
        (
            re.compile(rf"(?<![0-9A-Za-z.\-/+])(?:{identity.shape})(?![0-9A-Za-z]|[.\-/]\d)"),
            re.compile(f"(?:{identity.word}){_NEAR}\\Z", re.IGNORECASE) if identity.word else None,
            import_module(f"stdnum.{identity.checker}"),
        )
        for identity in IDENTITIES
    ]


def is_identity(text: str) -> bool:
    """Whether any country's checker takes the whole text, with or without a word before it."""
    return any(shape.fullmatch(text) and checker.is_valid(text.upper()) for shape, _, checker in _compiled())
