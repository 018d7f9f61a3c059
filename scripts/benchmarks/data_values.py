"""Values to plant: personal data that belongs to nobody, and what only looks like it.

Check digits are computed here, by the numbers' own formulas. Each function takes the source of chance and the language.
"""

import base64
import json
import random
import string
from collections.abc import Callable
from typing import Literal

Language = Literal["en", "zh"]

_GIVEN = ("anna", "bruno", "chen", "dmitri", "elena", "farid", "greta", "hiro", "ines", "jamal", "katya", "liang")
_FAMILY = ("anders", "bianchi", "chowdhury", "dubois", "eriksen", "fuchs", "gomez", "huang", "ivanov", "jones", "wei")
_HOSTS = ("gmail.com", "qq.com", "163.com", "outlook.com", "acme-corp.de", "mail.uni.ac.uk", "foo.io", "example.com")
_PLACES = ("110105", "310115", "440305", "330106", "420106", "510107", "320102", "370102")
_HEX = "0123456789abcdef"
_TOKEN = string.ascii_letters + string.digits


def email(draw: random.Random, _: Language) -> str:
    given, family, number = draw.choice(_GIVEN), draw.choice(_FAMILY), draw.randint(1, 9999)
    local = draw.choice(
        (f"{given}.{family}", f"{given}{number}", f"{family}_{given}", f"{given}+news", f"{given}-{family}{number}")
    )
    return draw.choice((str.lower, str.lower, str.title))(local) + "@" + draw.choice(_HOSTS)


