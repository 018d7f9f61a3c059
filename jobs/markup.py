"""Elements of a page. Whatever text they hold is escaped when they are written, so that it can never become markup."""

import re
from xml.etree.ElementTree import Element, tostring

_NOT_FOR_PAGES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def tag(name: str, attributes: dict[str, str | float], *children: Element | str) -> Element:
    """An element with its attributes and what is in it, in order. Numbers are written to a tenth."""
    element = Element(name, {key: _attribute(value) for key, value in attributes.items()})
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + _clean(child)
        else:
            element.text = (element.text or "") + _clean(child)
    return element


def write(page: Element) -> str:
    """The whole page as HTML."""
    return f"<!doctype html>\n{tostring(page, encoding='unicode', method='html')}\n"


def _attribute(value: str | float) -> str:
    return _clean(value) if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def _clean(text: str) -> str:
    """Without characters that no page may hold."""
    return _NOT_FOR_PAGES.sub("\N{REPLACEMENT CHARACTER}", text)
