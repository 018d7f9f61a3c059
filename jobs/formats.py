"""From a row of any common format to one form: a conversation, or text; or the exact reason why not.

Five formats are detected from a row's columns, in this order (the first that fits):

    messages           messages: [{role, content, tool_calls}, ...], tools
    sharegpt           conversations: [{from, value} or {role, content}, ...], system, tools
    prompt_completion  prompt, completion: two strings, or two lists of messages
    alpaca             instruction, input, output, system, history: [[asked, answered], ...]
    text               text: learned whole

`alpaca` comes before `text` because the original Alpaca rows also carry a rendered `text`.
A row is never repaired by guessing and never dropped in silence: what cannot be used comes back as
Unusable, and the caller counts it. No torch, no transformers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from cluster.errors import DataError
from jobs.rows import Row, Unusable, kind_of

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text"]
Role = Literal["system", "user", "assistant", "tool"]

# Every spelling of a role in use, with what it means. `developer` is OpenAI's newer word for system.
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class ToolCall:
    """One call of a function. `arguments` is an object wherever the row's text could be parsed as one,
    because templates write it with `tojson`, which would put a string into quotes a second time."""

    name: str
    arguments: object
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn. `supervised` says whether an assistant's turn is learned or only read."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None
    supervised: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns that end with an assistant's, and the tools on offer as OpenAI's {type, function} objects."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()


@dataclass(frozen=True)
class Text:
    """Text that passes no chat template: `prompt` is read, `completion` learned. Plain text has no prompt."""

    prompt: str
    completion: str


Example = Conversation | Text


def detect(row: Row) -> Format | Unusable:
    """The format that a row's columns show; see the table at the top of this file."""
    if "chosen" in row and "rejected" in row:
        return Unusable("preference rows (chosen, rejected) are for objective dpo")
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "text" in row:
        return "text"
    columns = ", ".join(map(str, row)) or "none"
    return Unusable(f"columns {columns}: no known format; name them as one of {', '.join(get_args(Format))} has them")


def normalise(row: Row, row_format: Format | None = None) -> Example | Unusable:
    """A row in the one form. Without a `row_format` each row's own columns decide."""
    chosen = row_format or detect(row)
    if isinstance(chosen, Unusable):
        return chosen
    try:
        return _NORMALISERS[chosen](row)
    except DataError as error:  # raised by the helpers below, always for this row alone
        return Unusable(str(error))


def _messages(row: Row) -> Example:
    return _conversation(_list(row, "messages"), row)


def _sharegpt(row: Row) -> Example:
    turns = _list(row, "conversations")
    if system := _string(row, "system", needed=False):
        turns = [{"from": "system", "value": system}, *turns]
        return _conversation(turns, row, first_number=0)
    return _conversation(turns, row)


def _prompt_completion(row: Row) -> Example:
    if isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        prompt = _list(row, "prompt")
        return _conversation([*prompt, *_list(row, "completion")], row, learned_from=len(prompt))
    return Text(_string(row, "prompt"), _string(row, "completion"))


def _alpaca(row: Row) -> Example:
    asked = [part for key in ("instruction", "input") if (part := _string(row, key, needed=False))]
    if not asked:
        raise DataError("empty instruction and input")
    turns: list[object] = []
    for number, pair in enumerate(_list(row, "history") if row.get("history") else (), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history {number}: write [asked, answered], not {kind_of(pair)}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if system := _string(row, "system", needed=False):
        turns.insert(0, {"role": "system", "content": system})
    # One newline between instruction and input: how the LLaMA-Factory family, the largest user of the format, joins.
    turns += [{"role": "user", "content": "\n".join(asked)}, {"role": "assistant", "content": _string(row, "output")}]
    return _conversation(turns, row)


def _text(row: Row) -> Example:
    return Text("", _string(row, "text"))


_NORMALISERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}


