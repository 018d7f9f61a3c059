"""What stands where personal data stood: a mark (`<EMAIL>`), or a surrogate that nobody owns.

The same value gets the same surrogate in the whole data set, on every machine: it is drawn from a hash of the value
under the seed (BLAKE2b, keyed), and no table is kept. Who has the prepared data without the seed cannot try values out.
A telephone number counts as the same however it is spaced, an e-mail address in upper and lower case.

A surrogate has the form of its kind, and lies in a range that is kept free, or fails the check digit:

    email        example.com, .net, .org                                                  (RFC 2606)
    phone        +1: 555-0100 to 555-0199; +44 7700 900…, +49 30 23125…, +33 6 39 98…: kept for films by Ofcom,
                 Bundesnetzagentur, Arcep; +86 11…, which no network has; others: 0…, which is none either
    card         the same network's digit, Luhn's check digit wrong
    iban         the same country, check digits 00, which none has
    national_id  accepted by no checker; United States: 666-…, which was never issued
    ip           198.18.0.0/15, kept for benchmarks (RFC 2544); 2001:db8::/32 (RFC 3849)
    secret       EXAMPLE-…, which the search for secrets passes over
    name         first and last names that are common
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from jobs.data.hits import Hit, Unescaped, fold
from jobs.data.identities import is_identity
from jobs.data.numbers import REGIONS

Mode = Literal["mask", "replace"]

_FIRST = (
    *("Alex", "Ben", "Clara", "Dana", "Emil", "Fay", "Gina", "Hugo", "Iris", "Jonas", "Kim", "Lena", "Max", "Nora"),
    *("Omar", "Paula", "Rosa", "Sam", "Tara", "Vera"),
)
_LAST = (
    *("Adler", "Baker", "Castro", "Doyle", "Evans", "Fischer", "Garcia", "Hale", "Ito", "Jansen", "Keller", "Lopez"),
    *("Meyer", "Novak", "Olsen", "Park", "Reed", "Silva", "Torres", "Weber"),
)
_LAST_HAN, _FIRST_HAN = "王李张刘陈杨赵黄周吴", "伟芳娜敏静强磊洋艳勇杰娟涛明超霞平刚"
_NANP = re.compile(r"(?:\+1[ .-]?|1[ .-])?\(?[2-9]\d{2}\)?[ .-]?\d{3}[ .-]?\d{4}\Z")
_CN_MOBILE = re.compile(r"(?:86)?1[3-9]\d{9}\Z")
_ATTEMPTS = 64


class Replacer:
    """Replaces hits in texts. `mode`: "mask" or "replace"; `seed` decides on the surrogates, and on no mask."""

    def __init__(self, mode: Mode, seed: int) -> None:
        self._mode = mode
        self._key = hashlib.blake2b(str(seed).encode(), digest_size=32).digest()

    def apply(self, text: str, hits: Iterable[Hit]) -> str:
        """The text with all hits replaced: hits of this text, in order and not overlapping, as `find` gives them.

        Raises ValueError for any others: they would leave parts of a value."""
        parts, done = [], 0
        for hit in hits:
            if hit.start < done or text[hit.start : hit.end] != hit.value:
                raise ValueError(f"{hit} is no hit of this text, or overlaps the one before it")
            parts += [text[done : hit.start], self.stand_in(hit)]
            done = hit.end
        return "".join([*parts, text[done:]])

    def stand_in(self, hit: Hit) -> str:
        """What stands in a hit's place; never the value itself."""
        if self._mode == "mask":
            return f"<{hit.kind.upper()}>"
        plain = fold(Unescaped(hit.value).text)
        make = _SURROGATES.get(hit.kind, _secret)
        for attempt in range(_ATTEMPTS):
            made = make(plain, _Draw(self._key, hit.kind, _canonical(hit.kind, plain), attempt))
            if made is not None and _canonical(hit.kind, made) != _canonical(hit.kind, plain):
                return made
        return f"<{hit.kind.upper()}>"  # 64 draws that all have a right check digit: less than once in 10^40


class _Draw:
    """Numbers that depend on key, kind, value and attempt alone."""

    def __init__(self, key: bytes, kind: str, value: str, attempt: int) -> None:
        message = f"{kind}\n{attempt}\n{value}".encode("utf-8", "surrogatepass")
        self._state = int.from_bytes(hashlib.blake2b(message, key=key, digest_size=64).digest())

    def below(self, limit: int) -> int:
        self._state, drawn = divmod(self._state, limit)
        return drawn

    def one_of(self, choices: Sequence[str]) -> str:
        return choices[self.below(len(choices))]

    def digits(self, count: int) -> str:
        return "".join(str(self.below(10)) for _ in range(count))


