"""The chat page: for a person who wants to see what a model answers, and the way to show what licences want shown.

One file, `page.html`, without anything from elsewhere: it speaks to the same endpoint as everybody. Its policy lets run
and style only what is in the file, by digest, so that no text of a model could, and lets it connect to its own server.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse

_FILE = Path(__file__).with_name("page.html")


@cache
def response() -> HTMLResponse:
    """The page with its policy."""
    text = _FILE.read_text()
    script, style = (_digest(text, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src '{script}'; style-src '{style}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)


def _digest(text: str, tag: str) -> str:
    """Of what is between a tag and its end (Content Security Policy 3, 6.7.3.3)."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found is not None, f"{_FILE.name} has no <{tag}>"
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
