"""Text that is JSON as a whole: what is found in it is replaced so that it stays JSON, and all else stays as written.

Tool calls keep their arguments so. What is found may reach over quotes (a password that is taken up to the next space),
and a number has no place for a mask: it becomes a string.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence

from jobs.data.hits import Hit

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*')


def is_json(text: str) -> bool:
    """Whether it is an object or an array."""
    bare = text.strip()
    if bare[:1] + bare[-1:] not in ("{}", "[]"):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def replaced(text: str, hits: Sequence[Hit], stand_in: Callable[[Hit], str]) -> str:
    """The JSON with its hits replaced, in strings, keys and numbers.

    Args:
        hits: of this text, in order and not overlapping, none of which ends within an escape sequence.
    """
    parts, done, first = [], 0, 0
    taken: Counter[str] = Counter()
    for token in _TOKEN.finditer(text):
        while first < len(hits) and hits[first].end <= token.start():
            first += 1
        if first == len(hits):
            break
        here = [hit for hit in hits[first : first + len(token[0])] if hit.start < token.end()]
        if not here:
            continue
        written = _string(text, token, here, stand_in) if token[0][0] == '"' else json.dumps(stand_in(here[0]))
        if re.compile(r"\s*:").match(text, token.end()):  # a key: two of them must not become one
            taken[written] += 1
            written = written if taken[written] == 1 else f'{written[:-1]} {taken[written]}"'
        parts += [text[done : token.start()], written]
        done = token.end()
    return "".join([*parts, text[done:]])


def _string(text: str, token: re.Match[str], hits: Sequence[Hit], stand_in: Callable[[Hit], str]) -> str:
    parts, done = [], token.start()
    for hit in hits:
        start, end = max(hit.start, token.start() + 1), min(hit.end, token.end() - 1)
        if start < end:
            parts += [text[done:start], json.dumps(stand_in(hit))[1:-1]]
            done = end
    return "".join([*parts, text[done : token.end()]])
