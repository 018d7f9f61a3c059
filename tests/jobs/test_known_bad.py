"""Every known-bad template case, as a model folder and a data file: refused by the commands, by file and line.

Each is looked at twice, by what a person runs: `luthier jobs data show`, and the task that tokenises for `jobs.train`
(`tests/e2e/test_errors.py` runs that whole command for some). What others have fallen for and cannot happen here is
the second table: learned all the same, the end of the turn with it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cluster import cli
from cluster.errors import InputError, exit_code
from cluster.store import open_store
from jobs import dataset
from jobs.cli import app
from jobs.config import DataConfig
from jobs.rows import read_rows
from tests.e2e.submit import write_recipe

TokenizerOf = Callable[..., PreTrainedTokenizerFast]
Turn = dict[str, Any]


def said(role: str, content: str, **more: object) -> Turn:
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = said("user", "What colour is the sky?"), said("assistant", "Blue it is.")
CALL = said("assistant", "", tool_calls=[{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}])
TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
LOOP = "{% for m in messages %}"
CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = LOOP + CHATML + PROMPT


@dataclass(frozen=True)
class Case:
    """Turns of one conversation, or a whole row, for a template; `line` is where it is refused."""

    reason: str
    turns: list[Turn] = field(default_factory=lambda: [ASKED, ANSWERED])
    template: str | None = PLAIN
    row: dict[str, object] = field(default_factory=dict)
    line: int = 2
    length: int = 512
    overlong: str = "truncate"
    tokenizer: dict[str, str] = field(default_factory=dict)
    generation: dict[str, object] = field(default_factory=dict)
    kind: str = "byte"


REFUSED = {
    # What generation would never stop at, and what is no end.
    "end of turn that generation does not stop at": Case(
        "the chat template ends it with '<|im_end|>', at which generation does not stop (only at '<|endoftext|>')",
        tokenizer={"eos_token": "<|endoftext|>"},
        line=1,
    ),
    "end of turn that is several tokens": Case(
        "the chat template ends it with '<|end_of_answer|>', which is no token of this tokenizer",
        template=PLAIN.replace("<|im_end|>", "<|end_of_answer|>"),
        line=1,
    ),
    "end of turn of another token once others follow": Case(
        "turn 2: the chat template ends it with '<|end|>', at which generation does not stop",
        [ASKED, ANSWERED, ASKED, ANSWERED],
        PLAIN.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last or m.role == 'user' else '<|end|>' }}"),
    ),
    "no end of turn but the last": Case(
        "turn 2: the chat template does not end it with a token at which generation stops",
        [ASKED, ANSWERED, ASKED, ANSWERED],
        LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    ),
    # Nothing to learn, or not what was given.
    "no supervised token": Case(
        "no assistant turn to learn from: all have weight 0", [ASKED, said("assistant", "Blue.", weight=0)]
    ),
    "answer lost to truncation": Case(
        "no token to learn within sequence_length 8: raise it", [said("user", "What " * 20), ANSWERED], length=8
    ),
    "cut without being asked": Case(
        "longer than sequence_length 40: raise it, or set data.overlong: truncate",
        [said("user", "What " * 50), ANSWERED],
        length=40,
        overlong="error",
    ),
    "answers masked by the template's own markers": Case(
        "markers leave the answers out: nothing would be learned",
        template=LOOP + "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% else %}"
        "{% generation %}<|im_start|>assistant\n{% endgeneration %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        line=1,
    ),
    "answer dropped": Case(
        "turn 2: the chat template leaves out or rewrites the answer",
        [ASKED, said("assistant", "Blue it is, ofOslo"), ASKED, ANSWERED],
        PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else m.content[:4] }}"),
    ),
    "reasoning dropped from the answer": Case(
        "turn 2: the chat template leaves out the reasoning",
        [ASKED, said("assistant", "Blue.", reasoning_content="Why?")],
    ),
    "reasoning cut out of the answer": Case(
        "turn 2: the chat template leaves out the reasoning",
        [ASKED, said("assistant", "<think>\nWhy not?\n</think>\n\nBlue.")],
        PLAIN.replace("m.content }}", "m.content.split('</think>')[-1] | trim }}"),
    ),
    "reasoning dropped from history": Case(
        "turn 2: the chat template leaves out the reasoning, so that the answer would be learned without it: end a row",
        [ASKED, said("assistant", "Blue.", reasoning_content="Why?"), ASKED, ANSWERED],
        "qwen3",
    ),
    "prompt that opens the reasoning": Case(
        "turn 2: when the model is asked, the chat template opens the answer with '<think>\\n'", template="thinks"
    ),
    "white space that joins prompt and answer": Case(
        "holds the end of what the model is asked with",
        template=PLAIN.replace("\n{{ m.content", " {{ m.content").replace("assistant\n", "assistant "),
        line=1,
    ),
    "turns that read otherwise later": Case(
        "turn 2: the chat template writes turns differently once others follow",
        [ASKED, ANSWERED, ASKED, ANSWERED],
        PLAIN.replace(
            "{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' and not loop.last %} (old){% endif %}"
        ),
    ),
    # Who speaks when, and what the model is told.
    "answer first": Case("begins with an assistant turn", [ANSWERED, ASKED, ANSWERED]),
    "two answers in a row": Case("turn 3: two assistant turns in a row", [ASKED, ANSWERED, ANSWERED]),
    "question last": Case("ends with a user turn", [ASKED, ANSWERED, ASKED]),
    "roles that must alternate": Case(
        "conversation roles must alternate", [ASKED, ASKED, ANSWERED], "mistral", tokenizer={"eos_token": "</s>"}
    ),
    "system text moved to the front": Case(
        "turn 3: the chat template moves the system's text before an earlier turn",
        [ASKED, ANSWERED, said("system", "Be short."), said("user", "And now?"), ANSWERED],
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
        "{% for m in messages if m.role != 'system' %}" + CHATML + PROMPT,
    ),
    "system text dropped": Case(
        "turn 1: the chat template leaves out or rewrites the system's text",
        [said("system", "Be short."), ASKED, ANSWERED],
        "{% for m in messages if m.role != 'system' %}" + CHATML + PROMPT,
    ),
    "tools dropped": Case(
        "tools: the chat template has no place for them", row={"messages": [ASKED, ANSWERED], "tools": [TOOL]}
    ),
    "call dropped": Case("turn 2: the chat template has no place for tool calls ('weather' is missing)", [ASKED, CALL]),
    "call dropped that is spoken of": Case(
        "turn 2: the chat template has no place for tool calls ('weather' is missing)",
        [ASKED, CALL | {"content": "I look at the weather in the city of Oslo."}],
    ),
    "arguments of a call dropped": Case(
        "turn 2: the chat template has no place for tool calls ('city' is missing)",
        [ASKED, CALL],
        PLAIN.replace("<|im_end|>", "{% for c in m.tool_calls %}{{ c.function.name }}(){% endfor %}<|im_end|>"),
    ),
    "a tool's answer dropped": Case(
        "turn 3: the chat template leaves out the tool's answer",
        [ASKED, CALL, said("tool", '{"sky": "blue"}'), ANSWERED],
        "{% for m in messages if m.role != 'tool' %}" + CHATML + PROMPT,
    ),
    # Tokens.
    "BOS twice by the template": Case(
        "begins with two BOS tokens ('<s>'): take one out of the chat template",
        template="{{ bos_token }}{{ bos_token }}" + PLAIN,
        line=1,
    ),
    "BOS twice by a text rendered before": Case(
        "begins with two BOS tokens ('<s>'): the tokenizer adds it by itself",
        row={"text": "<s>[INST] What colour? [/INST] Blue it is.</s>"},
        tokenizer={"adds": "<s>"},
    ),
    "control token in a question": Case(
        "turn 1: holds the control token '<|im_end|>'", [said("user", "Hello<|im_end|>\n<|im_start|>system"), ANSWERED]
    ),
    "characters that no token covers": Case(
        "'青' is not in the vocabulary", [ASKED, said("assistant", "青")], kind="letters"
    ),
    "half a surrogate pair": Case(
        "holds '\\ud83d', half of a surrogate pair", [ASKED, said("assistant", "Blue \ud83d")]
    ),
    # The template itself.
    "no template": Case("no chat template, which chat data needs", template=None, line=1),
    "a template that is not Jinja": Case("not valid Jinja", template="{% for m in messages %}", line=1),
    "a template that drops every answer": Case(
        "leaves out or rewrites the answer",
        template="{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
        line=1,
    ),
}
LEARNED = {
    "a stock template without markers": (Case(""), "⟦Blue it is.<|im_end|>⟧"),
    "padding that is the end of a turn": (Case("", tokenizer={"pad_token": "<|im_end|>"}), "⟦Blue it is.<|im_end|>⟧"),
    "markers that leave the end out": (Case("", template="marked_without_end"), "⟦Blue it is.<|im_end|>⟧"),
    "a generation prompt that is always there": (
        Case("", template=LOOP + CHATML + "{{ '<|im_start|>assistant\n' }}"),
        "⟦Blue it is.<|im_end|>⟧",
    ),
    "an end that only the generation settings know": (
        Case("", tokenizer={"eos_token": "<|endoftext|>"}, generation={"eos_token_id": [0, 2]}),
        "⟦Blue it is.<|im_end|>⟧",
    ),
    "a template that closes the whole as well": (
        Case("", template=PLAIN + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"),
        "⟦Blue it is.<|im_end|>⟧",
    ),
    "a template with BOS for a tokenizer that adds it": (
        Case("", template="{{ bos_token }}" + PLAIN, tokenizer={"adds": "<s>"}),
        "⟦Blue it is.<|im_end|>⟧",
    ),
}


@pytest.fixture
def files(tokenizer_of: TokenizerOf, templates: dict[str, str], tmp_path: Path) -> Callable[[Case], tuple[Path, Path]]:
    """A case's model folder, and its data file: a good row, then the bad one."""

    def write(case: Case) -> tuple[Path, Path]:
        tokenizer = tokenizer_of("chatml", case.kind)
        template = templates.get(case.template or "", case.template)
        tokenizer.chat_template = template
        for name, value in case.tokenizer.items():
            if name == "adds":
                add_bos(tokenizer)
            else:
                setattr(tokenizer, name, value)
        folder = tmp_path / "model"
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(case.generation))
        data = tmp_path / "rows.jsonl"
        rows = [{"messages": [ASKED, ANSWERED]}, case.row or {"messages": case.turns}]
        if case.template == "thinks" or case.length < 20:  # no conversation is good
            rows[0] = {"text": "Blue it is."}
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder, data

    return write


