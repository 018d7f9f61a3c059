"""Keys, tokens and passwords in a text, by detect-secrets' plugins and heuristics.

The plugins' own patterns say what a key of AWS, GitHub, Slack, … looks like. Passwords and keys without a shape of
their own are found in assignments (`api_key = "…"`, `密码：…`), where the library's heuristics tell them from
references, placeholders, sequences and UUIDs, and its measure of entropy tells them from words. A digest without such a
word before it is no secret.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

Span = tuple[int, int]

_QUICK = re.compile(
    r"AKIA|ASIA|ABIA|ACCA|A3T|gh[pousr]_|github_pat_|gl(?:pat|dt|ft|soat|rt|imt|ptt|agent|cbt)-|gloas-|GR1348941"
    r"|xox|xapp-|slack|eyJ|PRIVATE KEY|k_live_|AC[a-z0-9]{8}|SK[a-z0-9]{8}|SG\.|-us\d|_authToken|pypi-|sq0csp|AIza|hf_"
    r"|sk-|AccountKey|\d:[0-9A-Za-z_-]{30}|[MNO][\w-]{20}|://\S+@"
)
_SHORTEST = 20
"""Characters of the shortest token of one piece; a private key and a password in a URL are looked for apart."""

_NAMES = ("passw", "pwd", "passphrase", "passcode", "secret", "token", "key", "credential")
_HAN_NAMES = ("密码", "口令", "密钥", "令牌", "秘钥")
_KEY_OF = re.compile(r"(?:api|access|auth|account|service|private|client|encryption|db|signing)[_ -]?\Z", re.IGNORECASE)

# Shapes that the library has no plugin for.
_MORE = (
    re.compile(r"hf_[A-Za-z0-9]{30,}"),
    re.compile(r"sk-(?:proj-|ant-|svcacct-|or-)?(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"),
    re.compile(r"AIza[0-9A-Za-z_-]{35}"),
    re.compile(r"github_pat_[0-9A-Za-z_]{22,}"),
    re.compile(r"gh[pousr]_[A-Za-z0-9]{36,}"),
    re.compile(r"xapp-\d-[A-Z0-9]+-\d+-[a-z0-9]+"),
)
_GROUPED = {"BasicAuthDetector", "AWSKeyDetector", "NpmDetector"}
"""Plugins whose first group is the secret; what stands around it is no secret. (GitHub's group is a mere prefix.)"""

_PEM_END = re.compile(r"-----END [A-Z0-9 ]+-----")
_PEM_BODY = re.compile(r"[-\sA-Za-z0-9+/=:,\\]*")

_ASSIGNED = re.compile(
    r"(?:(?P<password>passw(?:or)?d|pwd|passphrase|passcode|密码|口令)|secret|token|(?P<key>key)|credential|密钥|秘钥|令牌)"
    r"[A-Za-z0-9_]{0,20}[\"'\]`]{0,3} {0,3}(?:=>|:=|={1,3}|:| is |是|为) {0,3}"
    r"(?:(?P<quote>[\"'`])(?P<quoted>[^\"'`\s]{6,200})(?P=quote)|(?P<bare>[!-~]{6,200}))",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"^(?:example|change[_-]?me|your|placeholder|dummy|redacted|my[_-]?(?:secret|password|token|key))"
    r"|xxxx|\*\*\*|\.\.\.|<|\{|^(?:none|null|true|false|undefined)$",
    re.IGNORECASE,
)


def find_secrets(text: str) -> Iterator[Span]:
    """Spans of the values alone, without the name that they are assigned to."""
    if _may_hold_token(text) and _QUICK.search(text):
        for pattern, grouped, formally_valid in _shapes():
            for found in pattern.finditer(text):
                numbers = range(1, pattern.groups + 1) if grouped else ()
                group = next((number for number in numbers if found[number]), 0)
                start, end = found.span(group)
                if not group and start and text[start - 1].isascii() and text[start - 1].isalnum():
                    continue
                if formally_valid(found[group]) and not (group and _PLACEHOLDER.search(found[group])):
                    yield start, end
        yield from _private_keys(text)
    yield from _assigned(text)


def _may_hold_token(text: str) -> bool:
    """Whether it is worth the 60 µs of a closer look."""
    if len(max(text.split(), key=len, default="")) >= _SHORTEST:
        return True
    return "PRIVATE KEY" in text or ("://" in text and "@" in text)


def _assigned(text: str) -> Iterator[Span]:
    lower = text.lower()
    if len(lower) != len(text):  # one of the few letters whose lower case is longer
        lower = text
    for name in _NAMES if text.isascii() else _NAMES + _HAN_NAMES:
        at = lower.find(name)
        while at >= 0:
            found = _ASSIGNED.match(text, at)
            if found and (not found["key"] or _KEY_OF.search(text, max(0, at - 12), at)):
                start, end = found.span("quoted" if found["quoted"] else "bare")
                if not found["quoted"]:
                    end = start + len(text[start:end].rstrip(".,;:!?)]}'\"`>"))
                if _is_secret(text[start:end], bool(found["password"]), bool(found["quoted"])):
                    yield start, end
            at = lower.find(name, at + len(name))


@cache
def _shapes() -> list[tuple[re.Pattern[str], bool, Any]]:
    """(pattern, whether a group is the secret, a check of the match) of each plugin."""
    from detect_secrets.plugins.aws import AWSKeyDetector
    from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
    from detect_secrets.plugins.basic_auth import BasicAuthDetector
    from detect_secrets.plugins.discord import DiscordBotTokenDetector
    from detect_secrets.plugins.github_token import GitHubTokenDetector
    from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
    from detect_secrets.plugins.jwt import JwtTokenDetector
    from detect_secrets.plugins.mailchimp import MailchimpDetector
    from detect_secrets.plugins.npm import NpmDetector
    from detect_secrets.plugins.openai import OpenAIDetector
    from detect_secrets.plugins.pypi_token import PypiTokenDetector
    from detect_secrets.plugins.sendgrid import SendGridDetector
    from detect_secrets.plugins.slack import SlackDetector
    from detect_secrets.plugins.square_oauth import SquareOAuthDetector
    from detect_secrets.plugins.stripe import StripeDetector
    from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
    from detect_secrets.plugins.twilio import TwilioKeyDetector

    plugins: tuple[Any, ...] = (
        AWSKeyDetector,
        AzureStorageKeyDetector,
        BasicAuthDetector,
        DiscordBotTokenDetector,
        GitHubTokenDetector,
        GitLabTokenDetector,
        MailchimpDetector,
        NpmDetector,
        OpenAIDetector,
        PypiTokenDetector,
        SendGridDetector,
        SlackDetector,
        SquareOAuthDetector,
        StripeDetector,
        TelegramBotTokenDetector,
        TwilioKeyDetector,
    )
    shapes: list[tuple[re.Pattern[str], bool, Any]] = [
        # ASCII: \w in them is meant for program text, and shall not take the Chinese character behind a token.
        (re.compile(pattern.pattern, pattern.flags & ~re.UNICODE | re.ASCII), plugin.__name__ in _GROUPED, bool)
        for plugin in plugins
        for pattern in plugin.denylist
    ]
    shapes += [(pattern, False, bool) for pattern in _MORE]
    # The plugin's pattern ends lazily, which takes nothing of the signature.
    jwt = re.compile(r"eyJ[A-Za-z0-9_=-]+\.[A-Za-z0-9_=-]+(?:\.[A-Za-z0-9_+/=-]*)?")
    shapes.append((jwt, False, lambda token: JwtTokenDetector.is_formally_valid(token)))
    return shapes


def _private_keys(text: str) -> Iterator[Span]:
    if "PRIVATE KEY" not in text:
        return
    from detect_secrets.plugins.private_key import PrivateKeyDetector

    for header in PrivateKeyDetector.denylist:
        for found in header.finditer(text):
            if not text.startswith("-----", found.start() - 5):
                continue
            body = found.end() + 5
            end = _PEM_END.search(text, body)
            tail = _PEM_BODY.match(text, body)
            yield found.start() - 5, end.end() if end else (tail.end() if tail else body)


def _is_secret(value: str, password: bool, quoted: bool) -> bool:
    from detect_secrets.filters import heuristic

    letters, digits = any(map(str.isalpha, value)), any(map(str.isdigit, value))
    if not (letters and digits) or not value.isascii():
        return False
    if _PLACEHOLDER.search(value) or heuristic.is_templated_secret(value):
        return False
    if heuristic.is_prefixed_with_dollar_sign(value):
        return False
    if heuristic.is_sequential_string(value) or heuristic.is_potential_uuid(value):
        return False
    if not quoted and any(mark in value for mark in "()[]"):  # a call or an index: code, not a value
        return False
    if password:
        return True
    return len(value) >= (8 if quoted else 12) and _entropy(value) >= (2.5 if quoted else 3.0)


@cache
def _meter() -> Any:
    from detect_secrets.plugins.high_entropy_strings import Base64HighEntropyString

    return Base64HighEntropyString(limit=0)


def _entropy(value: str) -> float:
    """Bits a character (Shannon), as the library measures it."""
    return float(_meter().calculate_shannon_entropy(value))
