"""Which tokens are learned: for every family of templates, and for every trap that others have stepped into."""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cluster.errors import ModelError
from jobs.chat import Renderer, Sample
from jobs.formats import Conversation, Message, Text, ToolCall
from jobs.rows import Unusable

TokenizerOf = Callable[..., PreTrainedTokenizerFast]

TWO_TURNS = Conversation(
    (
        Message("user", "What colour is the sky?"),
        Message("assistant", "Blue it is."),
        Message("user", "And now?"),
        Message("assistant", "Still blue,\nnobody asks."),
    )
)
ONE_TURN = Conversation(TWO_TURNS.messages[:2])
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = ToolCall("weather", {"city": "Oslo"}, "call00000")
WITH_TOOLS = Conversation(
    (
        Message("user", "Is it blue in Oslo?"),
        Message("assistant", "", (CALL,)),
        Message("tool", '{"sky": "blue"}', tool_call_id="call00000", name="weather"),
        Message("assistant", "Blue it is."),
        Message("user", "Thanks"),
        Message("assistant", "Any time."),
    ),
    (WEATHER,),
)
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def learned(tokenizer: PreTrainedTokenizerFast, sample: Sample | Unusable) -> list[str]:
    """The texts of the runs of learned tokens."""
    assert isinstance(sample, Sample), sample
    assert len(sample.input_ids) == len(sample.supervised)
    runs = groupby(zip(sample.supervised, sample.input_ids, strict=True), key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in run]) for is_learned, run in runs if is_learned]


def reason(outcome: Sample | Unusable) -> str:
    assert isinstance(outcome, Unusable), outcome
    return outcome.reason


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chatml", ["Blue it is.<|im_end|>", "Still blue,\nnobody asks.<|im_end|>"]),
        ("qwen3", ["Blue it is.<|im_end|>", "<think>\n\n</think>\n\nStill blue,\nnobody asks.<|im_end|>"]),
        ("marked", ["Blue it is.<|im_end|>", "Still blue,\nnobody asks.<|im_end|>"]),
        ("marked_without_end", ["Blue it is.<|im_end|>", "Still blue,\nnobody asks.<|im_end|>"]),
        ("llama3", ["Blue it is.<|eot_id|>", "Still blue,\nnobody asks.<|eot_id|>"]),
        ("mistral", [" Blue it is.</s>", " Still blue,\nnobody asks.</s>"]),
        ("gemma", ["Blue it is.<end_of_turn>", "Still blue,\nnobody asks.<end_of_turn>"]),
        ("phi3", ["Blue it is.<|end|>", "Still blue,\nnobody asks.<|end|>"]),
    ],
)
def test_every_answer_is_learned_up_to_and_with_its_end(
    tokenizer_of: TokenizerOf, template: str, expected: list[str]
) -> None:
    tokenizer = tokenizer_of(template)
    assert learned(tokenizer, Renderer(tokenizer, 512).render(TWO_TURNS)) == expected


def test_every_template_of_the_fixtures_is_tested(templates: dict[str, str]) -> None:
    marks = test_every_answer_is_learned_up_to_and_with_its_end.pytestmark
    assert {case[0] for case in marks[0].args[1]} | {"thinks", "bare"} == set(templates)


def test_a_template_that_closes_no_turn(tokenizer_of: TokenizerOf) -> None:
    renderer = Renderer(tokenizer_of("bare"), 512)
    assert learned(tokenizer_of("bare"), renderer.render(ONE_TURN)) == [" Blue it is.<|endoftext|>"]
    assert reason(renderer.render(TWO_TURNS)).startswith("turn 2: the chat template does not end it with a token at")


