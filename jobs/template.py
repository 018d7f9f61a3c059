"""A model's chat template: what it writes for a conversation, and where in that a turn of the assistant stands.

Learned is, of every assistant turn, what the model must produce when it serves: from the end of the generation prompt
up to and including the first token at which generation stops. Not learned are headers, and what some templates put
behind that token. It is found on the rendered text:

1. A turn begins where the conversation before it, rendered with the generation prompt, ends. The whole must begin
   with exactly that, since it is what the model is asked with.
2. It ends with the first token after that at which generation stops: the tokenizer's eos_token, or one that the
   generation settings name. That is the turn's own end when only blank text lies between it and the answer, or when
   the rendering that ends with this turn has the same there.
3. A template that closes no turn leaves the last one without an end, and `jobs.chat` adds eos_token there.
4. A template with {% generation %} markers says which part of a turn is learned; the end is added where they leave it
   out.

What none of these settles is a DataError, with the turn and the reason. Guessed spans would train on the wrong tokens,
and nobody would see it.
"""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from jinja2 import TemplateError, TemplateSyntaxError

from cluster.errors import AskedOtherwise, DataError, ModelError
from jobs import truth
from jobs.formats import Conversation, Message, ToolCall

if TYPE_CHECKING:  # importing transformers takes seconds, and whoever has a tokenizer has done it
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, end) of a text
Dicts = list[dict[str, object]]  # turns, or tools, as templates take them