def _conversation(turns: Sequence[object], row: Row, first_number: int = 1, learned_from: int = 0) -> Conversation:
    """Turns of any spelling to a checked conversation; assistant turns before index `learned_from` are only read.

    ShareGPT calls carry no ids, which some templates demand (Mistral: nine letters or digits), so they are numbered
    and each observation answers the oldest open call.
    """
    messages: list[Message] = []
    unanswered: list[ToolCall] = []
    calls_made = 0
    for index, turn in enumerate(turns):
        number = first_number + index
        message = _message(number, turn)
        previous = messages[-1] if messages else None
        if isinstance(turn, dict) and turn.get("from", turn.get("role")) == "function_call":
            calls = tuple(replace(call, id=f"call{calls_made + i:05d}") for i, call in enumerate(message.tool_calls))
            calls_made += len(calls)
            unanswered += calls
            message = replace(message, tool_calls=calls)
            if calls and previous is not None and previous.role == "assistant":  # said, then called: one message
                message = replace(previous, tool_calls=previous.tool_calls + calls)
                previous = None
                messages.pop()
        if message.role == "tool":
            if previous is None or previous.role not in ("assistant", "tool"):
                raise DataError(f"turn {number}: a tool's answer without a call before it")
            if message.tool_call_id is None and unanswered:
                call = unanswered.pop(0)
                message = replace(message, tool_call_id=call.id, name=message.name or call.name)
        if message.role == "assistant":
            if previous is not None and previous.role == "assistant":
                raise DataError(f"turn {number}: two assistant turns in a row: join them, or put the question between")
            message = replace(message, supervised=message.supervised and index >= learned_from)
        if message.content.strip() or message.role != "system":  # an empty system turn is how exporters write "none"
            messages.append(message)
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise DataError("no assistant turn")
    if not any(message.supervised for message in answers):
        raise DataError("no assistant turn to learn from: all have weight 0 or stand in the prompt")
    if all(message.role in ("system", "assistant") for message in messages[: messages.index(answers[0]) + 1]):
        raise DataError("begins with an assistant turn: put what was asked before it")
    if messages[-1].role != "assistant":
        raise DataError(f"ends with a {messages[-1].role} turn: add the answer, or remove what follows the last one")
    return Conversation(tuple(messages), _tools(row.get("tools")))


def _message(number: int, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"turn {number}: a turn is an object, not {kind_of(turn)}")
    said = turn.get("role", turn.get("from"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise DataError(f"turn {number}: role {said!r} is unknown: use {', '.join(_ROLES)}")
    if turn.get("function_call"):
        raise DataError(f"turn {number}: `function_call` is OpenAI's old form: write `tool_calls`")
    content = _content(number, turn.get("content", turn.get("value")))
    calls: tuple[ToolCall, ...] = ()
    if said == "function_call":
        if called := _called(_parsed(content)):
            calls, content = called, ""  # what is no JSON call stays the assistant's text, to be learned as it is
    elif turn.get("tool_calls"):
        calls = _called(turn["tool_calls"])
        if not calls or role != "assistant":
            raise DataError(f"turn {number}: tool_calls: an assistant's list of {{function: {{name, arguments}}}}")
    weight = turn.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"turn {number}: weight {weight!r}: 1 learns the turn, 0 only reads it")
    if not content.strip() and not calls and role in ("user", "assistant"):
        raise DataError(f"turn {number}: empty {role} turn")
    optional = {key: turn.get(key) for key in ("tool_call_id", "name", "reasoning_content")}
    for key, value in optional.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"turn {number}: {key} is {kind_of(value)}, not a string")
    tool_call_id, name, reasoning = cast("tuple[str | None, ...]", tuple(optional.values()))
    return Message(role, content, calls, tool_call_id, name, reasoning, supervised=weight == 1)


def _content(number: int, value: object) -> str:
    """A string, nothing (an assistant that only calls), or OpenAI's list of text parts, joined as templates do."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"turn {number}: content is {kind_of(value)}, not a string")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            kind = repr(part.get("type")) if isinstance(part, dict) else kind_of(part)
            raise DataError(f"turn {number}: a content part of type {kind}: only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _called(value: object) -> tuple[ToolCall, ...]:
    """Calls from {name, arguments}, {function: {…}}, or a list of either; empty when it is anything else."""
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            return ()
        function = item.get("function", item)
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
            return ()
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and isinstance(parsed := _parsed(arguments), dict):
            arguments = parsed
        calls.append(ToolCall(name, arguments, item["id"] if isinstance(item.get("id"), str) else None))
    return tuple(calls)


def _tools(value: object) -> tuple[Mapping[str, object], ...]:
    """The tools on offer, from a list or its JSON text; a bare {name, parameters} is wrapped as OpenAI has it."""
    if value is None or value == "":
        return ()
    tools = _parsed(value) if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise DataError(f"tools: a list of functions or its JSON text, not {kind_of(value)}")
    wrapped = []
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tools: number {number} has no function name")
        wrapped.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(wrapped)


def _list(row: Row, key: str) -> list[object]:
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise DataError(f"column '{key}': a list of turns is needed, not {kind_of(value)}")
    return value


def _string(row: Row, key: str, needed: bool = True) -> str:
    """A column's text; blank text counts as none."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"column '{key}' is {kind_of(value)}, not a string")
    if value is not None and value.strip():
        return value
    if needed:
        raise DataError(f"empty {key}" if key in row else f"no column '{key}'")
    return ""


def _parsed(text: str) -> object:
    """The JSON value of a text, or None when it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
