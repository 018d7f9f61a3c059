"""From a conversation to tokens, by the model's own chat template, with the ones to learn marked.

Learned are, in every assistant turn, the tokens that the model must produce when it serves: from the end of the
generation prompt up to and including the token that ends the turn. Not learned are headers, and the newline that
some templates put behind the end-of-turn token, since generation has stopped by then.

Where a turn's tokens stand is found on the rendered text, which is then tokenised once, as a whole, with offsets:

1. A template with {% generation %} markers says it itself.
2. Otherwise the conversation up to the turn, with the generation prompt, is rendered. It must be how the whole
   begins; what follows, up to where the rendering that includes the turn ends, is the turn.
3. Templates that write a last turn differently (Qwen3 puts an empty <think> block only there) or close the whole
   conversation (Phi-3) are followed as far as the two renderings agree on a turn's end.

What none of these settles is Unusable, with the turn and the reason. Guessed spans would train on the wrong tokens,
and nobody would see it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError, TemplateSyntaxError

from cluster.errors import DataError, ModelError
from jobs.formats import Conversation, Example, Message, Text
from jobs.rows import Unusable

if TYPE_CHECKING:  # importing transformers takes seconds, and whoever has a tokenizer has done it
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["error", "drop", "truncate"]
Span = tuple[int, int]  # characters [start, end) of a text
Dicts = list[dict[str, object]]  # turns, or tools, as templates take them

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = Conversation((Message("user", "Which colour?"), Message("assistant", "Blue it is.")))


@dataclass(frozen=True)
class Sample:
    """Token ids, and for each whether it is learned; both of the same length. The first token never is, because
    nothing stands before it: so samples can lie side by side in a pack without learning from one another."""

    input_ids: list[int]
    supervised: list[bool]


class Renderer:
    """Turns examples into samples of at most `max_tokens` tokens.

    `overlong` says what becomes of a longer one: Unusable ("error", "drop"), or its head ("truncate"), as long as that
    still holds something to learn. Raises ModelError when the tokenizer cannot be used for the purpose at all.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, overlong: Overlong = "error") -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.name_or_path or "the model"
        self._max_tokens = max_tokens
        self._overlong = overlong
        self._probed = False
        if not tokenizer.is_fast:
            raise ModelError(f"{self._model}: a tokenizer.json is needed, which says which text each token covers")
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{self._model}: the tokenizer names no eos_token, so no answer would ever end: set one")

    def render(self, example: Example) -> Sample | Unusable:
        """The example's tokens, or why it has none to learn."""
        try:
            if isinstance(example, Text):
                return self._fitted(*self._text(example))
            if not self._probed:
                self._probe()
            return self._fitted(*self._conversation(example))
        except DataError as error:  # raised below, always for this example alone
            return Unusable(str(error))

    def _probe(self) -> None:
        """Render the plainest exchange, so that a template's own fault is not laid on the first row."""
        try:
            self._template(None)
            self._conversation(_PROBE)
        except DataError as error:
            raise ModelError(f"{self._model}: its chat template cannot render a plain exchange: {error}") from error
        self._probed = True

    def _text(self, text: Text) -> tuple[list[int], list[bool]]:
        """All of the completion and an end-of-sequence token. The tokenizer adds its own BOS here, where no template
        has written one."""
        whole = text.prompt + text.completion
        _check_encodable(whole)
        ids, supervised = self._encoded(whole, [(len(text.prompt), len(whole))], add_special_tokens=True)
        if ids[-1] == self._tokenizer.eos_token_id:
            return ids, [*supervised[:-1], True]
        return [*ids, self._tokenizer.eos_token_id], [*supervised, True]

    def _conversation(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        turns = [_turn(message) for message in conversation.messages]
        tools = [dict(tool) for tool in conversation.tools] or None
        self._refuse_control_tokens(turns, tools)
        whole = self._rendered(turns, tools)
        _check_encodable(whole)
        self._check_nothing_is_left_out(conversation, whole)
        spans = self._marked(conversation, turns, tools, whole)
        if spans is None:
            spans = []
            for index, message in enumerate(conversation.messages):
                if message.role == "assistant" and message.supervised:
                    span = self._span(turns, tools, whole, index)
                    _check_answer(index + 1, message, whole[slice(*span)])
                    spans.append(span)
        learned, rest = whole[: spans[-1][1]], whole[spans[-1][1] :]  # nothing is learned from what follows
        ids, supervised = self._encoded(learned, spans, add_special_tokens=False)
        if not rest.strip() and not learned.endswith(self._control_tokens):
            # A template that closes no turn: without this the model would learn to answer, but never to stop.
            return [*ids, self._tokenizer.eos_token_id], [*supervised, True]
        return ids, supervised

    def _marked(
        self,
        conversation: Conversation,
        turns: Dicts,
        tools: Dicts | None,
        whole: str,
    ) -> list[Span] | None:
        """The spans that the template's own {% generation %} markers give, made to include the end of each turn;
        None when it has no markers, or when they don't cover every turn (then rendering in steps decides)."""
        answers = [message for message in conversation.messages if message.role == "assistant"]
        if not _MARKER.search(self._template(tools)) or not all(message.supervised for message in answers):
            return None
        encoded = self._tokenizer.apply_chat_template(
            turns,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        tokens = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        marked = [[offset for _, offset in run] for learned, run in groupby(tokens, itemgetter(0)) if learned]
        if len(marked) < len(answers):
            return None
        spans = [(offsets[0][0], offsets[-1][1]) for offsets in marked]
        # Only what closes a turn can follow the last one: that token, left outside by many markers, is learned too.
        closer = self._control.match(whole, spans[-1][1])
        for number, (start, end) in enumerate(spans):
            text = whole[start:end].rstrip()
            if text.endswith(self._control_tokens):
                spans[number] = start, start + len(text)
            elif closer and whole.startswith(closer[0], end):
                spans[number] = start, end + len(closer[0])
        return spans

    def _span(self, turns: Dicts, tools: Dicts | None, whole: str, index: int) -> Span:
        """Where turn `index` stands in `whole`, without its header: rules 2 and 3 above."""
        unsettled = DataError(
            f"turn {index + 1}: the chat template writes turns differently once others follow, so that the tokens of "
            "this one cannot be told for certain: end the row with this turn, or give it weight 0"
        )
        asked = self._rendered(turns[:index], tools, generation_prompt=True)
        start = len(asked)
        if not whole.startswith(asked):
            # Some prompts go on into the answer (<think>): then the header, which the two share, still is a start.
            start = _shared(asked, whole)
            if start <= len(self._rendered(turns[:index], tools)):
                raise unsettled
        shown = whole if index == len(turns) - 1 else self._rendered(turns[: index + 1], tools)
        if not shown.startswith(whole[:start]):
            raise unsettled
        alone, here = shown[start:], whole[start:]
        closed = alone.rstrip()
        if here.startswith(closed) and closed.endswith(self._control_tokens):
            return start, start + len(closed)
        shared = here[: _shared(alone, here)]
        if shared.startswith(closed):
            return start, start + len(shared)
        if ends := [found.end() for found in self._control.finditer(shared)]:
            return start, start + ends[-1]
        for found in self._control.finditer(here):
            if closed.endswith(here[: found.end()]):
                return start, start + found.end()
        raise unsettled

    def _encoded(self, text: str, spans: list[Span], add_special_tokens: bool) -> tuple[list[int], list[bool]]:
        """Tokens of the text; learned are those that cover any character of a span."""
        # Not by transformers' own call, which takes 100 µs beside the 230 of the tokenizer itself. It also lets go of
        # a limit of length that tokenizer.json may set; so that has to be done here.
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoded = backend.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        supervised = [False] * len(ids)
        for start, end in spans:  # asking for the ends of a span takes a tenth of what all tokens' offsets take
            covered = (encoded.char_to_token(place) for place in range(start, end))
            first = next((token for token in covered if token is not None), None)
            if first is None:
                continue
            covered = (encoded.char_to_token(place) for place in range(end - 1, start - 1, -1))
            last = next(token for token in covered if token is not None)
            # A character of several bytes may be several tokens, of which that names the first.
            while (following := encoded.token_to_chars(last + 1)) is not None and following[0] < end:
                last += 1
            supervised[first : last + 1] = [True] * (last + 1 - first)
        return ids, supervised

    def _fitted(self, ids: list[int], supervised: list[bool]) -> Sample | Unusable:
        """The sample, if it is within the limit and holds something to learn."""
        length = len(ids)
        if length > self._max_tokens and self._overlong != "truncate":
            reason = f"{length:,} tokens, longer than sequence_length {self._max_tokens:,}"
            if self._overlong == "drop":
                return Unusable(reason, agreed=True)
            return Unusable(f"{reason}: raise it, or set data.overlong: truncate")
        sample = Sample(ids[: self._max_tokens], [False, *supervised[1 : self._max_tokens]])
        if any(sample.supervised):
            return sample
        if length > self._max_tokens:
            return Unusable(f"no token to learn within sequence_length {self._max_tokens:,}: raise it")
        return Unusable("no token to learn")

    def _rendered(self, turns: Dicts, tools: Dicts | None, generation_prompt: bool = False) -> str:
        """The template's text. Templates refuse what they don't support (system turns, two questions in a row) by
        raising, and stumble over what they don't expect with Python's own errors."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tools=tools, add_generation_prompt=generation_prompt, tokenize=False
                )
            )
        except TemplateSyntaxError as error:
            raise ModelError(f"{self._model}: chat template, line {error.lineno}: not valid Jinja: {error}") from error
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"the chat template refuses it: {error}") from error

    def _template(self, tools: Dicts | None) -> str:
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise ModelError(
                f"{self._model}: the tokenizer has no chat template, which chat data needs: use the model's instruct "
                "version, put a chat_template.jinja beside its tokenizer.json, or give rows of prompt and completion"
            ) from error

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        """The tokenizer's special tokens, the longest first."""
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        return tuple(sorted(added | set(self._tokenizer.all_special_tokens), key=len, reverse=True))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._control_tokens)))

    @cached_property
    def _shows_tools(self) -> bool:
        """Whether tools change what the template writes."""
        turns = [_turn(message) for message in _PROBE.messages]
        tool: dict[str, object] = {
            "type": "function",
            "function": {"name": "probe", "description": "", "parameters": {}},
        }
        return self._rendered(turns, [tool]) != self._rendered(turns, None)

    def _check_nothing_is_left_out(self, conversation: Conversation, whole: str) -> None:
        """A template without a place for system turns or tools may just pass over them: the model would then be
        taught answers to instructions that it was never shown."""
        for number, message in enumerate(conversation.messages, start=1):
            if message.role in ("system", "user") and message.content.strip() not in whole:
                raise DataError(f"turn {number}: the chat template leaves out or rewrites the {message.role}'s text")
        if conversation.tools and not self._shows_tools:
            raise DataError("tools: the chat template has no place for them")

    def _refuse_control_tokens(self, turns: Dicts, tools: Dicts | None) -> None:
        """A special token inside a turn's text would be read as the real one: an end of turn in the middle of an
        answer, or a forged system turn."""
        for place, value in [*((f"turn {n}", turn) for n, turn in enumerate(turns, start=1)), ("tools", tools)]:
            for text in _strings(value):
                if found := self._control.search(text):
                    raise DataError(f"{place}: holds the control token {found[0]!r}, which would be read as a real one")


def _turn(message: Message) -> dict[str, object]:
    """The dictionary that chat templates expect; an absent key, not a null one, is what they test for."""
    turn: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    optional = {"tool_call_id": message.tool_call_id, "name": message.name, "reasoning_content": message.reasoning}
    return turn | {key: value for key, value in optional.items() if value is not None}


def _check_encodable(text: str) -> None:
    """JSON can hold half of a surrogate pair (an emoji cut in two), which is no text in any encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"holds {text[error.start]!a}, half of a surrogate pair: cut or export it again") from error


def _check_answer(number: int, message: Message, learned: str) -> None:
    """The last line of an answer and the names of its calls must be in what is learned. (Not all of it: reasoning of
    earlier turns is dropped by some templates, as they do when the model serves.)"""
    lines = message.content.strip().splitlines()
    if lines and lines[-1].strip() not in learned:
        raise DataError(f"turn {number}: the chat template leaves out or rewrites the answer")
    for call in message.tool_calls:
        if call.name not in learned:
            raise DataError(f"turn {number}: the chat template has no place for tool calls ('{call.name}' is missing)")


def _strings(value: object) -> Iterator[str]:
    """All texts in a nest of lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