PROBE = Conversation((Message("user", "Which colour?"), Message("assistant", "Blue it is.")))
_CALL = Message("assistant", "", (ToolCall("probe", {"colour": "blue"}, "call00000"),))
_HEADER_CHARACTERS = 200  # more than any family writes before an answer
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Template:
    """The chat template of a tokenizer, for generation that stops at its eos_token and at the ids `stops`.

    Attributes:
        stops: the texts of the tokens at which generation stops, the longest first.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.name_or_path or "the model"
        decoded = {str(tokenizer.decode([number])) for number in {tokenizer.eos_token_id, *stops}}
        self.stops = tuple(sorted((text for text in decoded if text.strip()), key=len, reverse=True))
        self._has_markers: dict[bool, bool] = {}
        self._stop = re.compile("|".join(map(re.escape, self.stops)))

    def check_exists(self) -> None:
        """Raise ModelError when the tokenizer has none."""
        self._source(None)

    def rendered(self, conversation: Conversation) -> tuple[str, list[Span], list[int]]:
        """The text, what of it is learned, and where learned turns begin. Raises DataError, ModelError."""
        as_text = any(message.tool_calls for message in conversation.messages) and self._takes_arguments_as_text
        turns = [_turn(message, as_text) for message in conversation.messages]
        tools = [dict(tool) for tool in conversation.tools] or None
        self._refuse_control_tokens(turns, tools)
        whole = self._rendered(turns, tools)
        truth.check_encodable(whole)
        truth.check_context(conversation, whole)
        if tools and not self._shows_tools:
            raise DataError("tools: the chat template has no place for them")
        marked = self._marked(conversation, turns, tools)
        spans: list[Span] = []
        starts = []
        for index, message in enumerate(conversation.messages):
            if message.role == "assistant" and message.supervised:
                start = self._start(turns, tools, whole, index)
                end = self._end(turns, tools, whole, index, start)
                truth.check_answer(index + 1, message, whole[start:end], index == len(turns) - 1)
                starts.append(start)
                spans += [(start, end)] if marked is None else self._part(whole, (start, end), next(marked))
        return whole, spans, starts

    def header(self, text: str, end: int) -> str | None:
        """What stands before an answer that begins at `end`, from the last special token on; None without any."""
        before = text[max(0, end - _HEADER_CHARACTERS) : end]
        found = [match.start() for match in self._control.finditer(before)]
        return before[found[-1] :] if found else None

    def is_closed(self, text: str) -> bool:
        """Whether generation would have stopped at the end of this text."""
        return text.endswith(self.stops)

    def _marked(self, conversation: Conversation, turns: Dicts, tools: Dicts | None) -> Iterator[Span] | None:
        """The part of each turn that the template's own {% generation %} markers give; None when it has none, or when
        they don't cover every turn."""
        kind = tools is not None  # a tokenizer may have a template of its own for tools
        if kind not in self._has_markers:
            self._has_markers[kind] = bool(_MARKER.search(self._source(tools)))
        answers = [message for message in conversation.messages if message.role == "assistant"]
        if not self._has_markers[kind] or not all(message.supervised for message in answers):
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
        if len(marked) != len(answers):
            return None
        return iter([(offsets[0][0], offsets[-1][1]) for offsets in marked])

    def _part(self, whole: str, turn: Span, marked: Span) -> list[Span]:
        """What the markers give of a turn, and its end, which many leave outside."""
        start, end = turn
        stops = [found.start() for found in self._stop.finditer(whole, start, end)]
        stop = stops[-1] if stops else end
        begins, ends = max(start, marked[0]), min(marked[1], stop)
        if not whole[begins:ends].strip():
            raise DataError(
                "the chat template's {% generation %} markers leave the answers out: nothing would be learned"
            )
        return [(begins, ends), (stop, end)] if whole[ends:stop].strip() else [(begins, end)]

    def _start(self, turns: Dicts, tools: Dicts | None, whole: str, index: int) -> int:
        """Where turn `index` begins in `whole`, behind what the model is asked with: rule 1."""
        asked = self._rendered(turns[:index], tools, generation_prompt=True)
        if whole.startswith(asked):
            return len(asked)
        shared = _shared(asked, whole)
        if shared <= len(self._rendered(turns[:index], tools)):
            raise _unsettled(index)
        raise AskedOtherwise(
            f"turn {index + 1}: when the model is asked, the chat template opens the answer with {asked[shared:]!r}, "
            f"and here it is written {whole[shared : shared + 12]!r}: the model would be trained on another prompt "
            "than it is served with. Use a chat template whose turns begin as its generation prompt ends"
        )

    def _end(self, turns: Dicts, tools: Dicts | None, whole: str, index: int, start: int) -> int:
        """Where turn `index`, which starts at `start`, ends in `whole`: rules 2 and 3."""
        stop = self._stop.search(whole, start)
        content = str(turns[index]["content"])
        said = -1 if "tool_calls" in turns[index] else _behind(content, whole, start)
        if said < 0 and "tool_calls" not in turns[index]:
            raise DataError(f"turn {index + 1}: the chat template leaves out or rewrites the answer")
        if stop and start <= said <= stop.start() and not whole[said : stop.start()].strip():
            return stop.end()
        is_last = index == len(turns) - 1
        alone = (whole if is_last else self._rendered(turns[: index + 1], tools))[start:]
        here = whole[start:]
        if stop:
            turn = here[: stop.end() - start]
            # The end of a turn may be written alike, and its beginning not: Qwen3 thinks in the last turn only.
            if alone.startswith(turn) or alone.rstrip().endswith(turn):
                return stop.end()
        closed = alone.rstrip()
        if stop and here.startswith(closed) and not here[len(closed) : stop.start() - start].strip():
            return stop.end()  # what comes next is what generation stops at: GLM's header of the next turn
        written = here[said - start :].lstrip() if said >= start else closed[self._last_control(closed) :]
        control = self._control.match(written)
        if control and control[0] not in self.stops:
            raise DataError(
                f"turn {index + 1}: the chat template ends it with {control[0]!r}, at which generation does not stop "
                f"(only at {', '.join(map(repr, self.stops))}), so that no answer would end: name that token as "
                "eos_token, or in eos_token_id of generation_config.json; where the template ends only earlier turns "
                "so, give them weight 0"
            )
        if not here.startswith(closed):
            raise _unsettled(index)
        tail = closed[said - start :] if said >= start else ""
        end = start + len(closed)
        if tail.strip():
            raise DataError(
                f"turn {index + 1}: the chat template ends it with {tail.strip()!r}, which is no token of this "
                "tokenizer, so that generation would not stop there: add it as a special token, or use a template "
                "that fits the tokenizer"
            )
        if is_last:
            return end
        raise DataError(
            f"turn {index + 1}: the chat template does not end it with a token at which generation stops, so that the "
            "model would not learn to end there: make a row of each exchange, or give the turn weight 0"
        )

    def _last_control(self, text: str) -> int:
        """Where the last special token of a text begins, if that is what it ends with; else its end."""
        found = [match for match in self._control.finditer(text) if match.end() == len(text)]
        return found[-1].start() if found else len(text)

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

    def _source(self, tools: Dicts | None) -> str:
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
        special = added | set(self._tokenizer.all_special_tokens) | set(self.stops)
        return tuple(sorted(special, key=len, reverse=True))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._control_tokens)))

    @cached_property
    def _shows_tools(self) -> bool:
        """Whether tools change what the template writes."""
        turns = [_turn(message, as_text=False) for message in PROBE.messages]
        tool: dict[str, object] = {
            "type": "function",
            "function": {"name": "probe", "description": "", "parameters": {}},
        }
        return self._rendered(turns, [tool]) != self._rendered(turns, None)

    @cached_property
    def _takes_arguments_as_text(self) -> bool:
        """Whether the template joins a call's arguments to other text, as DeepSeek's do, and cannot take an object."""
        asked = _turn(PROBE.messages[0], as_text=False)
        try:
            self._rendered([asked, _turn(_CALL, as_text=False)], None)
        except DataError as error:
            return isinstance(error.__cause__, TypeError)
        return False

    def _refuse_control_tokens(self, turns: Dicts, tools: Dicts | None) -> None:
        """A special token inside a turn's text would be read as the real one: an end of turn in the middle of an
        answer, or a forged system turn."""
        for place, value in [*((f"turn {n}", turn) for n, turn in enumerate(turns, start=1)), ("tools", tools)]:
            for text in truth.leaves(value):
                if found := self._control.search(text):
                    raise DataError(f"{place}: holds the control token {found[0]!r}, which would be read as a real one")


def _turn(message: Message, as_text: bool) -> dict[str, object]:
    """The dictionary that chat templates expect; an absent key, not a null one, is what they test for."""
    turn: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False)
                    if as_text and not isinstance(call.arguments, str)
                    else call.arguments,
                },
            }
            for call in message.tool_calls
        ]
    optional = {
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "reasoning_content": message.reasoning,
        "thinking": message.reasoning,  # gpt-oss's word for it
    }
    return turn | {key: value for key, value in optional.items() if value is not None}


def _unsettled(index: int) -> DataError:
    return DataError(
        f"turn {index + 1}: the chat template writes turns differently once others follow, so that the tokens of "
        "this one cannot be told for certain: end the row with this turn, or give it weight 0"
    )


def _behind(content: str, whole: str, start: int) -> int:
    """Where a turn's content, or else its last line, ends in `whole` behind `start`; -1 when it is not there."""
    lines = content.strip().splitlines() or [""]
    for text in (content.strip(), lines[-1].strip()):
        if text and (found := whole.find(text, start)) >= 0:
            return found + len(text)
    return -1


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