def test_a_template_that_is_asked_with_another_prompt_than_it_writes(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of("thinks")
    outcome = Renderer(tokenizer, 512).render(ONE_TURN)
    assert r"the chat template opens the answer with '<think>\n', and here it is written 'Blue it is.<" in reason(
        outcome
    )


@pytest.mark.parametrize("template", ["mistral", "gemma"])
def test_pieces_with_a_space_mark(tokenizer_of: TokenizerOf, template: str) -> None:
    tokenizer = tokenizer_of(template, "piece")
    end = {"mistral": "</s>", "gemma": "<end_of_turn>"}[template]
    runs = learned(tokenizer, Renderer(tokenizer, 512).render(TWO_TURNS))
    assert [run.strip() for run in runs] == [f"Blue it is.{end}", f"Still blue,\nnobody asks.{end}"]


@pytest.mark.parametrize("template", ["chatml", "qwen3", "marked", "marked_without_end", "llama3", "mistral", "gemma"])
def test_what_is_learned_follows_the_prompt_that_serving_will_give(tokenizer_of: TokenizerOf, template: str) -> None:
    """The tokens before the last answer are those that the model is asked with."""
    tokenizer = tokenizer_of(template)
    sample = Renderer(tokenizer, 512).render(TWO_TURNS)
    assert isinstance(sample, Sample)
    asked = [{"role": message.role, "content": message.content} for message in TWO_TURNS.messages[:-1]]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert sample.input_ids[: len(prompt)] == prompt
    assert all(sample.supervised[len(prompt) :])
    assert not sample.supervised[len(prompt) - 1]


@pytest.mark.parametrize("template", ["chatml", "marked", "qwen3"])
def test_tool_calls_are_learned_and_their_answers_are_not(tokenizer_of: TokenizerOf, template: str) -> None:
    tokenizer = tokenizer_of(template)
    sample = Renderer(tokenizer, 512).render(WITH_TOOLS)
    runs = learned(tokenizer, sample)
    assert runs[0] == f"{CALLED}<|im_end|>"
    assert runs[1] == "Blue it is.<|im_end|>"
    assert runs[2].endswith("Any time.<|im_end|>")
    assert isinstance(sample, Sample)
    assert '"name": "weather", "parameters"' in tokenizer.decode(sample.input_ids)  # the tool on offer is shown


def test_rendering_in_steps_finds_what_the_templates_own_markers_say(tokenizer_of: TokenizerOf) -> None:
    for conversation in (TWO_TURNS, WITH_TOOLS):
        marked, stepped = (Renderer(tokenizer_of(name), 512).render(conversation) for name in ("marked", "chatml"))
        assert isinstance(marked, Sample)
        assert marked == stepped


def test_several_calls_in_a_turn_that_a_template_refuses_are_a_reason(tokenizer_of: TokenizerOf) -> None:
    turns = (Message("user", "Both?"), Message("assistant", "", (CALL, CALL)))
    outcome = Renderer(tokenizer_of("llama3"), 512).render(Conversation(turns, (WEATHER,)))
    assert reason(outcome) == "the chat template refuses it: only single tool-calls at once!"


def test_tools_that_the_template_never_shows(tokenizer_of: TokenizerOf) -> None:
    turns = (Message("user", "weather?"), Message("assistant", "I call weather."))
    outcome = Renderer(tokenizer_of("gemma"), 512).render(Conversation(turns, (WEATHER,)))
    assert reason(outcome) == "tools: the chat template has no place for them"


def test_calls_that_the_template_never_shows(tokenizer_of: TokenizerOf) -> None:
    turns = (Message("user", "Oslo?"), Message("assistant", "", (CALL,)))
    outcome = Renderer(tokenizer_of("phi3"), 512).render(Conversation(turns))
    assert reason(outcome) == "turn 2: the chat template has no place for tool calls ('weather' is missing)"


def test_a_system_turn_that_the_template_drops(tokenizer_of: TokenizerOf) -> None:
    turns = (Message("system", "Speak like a judge."), *TWO_TURNS.messages)
    outcome = Renderer(tokenizer_of("bare"), 512).render(Conversation(turns))
    assert reason(outcome) == "turn 1: the chat template leaves out or rewrites the system's text"


def test_a_system_turn_that_the_template_refuses(tokenizer_of: TokenizerOf) -> None:
    turns = (Message("system", "Speak like a judge."), *TWO_TURNS.messages)
    outcome = Renderer(tokenizer_of("gemma"), 512).render(Conversation(turns))
    assert reason(outcome) == "the chat template refuses it: System role not supported"


def test_turns_that_do_not_alternate_where_they_must(tokenizer_of: TokenizerOf) -> None:
    turns = (Message("user", "One."), Message("user", "Two."), Message("assistant", "Three."))
    outcome = Renderer(tokenizer_of("mistral"), 512).render(Conversation(turns))
    assert reason(outcome) == "the chat template refuses it: conversation roles must alternate user/assistant"
    tokenizer = tokenizer_of("chatml")
    assert learned(tokenizer, Renderer(tokenizer, 512).render(Conversation(turns))) == ["Three.<|im_end|>"]


@pytest.mark.parametrize("template", ["chatml", "marked", "qwen3"])
def test_weight_0_is_read_and_not_learned(tokenizer_of: TokenizerOf, template: str) -> None:
    first, answer, second, last = TWO_TURNS.messages
    unlearned = Message("assistant", answer.content, supervised=False)
    tokenizer = tokenizer_of(template)
    runs = learned(tokenizer, Renderer(tokenizer, 512).render(Conversation((first, unlearned, second, last))))
    assert len(runs) == 1
    assert runs[0].endswith("nobody asks.<|im_end|>")
    unlearned = Message("assistant", last.content, supervised=False)
    sample = Renderer(tokenizer, 512).render(Conversation((first, answer, second, unlearned)))
    assert learned(tokenizer, sample) == ["Blue it is.<|im_end|>"]
    assert isinstance(sample, Sample)
    assert sample.supervised[-1]  # nothing is computed for what nobody learns from


def test_reasoning_is_learned_in_the_last_turn_and_never_lost_from_an_earlier_one(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of("qwen3")
    first, answer, second, last = TWO_TURNS.messages
    thought = Message("assistant", "<think>\nskies\n</think>\n\n" + answer.content)
    final = Message("assistant", last.content, reasoning="again")
    outcome = Renderer(tokenizer, 512).render(Conversation((first, thought, second, final)))
    assert reason(outcome).startswith("turn 2: the chat template leaves out the reasoning")
    read = replace(thought, supervised=False)  # what is only read may be without it, as when serving
    assert learned(tokenizer, Renderer(tokenizer, 512).render(Conversation((first, read, second, final)))) == [
        "<think>\nagain\n</think>\n\nStill blue,\nnobody asks.<|im_end|>",
    ]


def test_a_template_whose_turns_cannot_be_told_apart_is_a_reason_and_not_a_guess(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of()
    # Tools before the last question only, as Mistral does: what an earlier turn was answered to is shown nowhere.
    tokenizer.chat_template = (
        "{% set ns = namespace(last=0) %}{% for message in messages if message.role == 'user' %}"
        "{% set ns.last = messages.index(message) %}{% endfor %}{% for message in messages %}"
        "{% if loop.index0 == ns.last %}[TOOLS]{% endif %}"
        "{{ message.role }}: {{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert reason(Renderer(tokenizer, 512).render(TWO_TURNS)).startswith(
        "turn 2: the chat template writes turns differently"
    )


@pytest.mark.parametrize(
    "template",
    [
        # An answer gets a remark once others follow.
        "{% for message in messages %}{{ message.role }}: {{ message.content }}"
        "{% if message.role == 'assistant' and not loop.last %} (old){% endif %}<|im_end|>\n{% endfor %}",
        # The text before a turn changes with the turn itself.
        "{% if messages | length == 5 %}Five.{% endif %}"
        "{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>\n{% endfor %}",
    ],
)
def test_a_turn_that_reads_otherwise_later_is_not_guessed_at(tokenizer_of: TokenizerOf, template: str) -> None:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = template + "{% if add_generation_prompt %}assistant:{% endif %}"
    conversation = Conversation((Message("system", "Be short."), *TWO_TURNS.messages))
    assert reason(Renderer(tokenizer, 512).render(conversation)).startswith("turn 3: the chat template writes turns")


def test_markers_on_the_last_turn_alone_do_not_hide_the_others(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}{{ '\n' }}{% if loop.last %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    )
    runs = learned(tokenizer, Renderer(tokenizer, 512).render(TWO_TURNS))
    assert runs == ["Blue it is.<|im_end|>", "Still blue,\nnobody asks.<|im_end|>"]


def test_no_chat_template_names_the_model_and_the_ways_out(tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(ModelError, match=r"tiny-None.*no chat template.*chat_template\.jinja.*prompt and completion"):
        Renderer(tokenizer_of(None), 512).render(TWO_TURNS)


def test_a_base_model_without_a_template_trains_on_text(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(None)
    assert learned(tokenizer, Renderer(tokenizer, 512).render(Text("Sky?", " Blue"))) == [" Blue<|endoftext|>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for message in messages %}{{ message.content }}", "not valid Jinja"),
        ("{% for message in messages %}{{ message.role }}<|im_end|>{% endfor %}", "leaves out or rewrites"),
        ("{{ raise_exception('no') }}", "refuses it: no"),
        ("{{ messages[0].nothing.more }}", "refuses it"),
        ("{{ 1 + messages[0].content }}", "refuses it"),
    ],
)
def test_a_broken_template_is_the_models_fault_and_not_the_rows(
    tokenizer_of: TokenizerOf, template: str, said: str
) -> None:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=said):
        Renderer(tokenizer, 512).render(TWO_TURNS)


def test_a_tokenizer_without_eos_is_refused(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no eos_token"):
        Renderer(tokenizer, 512)


def test_bos_is_written_once(tokenizer_of: TokenizerOf) -> None:
    for template in ("llama3", "mistral", "gemma"):
        tokenizer = tokenizer_of(template)
        sample = Renderer(tokenizer, 512).render(TWO_TURNS)
        assert isinstance(sample, Sample)
        assert sample.input_ids.count(tokenizer.bos_token_id) == 1
        assert sample.input_ids[0] == tokenizer.bos_token_id


def test_plain_text_is_learned_whole_with_an_end(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of()
    sample = Renderer(tokenizer, 512).render(Text("", "The sky is blue."))
    assert isinstance(sample, Sample)
    assert tokenizer.decode(sample.input_ids) == "The sky is blue.<|im_end|>"
    assert sample.supervised == [False] + [True] * (len(sample.input_ids) - 1)


def test_a_completion_is_learned_and_its_prompt_is_not(tokenizer_of: TokenizerOf) -> None:
    for kind in ("byte", "piece"):
        tokenizer = tokenizer_of(kind=kind)
        runs = learned(tokenizer, Renderer(tokenizer, 512).render(Text("The sky is", " blue now.")))
        assert [run.strip() for run in runs] == ["blue now.<|im_end|>"]


def test_too_long_is_said_and_never_cut_unasked(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of()
    whole = Renderer(tokenizer, 512).render(TWO_TURNS)
    assert isinstance(whole, Sample)
    length = len(whole.input_ids)
    assert Renderer(tokenizer, length).render(TWO_TURNS) == whole
    outcome = Renderer(tokenizer, length - 1).render(TWO_TURNS)
    limit = f"longer than sequence_length {length - 1}"
    assert outcome == Unusable(f"{length} tokens, {limit}: raise it, or set data.overlong: truncate")
    assert Renderer(tokenizer, length - 1, "drop").render(TWO_TURNS) == Unusable(
        f"{length} tokens, {limit}", agreed=True
    )
    cut = Renderer(tokenizer, length - 1, "truncate").render(TWO_TURNS)
    assert cut == Sample(whole.input_ids[:-1], whole.supervised[:-1], cut=1)


def test_a_cut_that_leaves_nothing_to_learn_is_refused(tokenizer_of: TokenizerOf) -> None:
    outcome = Renderer(tokenizer_of(), 8, "truncate").render(TWO_TURNS)
    assert reason(outcome) == "no token to learn within sequence_length 8: raise it"


@pytest.mark.parametrize("where", ["user", "assistant", "tool"])
def test_control_tokens_inside_the_text_are_refused(tokenizer_of: TokenizerOf, where: str) -> None:
    messages = [
        Message(message.role, message.content + ("<|im_end|>" if message.role == where else ""), message.tool_calls)
        for message in WITH_TOOLS.messages
    ]
    outcome = Renderer(tokenizer_of(), 512).render(Conversation(tuple(messages), (WEATHER,)))
    assert "holds the control token '<|im_end|>', which would be read as a real one" in reason(outcome)


def test_control_tokens_inside_tools_are_refused(tokenizer_of: TokenizerOf) -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "Blue<|im_end|>\n<|im_start|>system"}}
    outcome = Renderer(tokenizer_of(), 512).render(Conversation(TWO_TURNS.messages, (tool,)))
    assert reason(outcome).startswith("tools: holds the control token '<|im_end|>'")


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_half_an_emoji_is_a_reason_and_not_a_crash(tokenizer_of: TokenizerOf, template: str) -> None:
    renderer = Renderer(tokenizer_of(template), 512)
    turns = (Message("user", "Sky?"), Message("assistant", "Blue \ud83d"))
    assert reason(renderer.render(Conversation(turns))).startswith("holds '\\ud83d', half of a surrogate pair")
    assert reason(renderer.render(Text("", "Blue \ud83d"))).startswith("holds '\\ud83d'")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=2, max_size=6
    ),
    template=st.sampled_from(["chatml", "marked", "gemma", "mistral", "llama3", "phi3"]),
)
def test_any_text_is_learned_exactly_or_refused(tokenizer_of: TokenizerOf, texts: list[str], template: str) -> None:
    """Whatever people write, what is learned is the answers and their ends: no header, no question, nothing lost."""
    texts = texts[: len(texts) // 2 * 2]
    turns = tuple(Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(texts))
    tokenizer = tokenizer_of(template)
    outcome = Renderer(tokenizer, 10_000).render(Conversation(turns))
    if isinstance(outcome, Unusable):
        assert "rewrites" in outcome.reason  # a template that trims inside what it was given
        return
    runs = learned(tokenizer, outcome)
    answers = texts[1::2]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        words = run.replace("<|endoftext|>", "").strip()
        for end in ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<|end|>"):
            words = words.removesuffix(end)
        assert words.strip() == answer.strip()
