"""A row as the model will see it: tokens, what is learned of them, and what a limit cuts off.

By the same code as `jobs.dataset`, so that what is shown is what is trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from cluster.errors import DataError, ModelError
from jobs.chat import Overlong, Renderer
from jobs.data.rules import Rules
from jobs.formats import normalise
from jobs.rows import Place, Row, Unusable

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

LEARNED = "⟦", "⟧"
_PICTURES = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {0x7F: "␡"}
    | dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")
)
"""Control characters as pictures, so that a row cannot command the terminal that shows it."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that are alike: all or none learned, all or none control tokens."""

    text: str
    learned: bool
    control: bool


@dataclass(frozen=True)
class Shown:
    """A sample with what stands in its way, if anything: `left_out` is why the recipe leaves it out.

    `cut_ids` and `cut_supervised` are what lies behind the limit; `mended` is what the recipe's rules put right.
    """

    place: str
    input_ids: list[int]
    supervised: list[bool]
    cut_ids: list[int]
    cut_supervised: list[bool]
    left_out: str | None
    mended: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        kept = f"{self.place}: {len(self.input_ids):,} tokens, {sum(self.supervised):,} learned"
        if self.cut_ids:
            kept += f"; cut: {len(self.cut_ids):,} tokens, {sum(self.cut_supervised):,} of them to learn"
        kept += f"; put right: {', '.join(self.mended)}" if self.mended else ""
        return kept + (f"; left out: {self.left_out}" if self.left_out else "")


def ruled(place: Place, row: Row | Unusable, rules: Rules) -> tuple[Row | Unusable, tuple[str, ...]]:
    """The row as the rules leave it, and what they put right. Raises DataError where they take it out."""
    from jobs.data.examine import Examiner  # here, because few recipes have rules
    from jobs.data.request import make_request

    if isinstance(row, Unusable):
        return row, ()
    request, _ = make_request([], [], rules)
    examined = Examiner(request).examine(row)
    if examined.row is None:
        last = examined.findings[-1]
        raise DataError(f"{place}: {last.outcome} by data.rules: {last.check}: {last.note}")
    return examined.row, tuple(f"{found.check} ({found.note})" for found in examined.findings if found.now)


def look(
    tokenizer: "PreTrainedTokenizerBase",
    place: Place,
    row: Row | Unusable,
    max_tokens: int,
    overlong: Overlong,
    mended: tuple[str, ...] = (),
) -> Shown:
    """What becomes of a row. Raises DataError and ModelError with its place, where it would be refused."""
    example = row if isinstance(row, Unusable) else normalise(row)
    if isinstance(example, Unusable):
        raise DataError(f"{place}: {example.reason}")
    renderer = Renderer(tokenizer, max_tokens, overlong)
    try:
        ids, supervised = renderer.tokens(example)
    except (DataError, ModelError) as error:
        raise type(error)(f"{place}: {error}") from error
    fitted = renderer.fitted(ids, supervised)
    if isinstance(fitted, Unusable) and not fitted.agreed:
        raise DataError(f"{place}: {fitted.reason}")
    return Shown(
        str(place),
        ids[:max_tokens],
        [False, *supervised[1:max_tokens]],
        ids[max_tokens:],
        supervised[max_tokens:],
        fitted.reason if isinstance(fitted, Unusable) else None,
        mended,
    )


def pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], supervised: Sequence[bool]) -> list[Piece]:
    """The text of all tokens, control tokens too, in runs."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    found, end, done = [], 0, ""
    marks = zip(supervised, (number in special for number in ids), strict=True)
    for (learned, control), run in groupby(marks):
        end += len(list(run))
        # All up to here, not the run alone: some decoders take the space from whatever comes first.
        whole = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        found.append(Piece(whole[len(done) :].translate(_PICTURES), learned, control))
        done = whole
    return found


def marked(runs: Sequence[Piece]) -> str:
    """As plain text, what is learned between ⟦ and ⟧."""
    text = ""
    for learned, alike in groupby(runs, lambda piece: piece.learned):
        joined = "".join(piece.text for piece in alike)
        text += f"{LEARNED[0]}{joined}{LEARNED[1]}" if learned else joined
    return text


def coloured(runs: Sequence[Piece]) -> "Text":
    """For a terminal: what is learned is green, control tokens are bold, and the rest is dim."""
    from rich.text import Text

    text = Text()
    for piece in runs:
        text.append(piece.text, ("bold " if piece.control else "") + ("green" if piece.learned else "dim"))
    return text
