"""Every format to the one form, and every fault of a row to its exact reason."""

import json

import pytest

from jobs.formats import Conversation, Message, Text, ToolCall, detect, normalise
from jobs.rows import Row, Unusable

ASKED, ANSWERED = Message("user", "Sky?"), Message("assistant", "Blue.")
TOOL = {"name": "weather", "parameters": {"type": "object"}}


def call(arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


SAME: dict[str, Row] = {
    "messages": {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]},
    "alpaca": {"instruction": "Sky?", "input": "", "output": "Blue.", "text": "### rendered"},
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_exchange_in_every_format(name: str) -> None:
    row = SAME[name]
    assert detect(row) == name
    assert normalise(row) == Conversation((ASKED, ANSWERED))


def test_sharegpt_in_the_other_spelling_and_with_a_system_column() -> None:
    turns = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]
    example = normalise({"conversations": turns, "system": "Be short."})
    assert example == Conversation((Message("system", "Be short."), ASKED, ANSWERED))


def test_an_alpaca_row_with_everything() -> None:
    row: Row = {"instruction": "Sky?", "input": "At noon.", "output": "Blue.", "system": "Be short."}
    row["history"] = [["Hello", "Hi."]]
    assert normalise(row) == Conversation(
        (
            Message("system", "Be short."),
            Message("user", "Hello"),
            Message("assistant", "Hi."),
            Message("user", "Sky?\nAt noon."),
            ANSWERED,
        )
    )


def test_prompt_and_completion_as_text_and_as_turns() -> None:
    assert normalise({"prompt": "Sky?", "completion": " Blue."}) == Text("Sky?", " Blue.")
    prompt = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    prompt.append({"role": "user", "content": "Sky?"})
    example = normalise({"prompt": prompt, "completion": [{"role": "assistant", "content": "Blue."}]})
    assert isinstance(example, Conversation)
    assert [message.supervised for message in example.messages if message.role == "assistant"] == [False, True]


def test_plain_text() -> None:
    assert normalise({"text": " Sky.\n"}) == Text("", " Sky.\n")


def test_openai_messages_with_calls_parts_weights_and_reasoning() -> None:
    row: Row = {
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Sky"}, {"type": "text", "text": "?"}]},
            {
                "role": "assistant",
                "content": None,
                "weight": 0,
                "tool_calls": [{"id": "c1", **call('{"city": "Oslo"}')}],
            },
            {"role": "tool", "content": "blue", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Blue.", "reasoning_content": "it said so"},
        ],
        "tools": [TOOL],
    }
    assert normalise(row) == Conversation(
        (
            Message("system", "Be short."),
            ASKED,
            Message("assistant", "", (ToolCall("weather", {"city": "Oslo"}, "c1"),), supervised=False),
            Message("tool", "blue", tool_call_id="c1"),
            Message("assistant", "Blue.", reasoning="it said so"),
        ),
        ({"type": "function", "function": TOOL},),
    )


def test_sharegpt_calls_become_calls_with_ids_that_their_answers_carry() -> None:
    turns = [
        {"from": "human", "value": "Sky?"},
        {"from": "gpt", "value": "I look."},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "blue"},
        {"from": "function_call", "value": '[{"name": "a", "arguments": "{}"}, {"name": "b"}]'},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Blue."},
    ]
    assert normalise({"conversations": turns, "tools": json.dumps([TOOL])}) == Conversation(
        (
            ASKED,
            Message("assistant", "I look.", (ToolCall("weather", {"city": "Oslo"}, "call00000"),)),
            Message("tool", "blue", tool_call_id="call00000", name="weather"),
            Message("assistant", "", (ToolCall("a", {}, "call00001"), ToolCall("b", {}, "call00002"))),
            Message("tool", "1", tool_call_id="call00001", name="a"),
            Message("tool", "2", tool_call_id="call00002", name="b"),
            ANSWERED,
        ),
        ({"type": "function", "function": TOOL},),
    )


def test_a_call_that_is_no_json_stays_what_the_assistant_says() -> None:
    turns = [{"from": "human", "value": "Sky?"}, {"from": "function_call", "value": "weather(Oslo)"}]
    assert normalise({"conversations": turns}) == Conversation((ASKED, Message("assistant", "weather(Oslo)")))


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_in_every_spelling(tools: object) -> None:
    assert normalise({**SAME["sharegpt"], "tools": tools}) == Conversation((ASKED, ANSWERED))