def phone(draw: random.Random, language: Language) -> str:
    if language == "zh":
        first = draw.choice(("138", "139", "150", "159", "177", "186", "189", "198"))
        mobile = first + _digits(draw, 8)
        mark = draw.choice(" -")
        parted = f"{mobile[:3]}{mark}{mobile[3:7]}{mark}{mobile[7:]}"
        city = f"{draw.choice(('010', '021'))}-{draw.randint(5, 8)}{_digits(draw, 7)}"
        return draw.choice((mobile, mobile, parted, f"+86 {mobile}", f"+86-{parted}", city, full_width(mobile)))
    area = draw.choice(("212", "415", "617", "303", "206"))
    exchange, line = f"{draw.randint(2, 9)}{draw.randint(20, 99)}", _digits(draw, 4)
    american = draw.choice(("({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "+1 {} {} {}", "+1-{}-{}-{}", "+1{}{}{}"))
    british = draw.choice(("07911 {}", "+44 7911 {}", "+447911{}")).format(f"12{_digits(draw, 4)}")
    german = draw.choice(("+49 30 {}", "+49 151 {}", "+49151{}")).format(f"23{_digits(draw, 6)}")
    return draw.choice((american.format(area, exchange, line),) * 3 + (british, german))


def card(draw: random.Random, _: Language) -> str:
    prefix = draw.choice(("4", "51", "54", "2221", "37", "62", "6011"))
    length = 15 if prefix == "37" else 16
    body = prefix + _digits(draw, length - len(prefix) - 1)
    number = f"{body}{luhn(body)}"
    groups = (4, 6, 5) if length == 15 else (4, 4, 4, 4)
    mark = draw.choice(("", "", " ", "-"))
    parts, start = [], 0
    for size in groups:
        parts.append(number[start : start + size])
        start += size
    return mark.join(parts)


def iban(draw: random.Random, _: Language) -> str:
    bank = "".join(draw.choices(string.ascii_uppercase, k=4))
    accounts = ("DE", _digits(draw, 18)), ("GB", bank + _digits(draw, 14)), ("AT", _digits(draw, 16))
    country, account = draw.choice(accounts)
    as_number = "".join(str(int(letter, 36)) for letter in f"{account}{country}00")
    number = f"{country}{98 - int(as_number) % 97:02d}{account}"
    if draw.random() < 0.5:
        return number
    return " ".join(number[start : start + 4] for start in range(0, len(number), 4))


def national_id(draw: random.Random, language: Language) -> str:
    year, month, day = draw.randint(1950, 1999), draw.randint(1, 12), draw.randint(1, 28)
    if language == "zh":
        body = f"{draw.choice(_PLACES)}{year}{month:02d}{day:02d}{draw.randint(1, 999):03d}"
        total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(body))  # ISO 7064, mod 11-2
        number = body + "10X98765432"[total % 11]
        return full_width(number) if draw.random() < 0.1 else number
    match draw.randrange(5):
        case 0 | 1:
            return f"{draw.choice((123, 219, 400, 536, 601))}-{draw.randint(10, 99)}-{draw.randint(1000, 9998)}"
        case 2:  # Spain
            number_ = draw.randint(10_000_000, 99_999_999)
            return f"{number_}{'TRWAGMYFPDXBNJZSQVHLCKE'[number_ % 23]}"
        case 3:  # Finland
            birth, serial = f"{day:02d}{month:02d}{year % 100:02d}", draw.randint(2, 899)
            return f"{birth}-{serial:03d}{'0123456789ABCDEFHJKLMNPRSTUVWXY'[int(f'{birth}{serial:03d}') % 31]}"
        case _:  # France
            body = f"{draw.randint(1, 2)}{year % 100:02d}{month:02d}{draw.choice(('75', '13', '69'))}"
            body += f"{draw.randint(1, 399):03d}{draw.randint(1, 999):03d}"
            key = f"{97 - int(body) % 97:02d}"
            spaced = f"{body[0]} {body[1:3]} {body[3:5]} {body[5:7]} {body[7:10]} {body[10:]} {key}"
            return spaced if draw.random() < 0.5 else body + key


def ip(draw: random.Random, _: Language) -> str:
    if draw.random() < 0.3:
        return "2001:" + ":".join(f"{draw.randint(1, 0xFFFF):x}" for _ in range(3)) + f"::{draw.randint(1, 0xFFFF):x}"
    first = draw.choice((31, 52, 82, 121, 192, 203))
    return f"{first}.{draw.randint(1, 254)}.{draw.randint(0, 254)}.{draw.randint(1, 254)}"


def secret(draw: random.Random, _: Language) -> str:
    """A key or token whose shape is its maker's, a password or key behind its name: the value alone."""
    letters = string.ascii_uppercase + string.digits
    return draw.choice(
        (
            lambda: "AKIA" + _of(draw, letters, 16),
            lambda: draw.choice(("ghp_", "gho_")) + _of(draw, _TOKEN, 36),
            lambda: f"xoxb-{_digits(draw, 12)}-{_digits(draw, 12)}-{_of(draw, string.ascii_lowercase, 24)}",
            lambda: "hf_" + _of(draw, _TOKEN, 34),
            lambda: "sk-proj-" + _of(draw, _TOKEN, 20) + "7" + _of(draw, _TOKEN, 27),
            lambda: "sk_live_" + _of(draw, _TOKEN, 24),
            lambda: "glpat-" + _of(draw, _TOKEN, 20),
            lambda: "AIza" + _of(draw, _TOKEN, 35),
            lambda: _jwt(draw),
            lambda: _pem(draw),
        )
    )()


def password(draw: random.Random, _: Language) -> str:
    return f"{_of(draw, string.ascii_letters, 5)}{draw.randint(10, 99)}{draw.choice('!#%_-')}{_of(draw, _TOKEN, 3)}"


VALUES: dict[str, Callable[[random.Random, Language], str]] = {
    "email": email,
    "phone": phone,
    "card": card,
    "iban": iban,
    "national_id": national_id,
    "ip": ip,
    "secret": secret,
    "password": password,
}


def look_alike(draw: random.Random, language: Language) -> str:
    """A sentence with a number or a code that is nobody's."""
    year, month, day = draw.randint(1990, 2026), draw.randint(1, 12), draw.randint(1, 28)
    uuid = "-".join(_of(draw, _HEX, size) for size in (8, 4, 4, 4, 12))
    isbn = f"978{_digits(draw, 9)}"
    isbn += str(-sum(int(digit) * (1 + 2 * (place % 2)) for place, digit in enumerate(isbn)) % 10)
    price = f"{draw.randint(1, 999)},{_digits(draw, 3)}.{_digits(draw, 2)}"
    version = f"{draw.randint(0, 30)}.{draw.randint(0, 40)}.{draw.randint(0, 90)}"
    digest = _of(draw, _HEX, draw.choice((32, 40, 64)))
    order = f"{draw.choice(('', 'A', 'PO-', 'SO-2024-'))}{_digits(draw, draw.choice((8, 10, 11, 12, 16)))}"
    code = draw.choice(
        (
            "`for i in range(1000000): total += i * 31415926`",
            "`std::vector<std::pair<int, int>> a(100);`",
            f"`import numpy as np  # {version}`",
            "`@property def token(self): return self._token`",
            "`password = input('Password: ')`",
            "`api_key = os.environ['API_KEY']`",
            "`token = get_token(request)`",
            '`{"password": "<your password>", "port": 5432}`',
            f"`sha256:{_of(draw, _HEX, 64)}`",
            "`git clone git@github.com:owner/name.git`",
            "`background: url(icon@2x.png)`",
            "`ping 127.0.0.1`",
            "`ip route add 10.0.0.0/8`",
        )
    )
    english = (
        f"Order number {order} was shipped.",
        f"The tracking number is {_digits(draw, 12)}.",
        f"It was released on {year}-{month:02d}-{day:02d}.",
        f"On {month:02d}/{day:02d}/{year} at {draw.randint(0, 23):02d}:{draw.randint(0, 59):02d} it ended.",
        f"From {year}-{year + 5} sales grew by {draw.randint(1, 99)}.{_digits(draw, 2)}%.",
        f"The price is ${price}.",
        f"It costs {draw.randint(1000, 9_999_999)} USD.",
        f"Version {version}.{draw.randint(1, 9)} fixes this.",
        f"Upgrade to v{version}-rc{draw.randint(1, 9)}.",
        f"ISBN {isbn[:3]}-{isbn[3]}-{isbn[4:7]}-{isbn[7:12]}-{isbn[12]}.",
        f"ISBN: {isbn}.",
        f"Its id is {uuid}.",
        f"The commit is {digest}.",
        f"Pi is 3.14159265358979 and e is 2.718281828{_digits(draw, 3)}.",
        f"About {draw.randint(1, 9)} {_digits(draw, 3)} {_digits(draw, 3)} people live there.",
        f"Population: {draw.randint(1, 9)},{_digits(draw, 3)},{_digits(draw, 3)}.",
        f"The numbers are {', '.join(_digits(draw, draw.randint(1, 5)) for _ in range(6))}.",
        f"Add {_digits(draw, 7)} and {_digits(draw, 8)}.",
        f"Unix time {draw.randint(10**9, 2 * 10**9)} is meant.",
        f"It stands in section {draw.randint(1, 9)}.{draw.randint(1, 9)}.{draw.randint(1, 9)}.{draw.randint(1, 9)}.",
        f"See arXiv:{year % 100:02d}{month:02d}.{_digits(draw, 5)} and 10.1145/{_digits(draw, 7)}.{_digits(draw, 7)}.",
        f"The score was {draw.randint(1, 99)}-{draw.randint(1, 99)}, the ratio {draw.randint(1, 16)}:9.",
        "Mention @someone or write to me at work.",
        f"Run {code} first.",
        f"Then {code}.",
    )
    chinese = (
        f"订单号：{_digits(draw, draw.choice((10, 11, 12, 16, 18)))}已发货。",
        f"快递单号{_digits(draw, 12)}。",
        f"发布于{year}年{month}月{day}日。",
        f"日期：{year}-{month:02d}-{day:02d} {draw.randint(0, 23):02d}:{draw.randint(0, 59):02d}。",
        f"价格为￥{price}。",
        f"总价{draw.randint(1000, 9_999_999)}元。",
        f"请升级到版本{version}.{draw.randint(1, 9)}。",
        f"书号ISBN {isbn}。",
        f"编号是{uuid}。",
        f"提交{digest}。",
        "圆周率约为3.14159265358979。",
        f"人口约{draw.randint(1, 99)}万，共{_digits(draw, 7)}人。",
        f"计算{_digits(draw, 6)}加{_digits(draw, 8)}。",
        f"第{draw.randint(1, 99)}章第{draw.randint(100, 999)}页。",
        f"时间戳{draw.randint(10**9, 2 * 10**9)}。",
        "密码不能为空，请重新输入密码。",
        f"比分为{draw.randint(1, 99)}比{draw.randint(1, 99)}。",
        f"运行{code}。",
    )
    return draw.choice(chinese if language == "zh" else english)


def luhn(body: str) -> int:
    """The check digit that is to follow these digits (ISO/IEC 7812-1, annex B)."""
    doubled = (int(digit) * (2 - place % 2) for place, digit in enumerate(reversed(body)))
    return -sum(digit // 10 + digit % 10 for digit in doubled) % 10


def full_width(text: str) -> str:
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


def _digits(draw: random.Random, count: int) -> str:
    return _of(draw, string.digits, count)


def _of(draw: random.Random, characters: str, count: int) -> str:
    return "".join(draw.choices(characters, k=count))


def _jwt(draw: random.Random) -> str:
    parts = ({"alg": "HS256", "typ": "JWT"}, {"sub": _digits(draw, 10), "iat": draw.randint(10**9, 2 * 10**9)})
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, _of(draw, _TOKEN, 43)])


def _pem(draw: random.Random) -> str:
    kind = draw.choice(("RSA ", "EC ", "OPENSSH ", ""))
    lines = [_of(draw, _TOKEN + "+/", 64) for _ in range(3)]
    return "\n".join([f"-----BEGIN {kind}PRIVATE KEY-----", *lines, f"-----END {kind}PRIVATE KEY-----"])