def _canonical(kind: str, plain: str) -> str:
    """The value without what may differ between two ways to write it."""
    match kind:
        case "email":
            return plain.lower()
        case "phone":
            return _split_phone(plain)[1]
        case "card" | "iban" | "national_id":
            return re.sub(r"[^0-9A-Za-z]", "", plain).upper()
        case _:
            return plain


def _written(pattern: str, characters: str) -> str:
    """`characters` in the places that letters and digits have in `pattern`."""
    remaining = iter(characters)
    return "".join(next(remaining) if character.isalnum() else character for character in pattern)


def _alike(plain: str, draw: _Draw) -> str:
    """Digits for digits, letters for letters, all else as it is."""
    return "".join(
        str(draw.below(10))
        if character.isdigit()
        else draw.one_of("ABCDEFGHJKLMNPRSTUVWXYZ")
        if character.isalpha()
        else character
        for character in plain
    )


def _email(_: str, draw: _Draw) -> str:
    name = f"{draw.one_of(_FIRST)}.{draw.one_of(_LAST)}".lower()
    return f"{name}{draw.digits(5)}@example.{draw.one_of(['com', 'net', 'org'])}"


def _split_phone(plain: str) -> tuple[str, str]:
    """(country code, national number) in digits, so that +44 20 … and 020 … are one number. The code is "" where no
    region is known in which it would be one."""
    import phonenumbers

    digits = re.sub(r"\D", "", plain)
    if _NANP.match(plain):
        return "1", digits[-10:]
    regions = ("CN", *REGIONS) if _CN_MOBILE.match(digits) else REGIONS
    for region in ("ZZ",) if plain.startswith("+") else regions:
        try:
            number = phonenumbers.parse(plain, region)
        except phonenumbers.NumberParseException:
            continue
        if region == "ZZ" or phonenumbers.is_valid_number(number):
            return str(number.country_code), phonenumbers.national_significant_number(number)
    return "", digits


def _phone(plain: str, draw: _Draw) -> str:
    code, national = _split_phone(plain)
    digits = re.sub(r"\D", "", plain)
    if not digits.endswith(national):  # as in +44 (0)20 …, where a digit that is not dialled stands between
        national = digits[-len(national) :]
    head = digits[: len(digits) - len(national)]  # country code and trunk prefix, as they were written
    match code, len(national):
        case "1", 10:
            made = f"{2 + draw.below(8)}{draw.below(10)}{1 + draw.below(9)}55501{draw.digits(2)}"
        case "44", 10:
            made = f"7700900{draw.digits(3)}"
        case "49", 10:
            made = f"3023125{draw.digits(3)}"
        case "33", 9:
            made = f"63998{draw.digits(4)}"
        case "86", 11:
            made = f"11{draw.digits(9)}"
        case _:
            made = "0" + draw.digits(len(national) - 1)
    return _written(plain, head + made)


def _card(plain: str, draw: _Draw) -> str:
    from stdnum import luhn

    digits = re.sub(r"\D", "", plain)
    body = digits[0] + draw.digits(len(digits) - 2)
    wrong = (int(luhn.calc_check_digit(body)) + 1 + draw.below(9)) % 10
    return _written(plain, f"{body}{wrong}")


def _iban(plain: str, draw: _Draw) -> str:
    return f"{plain[:2]}00{_alike(plain[4:], draw)}"


def _national_id(plain: str, draw: _Draw) -> str | None:
    american = re.fullmatch(r"\d{3}[- ]?\d{2}[- ]?\d{4}", plain)
    made = "666" + _alike(plain[3:], draw) if american else _alike(plain, draw)
    return None if is_identity(made) else made


def _ip(plain: str, draw: _Draw) -> str:
    if ":" in plain:
        return "2001:db8::" + ":".join(f"{1 + draw.below(0xFFFF):x}" for _ in range(4))
    return f"198.{18 + draw.below(2)}.{draw.below(256)}.{1 + draw.below(254)}"


def _secret(_: str, draw: _Draw) -> str:
    return f"EXAMPLE-{draw.below(1 << 64):016x}"


def _name(plain: str, draw: _Draw) -> str:
    if not plain.isascii() and any("一" <= character <= "鿿" for character in plain):
        return draw.one_of(_LAST_HAN) + draw.one_of(_FIRST_HAN) + draw.one_of(_FIRST_HAN)
    return f"{draw.one_of(_FIRST)} {draw.one_of(_LAST)}"


_SURROGATES: dict[str, Callable[[str, _Draw], str | None]] = {
    "email": _email,
    "phone": _phone,
    "card": _card,
    "iban": _iban,
    "national_id": _national_id,
    "ip": _ip,
    "secret": _secret,
    "name": _name,
}