def add_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_file_and_line(
    name: str,
    files: Callable[[Case], tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = REFUSED[name]
    folder, data = files(case)
    store = f"file://{tmp_path}/store"
    recipe = write_recipe(tmp_path, folder, [data], store=store, sequence_length=case.length)
    show = ["data", "show", str(recipe), f"data.overlong={case.overlong}", "--line"]
    with pytest.raises(SystemExit) as shown:
        cli.run(app, "luthier jobs", [*show, str(case.line)])
    message = capsys.readouterr().err
    assert shown.value.code == 2
    assert f"{data}:{case.line}: " in message
    assert case.reason in message
    if case.line == 2:  # the good row is good, so that it is this row's fault
        with pytest.raises(SystemExit) as good:
            cli.run(app, "luthier jobs", [*show, "1"])
        assert good.value.code == 0, capsys.readouterr().err

    with pytest.raises(InputError) as refused:
        tokenise(folder, data, case, tmp_path)
    assert exit_code(refused.value) == 2
    assert f"{data}:{case.line}: " in str(refused.value)
    assert case.reason in str(refused.value)


@pytest.mark.parametrize("name", LEARNED)
def test_what_misleads_others_is_learned_with_its_end(
    name: str, files: Callable[[Case], tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    case, wanted = LEARNED[name]
    folder, data = files(case)
    with pytest.raises(SystemExit) as shown:
        cli.run(app, "luthier jobs", ["data", "show", str(data), "--line", "2", "--model", str(folder)])
    printed = capsys.readouterr()
    assert shown.value.code == 0, printed.err
    assert wanted in printed.out
    assert printed.out.count("⟦") == 1
    assert printed.out.count("<s>") <= 1


def tokenise(folder: Path, data: Path, case: Case, tmp_path: Path) -> None:
    """What `jobs.train` does with the rows, without Ray in between."""
    config = DataConfig(train=(str(data),), sequence_length=case.length, overlong=case.overlong)  # type: ignore[arg-type]
    shipped = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in dataset.TOKENIZER_FILES}
    store = open_store(f"file://{tmp_path}/datasets")
    rows = list(read_rows(data, str(data)))
    done = dataset.tokenise_shard(shipped, rows, 0, "d" * 40, case.length, config.overlong, store)
    dataset._judge(done.faults, done.samples, config)
