"""Telephone numbers, payment cards, IBAN and IP addresses: a scan for candidates, a library's verdict on each.

All functions take folded text and give spans. A candidate stands alone: no ASCII letter or digit touches it. Chinese
characters may.
"""

import ipaddress
import re
from collections.abc import Iterator
from functools import lru_cache

Span = tuple[int, int]

REGIONS = ("US", "GB", "DE", "CN")

_DATE = r"(?:19|20)\d\d[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](?:19|20)\d\d"
_OTHERS = re.compile(
    r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"  # UUID
    r"|(?<![0-9A-Za-z])(?=[0-9a-fA-F]*[a-fA-F])(?=[a-fA-F]*\d)(?:0x)?[0-9a-fA-F]{20,}(?![0-9A-Za-z])"  # digest
    rf"|(?<!\d)(?:{_DATE})(?:[T ]\d{{1,2}}(?::\d\d){{1,2}}(?:\.\d+)?)?(?!\d)"  # date, time of day
    r"|(?<![\w])97[89][- ]?(?:\d[- ]?){9}\d(?!\d)"  # ISBN-13
    r"|[$€£¥₹]\s?\d[\d,.]*"  # price
    r"|(?<!\d)\d*\.\d{5,}(?![\d.])"  # 3.14159265
)
_CONTEXT_CHARACTERS = 32
_OTHER_NUMBER = re.compile(
    r"(?:\b(?:order|invoice|tracking|ticket|serial|sku|isbn|issn|doi|part|model|case|ref|reference|item|product|version|"
    r"build|batch|lot|transaction|shipment|parcel|receipt|account|asin|upc|ean|pmid|arxiv|patent|rfc|id)\b"
    r"|订单|单号|编号|编码|发票|流水|快递|运单|序列|型号|版本|批次|条码|货号|工单)"
    r"(?:no\b|numbers?\b|num\b|nr\b|id\b|code\b|key\b|is\b|was\b|in\b|号码?|码|为|是|[ .:#=(\"'/-]|[A-Z]{1,3}-)*\Z",
    re.IGNORECASE,
)
_PHONE_WORD = re.compile(
    r"(?:\b(?:phone|telephone|tel|mobile|cell|call|dial|fax|whatsapp|sms|text|reach|hotline|contact|telefon|tel\.|handy|ring)"
    r"|电话|手机|致电|拨打|联系|热线|座机|传真|短信|微信)[^\n。！？]{0,20}\Z",
    re.IGNORECASE,
)

_CARD = re.compile(
    r"(?<![0-9A-Za-z.\-/+])"
    r"(?:\d{4}([ .-]?)\d{4}\1\d{4}\1\d{1,4}(?:\1\d{1,3})?|\d{4}([ .-]?)\d{6}\2\d{4,5}|\d{13,19})"
    r"(?![0-9A-Za-z])"
)
# First digits of the issuers' numbers, with their lengths: ISO/IEC 7812 and the networks' own tables.
_ISSUERS = (
    (re.compile(r"4"), {13, 16, 19}),
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), {16}),
    (re.compile(r"3[47]"), {15}),
    (re.compile(r"62|81"), {16, 17, 18, 19}),
    (re.compile(r"6011|64[4-9]|65"), {16, 19}),
    (re.compile(r"35(?:2[89]|[3-8])"), {16, 19}),
    (re.compile(r"36|30[0-5]|3095|3[89]"), {14, 16, 19}),
    (re.compile(r"50|5[6-9]|6[37]"), {13, 15, 16, 19}),
)
_IBAN_SHORTEST = 15
_IBAN = re.compile(r"(?<![0-9A-Za-z])[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]){11,30}")
_IPV4 = re.compile(r"(?<![0-9A-Za-z.\-])\d{1,3}(?:\.\d{1,3}){3}(?![0-9A-Za-z]|\.\d|-\w)")
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z.])(?<![0-9A-Fa-f:]:)(?:[0-9A-Fa-f]{1,4}:|:){2,7}(?:[0-9A-Fa-f]{1,4}|:)(?![0-9A-Za-z]|:[0-9A-Fa-f:])"
)
_VERSION = re.compile(
    r"(?:\bv|\bver\.?|version|release|build|firmware|driver|section|chapter|§|版本|固件|章节?)[^\n\w]{0,3}\Z",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    r"(?:\bip|address|host|server|client|login|from|地址|来自|登录|服务器)[^\n]{0,16}\Z", re.IGNORECASE
)

_PHONE = re.compile(r"(?<![0-9A-Za-z_.\-/=#])[+(]?\d(?:[ ().\-/]{0,3}\d){6,16}(?![0-9A-Za-z_]|[.\-/]\d|%)")
_PART = re.compile(r"[^ ]{7,}")
_NANP = re.compile(r"(?:\+?1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}\Z")
_CN_MOBILE = re.compile(r"1[3-9]\d{9}\Z")


def without_other_numbers(text: str) -> str:
    """The text with UUIDs, digests, dates, prices and long decimals blotted out, character for character."""
    return _OTHERS.sub(lambda found: "\x00" * len(found[0]), text)


