"""What an object of a store is called, and how it is listed: the same in every kind of store."""

from dataclasses import dataclass

from cluster.errors import StoreError

TEMPORARY = ".tmp-"
"""How the name of a half-written file begins. No key segment may begin with it."""

_MAX_KEY_BYTES = 900  # S3 allows 1,024 for prefix and key together
_MAX_SEGMENT_BYTES = 255  # the longest file name on Linux


@dataclass(frozen=True)
class ObjectInfo:
    """A listed object: its key below the store's prefix, and its size in bytes."""

    key: str
    size: int


def check_key(key: str) -> str:
    """`key` itself, if every store can hold it and hold it alike; raises StoreError otherwise.

    A key is one or more non-empty segments between `/`. It never leaves the store's prefix, and has no
    control characters, because an S3 listing (XML) cannot carry them.
    """
    segments = key.split("/")
    fault = ""
    if "" in segments:
        fault = "it has an empty segment (no leading, trailing or double /)"
    elif "." in segments or ".." in segments:
        fault = "'.' and '..' are not names"
    elif any(segment.startswith(TEMPORARY) for segment in segments):
        fault = f"names that begin with {TEMPORARY} are kept for half-written files"
    elif any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in key):
        fault = "it has a control character or half a character"
    elif len(key.encode()) > _MAX_KEY_BYTES:
        fault = f"it has more than {_MAX_KEY_BYTES} bytes"
    elif any(len(segment.encode()) > _MAX_SEGMENT_BYTES for segment in segments):
        fault = f"a segment has more than {_MAX_SEGMENT_BYTES} bytes"
    if fault:
        raise StoreError(f"{key!r} cannot be a key: {fault}; use keys from cluster/keys.py")
    return key
