"""Whether a rendered conversation is still the one that was given: what a chat template dropped, moved or rewrote.

Templates pass over what they have no place for (a system turn, tools, calls, reasoning) without a word. The model
would then be taught answers to instructions that it was never shown, or answers without the thought behind them.
Each function raises DataError with the turn and the reason; all of them are pure.
"""

import json
from collections.abc import Iterator

from cluster.errors import DataError
from jobs.formats import Conversation, Message

THOUGHT_ENDS = "</think>"  # how reasoning is written inside a content, by every family that has it there


def check_encodable(text: str) -> None:
    """JSON can hold half of a surrogate pair (an emoji cut in two), which is no text in any encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"holds {text[error.start]!a}, half of a surrogate pair: cut or export it again") from error


def check_context(conversation: Conversation, whole: str) -> None:
    """What the model reads: system, user and tool texts are all there, in their order, and so are the tools."""
    position = 0
    for number, message in enumerate(conversation.messages, start=1):
        if message.role == "assistant":
            continue
        # Templates write a tool's answer as it is, or as a JSON string.
        written = _written(message.content.strip()) if message.role == "tool" else (message.content.strip(),)
        places = [(whole.find(text, position), text) for text in written]
        found, text = min((place for place in places if place[0] >= 0), default=(-1, ""))
        if found >= 0:
            position = found + len(text)
        elif any(text in whole for text in written):
            raise DataError(
                f"turn {number}: the chat template moves the {message.role}'s text before an earlier turn: put the "
                "turns into the order that it has"
            )
        elif message.role == "tool":
            raise DataError(f"turn {number}: the chat template leaves out the tool's answer")
        else:
            raise DataError(f"turn {number}: the chat template leaves out or rewrites the {message.role}'s text")
    for tool in conversation.tools:
        function = tool["function"]
        name = function["name"] if isinstance(function, dict) else None
        if not isinstance(name, str) or not any(text in whole for text in _written(name)):
            raise DataError("tools: the chat template has no place for them")


def check_answer(number: int, message: Message, learned: str, is_last: bool) -> None:
    """What is learned of turn `number` holds the answer, its calls with all they pass, and its reasoning."""
    thought, content = _parts(message)
    lines = content.strip().splitlines()
    if lines and lines[-1].strip() not in learned:
        raise DataError(f"turn {number}: the chat template leaves out or rewrites the answer")
    called = learned.replace(content.strip(), "", 1) if content.strip() else learned  # a call may be spoken of
    for call in message.tool_calls:
        for text in (call.name, *leaves(call.arguments)):
            if not any(form in called for form in _written(text)):
                raise DataError(f"turn {number}: the chat template has no place for tool calls ({text!r} is missing)")
    if thought.strip() and thought.strip().splitlines()[-1].strip() not in learned:
        advice = (
            "take it out of the row, or use a template that writes it"
            if is_last
            else "end a row with each such turn, or give this one weight 0"
        )
        raise DataError(
            f"turn {number}: the chat template leaves out the reasoning, so that the answer would be learned without "
            f"it: {advice}"
        )


def _parts(message: Message) -> tuple[str, str]:
    """Reasoning and answer, wherever the row has them."""
    thought, ends, content = message.content.rpartition(THOUGHT_ENDS)
    if not ends:
        return message.reasoning or "", message.content
    return message.reasoning or thought.rpartition("<think>")[2], content


def _written(text: str) -> tuple[str, ...]:
    """A text as it may stand in what is rendered: plain, or inside a string of JSON or Python."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], repr(text)[1:-1]


def leaves(value: object) -> Iterator[str]:
    """All texts in a nest of lists and dictionaries, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from leaves(list(value))
        yield from leaves(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