def test_an_empty_system_turn_is_none() -> None:
    assert normalise(turns(("system", " "), U, A)) == Conversation((ASKED, ANSWERED))


def turns(*spoken: tuple[object, object], **last: object) -> Row:
    """A row of (role, content) turns; `last` are further fields of an assistant's turn behind them."""
    written: list[Row] = [{"role": role, "content": content} for role, content in spoken]
    return {"messages": [*written, {"role": "assistant", **last}] if last else written}


U, A = ("user", "Sky?"), ("assistant", "Blue.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a", "rejected": "b", "prompt": "c"}, "preference rows (chosen, rejected) are for objective dpo"),
        ({"question": "a", "answer": "b"}, "columns question, answer: no known format; name them as one of messages, "),
        ({}, "columns none: no known format"),
        ({"messages": None}, "column 'messages': a list of turns is needed, not nothing"),
        ({"messages": []}, "column 'messages': a list of turns is needed, not an empty list"),
        ({"messages": "hello"}, "column 'messages': a list of turns is needed, not a string"),
        ({"messages": ["hello"]}, "turn 1: a turn is an object, not a string"),
        (turns(U), "no assistant turn"),
        (turns(U, A, U), "ends with a user turn: add the answer, or remove what follows the last one"),
        (turns(U, A, A), "turn 3: two assistant turns in a row"),
        (turns(A), "begins with an assistant turn"),
        (turns(("system", "s"), A, U, A), "begins with an assistant turn"),
        (turns(("bot", "x"), A), "turn 1: role 'bot' is unknown: use system, developer, user, human, assistant, gpt"),
        (turns((None, "x"), A), "turn 1: role None is unknown"),
        (turns((["user"], "x"), A), "turn 1: role ['user'] is unknown"),
        (turns(U, ("assistant", " \n")), "turn 2: empty assistant turn"),
        (turns(("user", None), A), "turn 1: empty user turn"),
        (turns(("user", 7), A), "turn 1: content is a number, not a string"),
        (turns(("user", [{"type": "image_url"}]), A), "turn 1: a content part of type 'image_url': only text"),
        (turns(("tool", "x"), A), "turn 1: a tool's answer without a call before it"),
        (turns(U, ("tool", "x"), A), "turn 2: a tool's answer without a call before it"),
        (turns(U, function_call={"name": "a"}), "turn 2: `function_call` is OpenAI's old form"),
        (turns(U, tool_calls=[{"function": {}}]), "turn 2: tool_calls: an assistant's list"),
        (turns(U, content="a", weight=2), "turn 2: weight 2: 1 learns the turn"),
        (turns(U, content="a", weight=0), "no assistant turn to learn from"),
        ({**turns(U, A), "tools": "not json"}, "tools: a list of functions or its JSON text, not a string"),
        ({**turns(U, A), "tools": [{"type": "function"}]}, "tools: number 1 has no function name"),
        ({"instruction": "", "input": " ", "output": "a"}, "empty instruction and input"),
        ({"instruction": "a", "output": ""}, "empty output"),
        ({"instruction": "a", "output": None}, "empty output"),
        ({"instruction": 1, "output": "a"}, "column 'instruction' is a number, not a string"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history 1: write [asked, answered], not a list"),
        ({"prompt": "", "completion": "b"}, "empty prompt"),
        ({"prompt": "a", "completion": " "}, "empty completion"),
        ({"prompt": "a", "completion": [{}]}, "column 'prompt': a list of turns is needed, not a string"),
        ({"text": "\n"}, "empty text"),
        ({"text": True}, "column 'text' is true or false, not a string"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: Row, reason: str) -> None:
    outcome = normalise(row)
    assert isinstance(outcome, Unusable), outcome
    assert outcome.reason.startswith(reason)
    assert not outcome.agreed


def test_a_named_format_overrules_the_columns() -> None:
    row: Row = {**turns(U, A), "chosen": "a", "rejected": "b"}
    assert isinstance(normalise(row), Unusable)
    assert normalise(row, "messages") == Conversation((ASKED, ANSWERED))
    assert normalise({"text": "x"}, "alpaca") == Unusable("empty instruction and input")
