"""From tokens to text that may be shown: whole characters, and never a part of a stop string.

A token is not a character: one emoji may take three tokens, and a stop string may begin in one token and end in the
next. What is given out is never taken back.
"""

from collections.abc import Callable, Iterable

_UNFINISHED = "\ufffd"  # what tokenizers decode an incomplete UTF-8 sequence to


Decoder = Callable[[Iterable[int]], str]  # the text of token ids, special tokens left out


class TextStream:
    """The text of one sequence as its tokens come.

    Tokens are decoded in a window that begins with the last ones already shown, because a tokenizer may drop or add a
    space at the beginning of what it decodes. Text at the window's end is held back while it is an unfinished
    character or could be the beginning of a stop string. A stop string ends the text when one of its characters comes
    from a token that may stop.
    """

    def __init__(self, decode: Decoder, stop: tuple[str, ...]) -> None:
        self._decode = decode
        self._stop = stop
        self._window: list[int] = []
        self._shown = 0  # tokens of the window whose text is out of the decoder
        self._held = ""  # decoded, but may begin a stop string
        self._exempt = 0  # characters of it from tokens that may not stop
        self._may_stop = True  # the last token
        self.is_stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Take the next token; the text that may be shown now. Sets `is_stopped` when a stop string is complete."""
        self._window.append(token_id)
        self._may_stop = may_stop
        text = self._decode(self._window)
        if text.endswith(_UNFINISHED):
            return ""
        return self._release(text)

    def flush(self) -> str:
        """The sequence has ended: all that was held back, unless it completes a stop string after all."""
        text = self._release(self._decode(self._window)) if len(self._window) > self._shown else ""
        rest, self._held = self._held, ""
        return text if self.is_stopped else text + rest

    def _release(self, text: str) -> str:
        before = self._decode(self._window[: self._shown])
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        self._held += text[len(before) :]
        if not self._may_stop:
            self._exempt = len(self._held)

        begins = ((stop, max(0, self._exempt - len(stop) + 1)) for stop in self._stop)
        found = [at for at in (self._held.find(stop, begin) for stop, begin in begins) if at >= 0]
        if found:
            self.is_stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        cut = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[:cut], self._held[cut:]
        self._exempt = max(0, self._exempt - cut)
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
