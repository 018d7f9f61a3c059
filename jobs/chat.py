"""From a row to tokens with the ones to learn marked: a conversation by the model's own template, text as it is.

What is learned of a conversation is found on its text (`template.py`), which is then tokenised once, as a whole, with
offsets. What cannot be used is Unusable, with the turn and the reason.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.errors import AskedOtherwise, DataError, ModelError
from jobs import truth
from jobs.formats import Conversation, Example, Text
from jobs.rows import Unusable
from jobs.template import PROBE, Span, Template

if TYPE_CHECKING:  # importing transformers takes seconds, and whoever has a tokenizer has done it
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True)
class Sample:
    """Token ids, and for each whether it is learned; both of the same length. The first token never is, because
    nothing stands before it: so samples can lie side by side in a pack without learning from one another. `cut` tokens
    lay behind the limit and are gone."""

    input_ids: list[int]
    supervised: list[bool]
    cut: int = 0


class Renderer:
    """Turns examples into samples of at most `max_tokens` tokens.

    `overlong` says what becomes of a longer one: Unusable ("error", "drop"), or its head ("truncate"), as long as that
    still holds something to learn. `stops` are the token ids at which generation ends besides the tokenizer's
    eos_token; None: what the settings say in the folder that the tokenizer is from, as serving has it. Raises
    ModelError when the tokenizer cannot be used for the purpose at all.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_tokens: int,
        overlong: Overlong = "error",
        stops: Iterable[int] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.name_or_path or "the model"
        self._max_tokens = max_tokens
        self._overlong = overlong
        self._probed = False
        self._headers: dict[str, list[int]] = {}  # tokens of what comes before answers, by its text
        if not tokenizer.is_fast:
            raise ModelError(f"{self._model}: a tokenizer.json is needed, which says which text each token covers")
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{self._model}: the tokenizer names no eos_token, so no answer would ever end: set one")
        self._template = Template(tokenizer, _stops_beside(tokenizer) if stops is None else stops)

    def render(self, example: Example) -> Sample | Unusable:
        """The example's tokens, or why it has none to learn."""
        try:
            return self.fitted(*self.tokens(example))
        except DataError as error:  # raised below, always for this example alone
            return Unusable(str(error))

    def tokens(self, example: Example) -> tuple[list[int], list[bool]]:
        """All ids and marks of an example, however long. Raises DataError when it cannot be used."""
        if isinstance(example, Text):
            return self._text(example)
        if not self._probed:
            self._probe()
        return self._conversation(example)

    def fitted(self, ids: list[int], supervised: list[bool]) -> Sample | Unusable:
        """The sample, if it is within the limit and holds something to learn."""
        length = len(ids)
        if length > self._max_tokens and self._overlong != "truncate":
            reason = f"{length:,} tokens, longer than sequence_length {self._max_tokens:,}"
            if self._overlong == "drop":
                return Unusable(reason, agreed=True)
            return Unusable(f"{reason}: raise it, or set data.overlong: truncate")
        kept = ids[: self._max_tokens]
        sample = Sample(kept, [False, *supervised[1 : self._max_tokens]], length - len(kept))
        if any(sample.supervised):
            return sample
        if length > self._max_tokens:
            return Unusable(f"no token to learn within sequence_length {self._max_tokens:,}: raise it")
        return Unusable("no token to learn")

    def _probe(self) -> None:
        """Render the plainest exchange, so that a template's own fault is not laid on the first row."""
        self._template.check_exists()
        try:
            self._conversation(PROBE)
        except AskedOtherwise:
            pass  # right for rows with reasoning, perhaps; the others are named one by one
        except DataError as error:
            raise ModelError(f"{self._model}: its chat template cannot render a plain exchange: {error}") from error
        self._probed = True

    def _text(self, text: Text) -> tuple[list[int], list[bool]]:
        """All of the completion and an end-of-sequence token. The tokenizer adds its own BOS here, where no template
        has written one."""
        whole = text.prompt + text.completion
        truth.check_encodable(whole)
        ids, supervised = self._encoded(whole, [(len(text.prompt), len(whole))], add_special_tokens=True)
        self._check_one_start(ids, "the tokenizer adds it by itself, so take it out of the text")
        if ids[-1] == self._tokenizer.eos_token_id:
            return ids, [*supervised[:-1], True]
        return [*ids, self._tokenizer.eos_token_id], [*supervised, True]

    def _conversation(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        whole, spans, starts = self._template.rendered(conversation)
        learned = whole[: spans[-1][1]]  # nothing is learned from what follows
        ids, supervised = self._encoded(learned, spans, add_special_tokens=False, starts=starts)
        self._check_one_start(ids, "take one out of the chat template")
        if not self._template.is_closed(learned):  # a template that closes no turn
            return [*ids, self._tokenizer.eos_token_id], [*supervised, True]
        return ids, supervised

    def _encoded(
        self, text: str, spans: list[Span], add_special_tokens: bool, starts: Sequence[int] = ()
    ) -> tuple[list[int], list[bool]]:
        """Tokens of the text; learned are those that cover any character of a span.

        Args:
            starts: where answers begin: up to there the tokens are those that the model is asked with.
        """
        # Not by transformers' own call, which takes 100 µs beside the 230 of the tokenizer itself. It also lets go of
        # a limit of length that tokenizer.json may set; so that has to be done here.
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoded = backend.encode(text, add_special_tokens=add_special_tokens)
        ids, offsets = encoded.ids, encoded.offsets
        supervised = [False] * len(ids)
        for start, end in spans:
            first, behind = bisect_right(offsets, start, key=itemgetter(1)), _place(offsets, end)
            supervised[first:behind] = [True] * (behind - first)
            if start in starts and first < behind and offsets[first][0] < start:
                raise DataError(
                    f"the token {text[slice(*offsets[first])]!r} holds the end of what the model is asked with and the "
                    "beginning of the answer: served, it would be asked with other tokens. Take white space from the "
                    "answer's beginning, or from the end of the template's generation prompt"
                )
        if self._unknown is not None and self._unknown in ids:
            for number, learned, place in zip(ids, supervised, offsets, strict=True):
                if learned and number == self._unknown:
                    raise DataError(f"{text[slice(*place)]!r} is not in the vocabulary: nothing would be learned of it")
        for begin in reversed(starts):
            if text[max(0, begin - 2) : begin].isspace():
                self._ask(text, begin, offsets, ids, supervised)
        return ids, supervised

    def _ask(self, text: str, begin: int, offsets: list[Span], ids: list[int], supervised: list[bool]) -> None:
        """Put the tokens of a header by itself in the place of those that it has with an answer behind it.

        Some tokenizers join all white space at the end of a text (two newlines), which is where a server's prompt ends,
        and leave the last one apart where words follow.
        """
        header = self._template.header(text, begin)
        if header is None:
            return
        if header not in self._headers:
            self._headers[header] = list(self._tokenizer(header, add_special_tokens=False, verbose=False)["input_ids"])
        asked = self._headers[header]
        first, behind = _place(offsets, begin - len(header)), _place(offsets, begin)
        if ids[first:behind] != asked:
            supervised[first:behind] = [False] * len(asked)
            ids[first:behind] = asked

    @cached_property
    def _unknown(self) -> int | None:
        """The id for text that no token covers, where that means nothing else."""
        number = self._tokenizer.unk_token_id
        others = (self._tokenizer.eos_token_id, self._tokenizer.bos_token_id, self._tokenizer.pad_token_id)
        return None if number in others else number

    def _check_one_start(self, ids: list[int], advice: str) -> None:
        """Two BOS tokens are a beginning that the model has never seen (a text that was rendered beforehand)."""
        bos = self._tokenizer.bos_token_id
        if bos is not None and bos != self._tokenizer.eos_token_id and ids[:2] == [bos, bos]:
            raise DataError(f"begins with two BOS tokens ({self._tokenizer.bos_token!r}): {advice}")


def _place(offsets: list[Span], character: int) -> int:
    """The first token that begins at this character or behind it."""
    return bisect_left(offsets, character, key=itemgetter(0))


def _stops_beside(tokenizer: "PreTrainedTokenizerBase") -> Iterable[int]:
    folder = Path(tokenizer.name_or_path)
    if not folder.is_dir():
        return ()
    from jobs.model import stop_ids  # here: by now whoever has a tokenizer has paid for torch too

    return stop_ids(folder)