def find_cards(text: str) -> Iterator[Span]:
    """Payment cards: an issuer's first digits and length, and the check digit (Luhn)."""
    for found in _CARD.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        if _is_card(digits) and not _before(_OTHER_NUMBER, text, found.start()):
            yield found.span()


def _is_card(digits: str) -> bool:
    from stdnum import luhn

    issued = any(len(digits) in lengths and issuer.match(digits) for issuer, lengths in _ISSUERS)
    return issued and len(set(digits)) > 1 and luhn.is_valid(digits)


def find_ibans(text: str) -> Iterator[Span]:
    """IBAN with the country's length and the check digits (ISO 13616, mod 97), in one piece or in groups."""
    from stdnum import iban

    found = _IBAN.search(text)
    while found:
        start, end = found.span()
        while end - start >= _IBAN_SHORTEST:  # letters of the next word, or number, may have been taken along
            touched = text[end : end + 1].isascii() and text[end : end + 1].isalnum()
            if not touched and iban.is_valid(text[start:end]):
                yield start, end
                break
            end = start + len(text[start : end - 1].rstrip(" "))
        else:
            end = start + 1
        found = _IBAN.search(text, end)


def find_ips(text: str) -> Iterator[Span]:
    """Addresses of single machines. Not: loopback, unspecified, multicast, masks, networks, version numbers."""
    if text.count(".") >= 3:
        for found in _IPV4.finditer(text):
            if _is_host(found[0]) and not _is_version(text, *found.span()):
                yield found.span()
    if text.count(":") >= 2:
        for found in _IPV6.finditer(text):
            groups = [group for group in found[0].split(":") if group]
            # C++ and Ruby write names as A::B, which would be valid addresses too.
            if len(groups) >= 3 and any(map(str.isdigit, "".join(groups))) and _is_host(found[0]):
                yield found.span()


def _is_host(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    masks = address.version == 4 and (int(address) >> 24 in (0, 255))
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or masks)


def _is_version(text: str, start: int, end: int) -> bool:
    """Whether it is a version or a section rather than an address; a network (10.0.0.0/8) is none either."""
    octets = [int(octet) for octet in text[start:end].split(".")]
    if octets[3] == 0 and text.startswith("/", end):
        return True
    if _before(_VERSION, text, start):
        return True
    return max(octets) < 20 and not _before(_ADDRESS, text, start)


def find_phones(text: str, regions: tuple[str, ...] = REGIONS) -> Iterator[Span]:
    """Telephone numbers with a country code, or as one of the regions writes them.

    Digits alone count after a word for telephone, or as a mobile number of China, whose first digits tell.
    """
    for found in _PHONE.finditer(text):
        start = found.start()
        if found[0][0] != "+" and _before(_OTHER_NUMBER, text, start):  # the nearest word tells
            continue
        announced = _before(_PHONE_WORD, text, start)
        spans = _phones_in(found[0], regions, announced)
        for first, last in spans:
            yield start + first, start + last
        if not spans and " " in found[0]:  # perhaps one number after another, of which not all are telephones
            for part in _PART.finditer(found[0]):
                for first, last in _phones_in(part[0], regions, announced):
                    yield start + part.start() + first, start + part.start() + last


@lru_cache(maxsize=8_192)
def _phones_in(candidate: str, regions: tuple[str, ...], announced: bool) -> tuple[Span, ...]:
    bare, international = candidate.isdigit(), candidate.startswith("+")
    digits = re.sub(r"\D", "", candidate)
    mobile = "CN" in regions and _CN_MOBILE.match(digits) is not None
    if bare and not announced and not mobile:
        return ()
    if "US" in regions and _NANP.match(candidate):
        return ((0, len(candidate)),)

    import phonenumbers
    from phonenumbers import Leniency, PhoneNumberMatcher

    leniency = Leniency.VALID if announced or international or bare else Leniency.STRICT_GROUPING
    best: tuple[Span, ...] = ()
    for region in ("ZZ",) if international else regions:
        if not announced and not international and not (mobile if region == "CN" else False):
            # A number that nothing announces begins with the digit that one dials within the country, usually a 0.
            trunk = _trunk(region)
            if bare or not digits.startswith(trunk or "") or region == "US":
                continue
        found = tuple((match.start, match.end) for match in PhoneNumberMatcher(candidate, region, leniency))
        if sum(end - start for start, end in found) > sum(end - start for start, end in best):
            best = found
        if best == ((0, len(candidate)),):
            break
    if best:
        return best
    if announced and not bare and len(digits) >= 10:
        try:
            number = phonenumbers.parse(candidate, regions[0] if regions else "ZZ")
        except phonenumbers.NumberParseException:
            return ()
        if phonenumbers.is_possible_number(number):
            return ((0, len(candidate)),)
    return ()


@lru_cache(maxsize=256)
def _trunk(region: str) -> str | None:
    from phonenumbers import PhoneMetadata

    metadata = PhoneMetadata.metadata_for_region(region, None)
    return metadata.national_prefix if metadata else None


def _before(words: re.Pattern[str], text: str, start: int) -> bool:
    return words.search(text, max(0, start - _CONTEXT_CHARACTERS), start) is not None
