"""The tokenizer, the generation settings and the chat template of a folder, and whether they agree; no transformers.

What is looked for costs days when it is found late: an answer that never ends because the template's end-of-turn token
is no eos, padding that is the end token and so masks it, a template that does not render.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.catalogue.definition import Definition, ids
from cluster.catalogue.finding import Finding, Level

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
RENDER_S = 10.0
_PROBE = [
    {"role": "user", "content": "Which colour is it?"},
    {"role": "assistant", "content": "Blue it is."},
    {"role": "user", "content": "And now?"},
]


@dataclass(frozen=True)
class TokenizerFacts:
    """What the folder says of its tokenizer; ids are None where it does not."""

    kind: str
    vocabulary: int | None = None
    eos: str | None = None
    eos_id: int | None = None
    pad: str | None = None
    template: str | None = None
    renders: bool = False
    generation_markers: bool = False
    generation_eos_ids: tuple[int, ...] = ()
    token_ids: dict[str, int] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "vocabulary": self.vocabulary,
            "eos": self.eos,
            "eos_id": self.eos_id,
            "pad": self.pad,
            "chat_template": self.template is not None,
            "renders": self.renders,
            "generation_markers": self.generation_markers,
            "generation_eos_ids": list(self.generation_eos_ids),
        }


def read_tokenizer(folder: Path, definition: Definition | None) -> tuple[TokenizerFacts, list[Finding]]:
    """What there is, and what is wrong with it."""
    found: list[Finding] = []
    settings = _json(folder / "tokenizer_config.json", found)
    generation = _json(folder / "generation_config.json", found)
    kind, token_ids = _vocabulary(folder, settings, found)
    eos, pad = _text(settings.get("eos_token")), _text(settings.get("pad_token"))
    template = _template(folder, settings)
    rendered = _render(template, settings, found) if template else None
    facts = TokenizerFacts(
        kind=kind,
        vocabulary=1 + max(token_ids.values()) if token_ids else None,
        eos=eos,
        eos_id=token_ids.get(eos) if eos else None,
        pad=pad,
        template=template,
        renders=rendered is not None,
        generation_markers=bool(template and MARKER.search(template)),
        generation_eos_ids=ids(generation.get("eos_token_id")),
        token_ids=token_ids,
    )
    return facts, [*found, *_agreement(facts, definition, rendered)]


def _vocabulary(folder: Path, settings: dict[str, Any], found: list[Finding]) -> tuple[str, dict[str, int]]:
    """Which kind of tokenizer there is, and its tokens' ids where they can be read."""
    if (folder / "tokenizer.json").is_file():
        try:
            return "tokenizer.json", _token_ids(_json(folder / "tokenizer.json", found))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            text = f"tokenizer.json is none of the tokenizers library: {type(error).__name__} {error}"
            found.append(Finding(Level.FAULT, "tokenizer", text, "fetch it again"))
            return "tokenizer.json", {}
    slow = next((name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()), None)
    if slow:
        text = (
            f"there is {slow} and no tokenizer.json, which says which text each token covers: chats cannot be trained"
        )
        found.append(
            Finding(Level.WARNING, "tokenizer", text, "make it with transformers: AutoTokenizer … save_pretrained()")
        )
        added = settings.get("added_tokens_decoder", {})
        return slow, {each["content"]: int(number) for number, each in added.items()}
    text = "there is neither tokenizer.json nor tokenizer.model"
    found.append(
        Finding(Level.FAULT, "tokenizer", text, "copy the tokenizer's files of the base model into the folder")
    )
    return "none", {}


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score], in order
        token_ids = {str(entry[0]): index for index, entry in enumerate(vocabulary)}
    else:
        token_ids = {str(token): int(number) for token, number in vocabulary.items()}
    return token_ids | {str(each["content"]): int(each["id"]) for each in tokenizer.get("added_tokens", [])}


def _agreement(facts: TokenizerFacts, definition: Definition | None, rendered: str | None) -> Iterator[Finding]:
    part = "generation settings"
    ends = set(facts.generation_eos_ids) or set(definition.eos_ids if definition else ())
    if facts.kind == "none":
        return
    if facts.eos is None:
        text = "tokenizer_config.json names no eos_token, so no answer would end"
        yield Finding(Level.WARNING, "tokenizer", text, "set eos_token to the token that ends a turn")
    elif facts.token_ids and facts.eos_id is None:
        text = f"the eos_token {facts.eos!r} is not in the vocabulary"
        yield Finding(Level.FAULT, "tokenizer", text, "take tokenizer_config.json and tokenizer.json of one revision")
    elif facts.eos_id is not None and ends and facts.eos_id not in ends:
        text = f"answers end at {sorted(ends)}, and the tokenizer's eos_token {facts.eos!r} is {facts.eos_id}"
        yield Finding(Level.WARNING, part, text, "add it to eos_token_id in generation_config.json")
    if facts.pad is not None and facts.pad == facts.eos:
        text = f"padding and the end of a turn are one token ({facts.pad!r}): what masks padding masks the end"
        yield Finding(
            Level.WARNING, "tokenizer", text, "fine for Luthier's packed rows; set another pad_token for others"
        )
    size = definition.shape.vocab_size if definition else None
    if size is not None and facts.vocabulary is not None and facts.vocabulary > size:
        text = f"it gives ids up to {facts.vocabulary - 1}, and the embedding has {size} rows"
        yield Finding(Level.FAULT, "tokenizer", text, "take the tokenizer that belongs to these weights")
    if size is not None and (stray := [each for each in sorted(ends) if each >= size]):
        yield Finding(Level.FAULT, part, f"eos_token_id {stray[0]} is beyond the vocabulary of {size}", "correct it")
    if facts.template is None:
        text = "there is none: the model completes text, and chats can neither be trained nor served"
        yield Finding(Level.WARNING, "chat template", text, "take the instruct model, or add chat_template.jinja")
    elif rendered is not None:
        yield from _end_of_turn(facts, ends, rendered)


def _end_of_turn(facts: TokenizerFacts, ends: set[int], rendered: str) -> Iterator[Finding]:
    """Which token follows an answer, and whether generation stops at it."""
    if _PROBE[1]["content"] not in rendered or _PROBE[2]["content"] not in rendered:
        text = "a conversation of three turns does not come out with all of their text"
        yield Finding(Level.WARNING, "chat template", text, "look at it: `luthier jobs data show` prints a sample")
        return
    after = rendered.split(_PROBE[1]["content"], 1)[1].lstrip()
    special = [token for token in facts.token_ids if after.startswith(token)]
    end = max(special, key=len, default=None)
    ends = ends | ({facts.eos_id} if facts.eos_id is not None else set())
    if end is not None and facts.token_ids and ends and facts.token_ids[end] not in ends and not end.isalnum():
        text = (
            f"an answer ends with {end!r} (id {facts.token_ids[end]}), where generation does not stop: {sorted(ends)}"
        )
        yield Finding(Level.WARNING, "chat template", text, "add that id to eos_token_id in generation_config.json")


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The template for chats: a file of its own, or in the tokenizer's settings, by itself or by name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(errors="replace")
    said = settings.get("chat_template")
    if isinstance(said, list):
        said = next((each.get("template") for each in said if each.get("name") == "default"), None)
    return said if isinstance(said, str) else None


def _render(template: str, settings: dict[str, Any], found: list[Finding]) -> str | None:
    """The probe conversation as the template writes it, in jinja's sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda pattern: pattern}
    tokens = {name: _text(settings.get(name)) or "" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    try:
        with _at_most(RENDER_S):
            compiled = environment.from_string(template)
            return compiled.render(messages=_PROBE, add_generation_prompt=True, tools=None, documents=None, **tokens)
    except (
        *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
        *(TimeoutError, MemoryError, RecursionError),
    ) as error:
        text = f"it does not render a conversation of user and assistant: {error}"
        found.append(Finding(Level.FAULT, "chat template", text, "correct chat_template.jinja"))
        return None


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer: jinja's sandbox bounds one loop, and not loops in loops."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(Extension):
    """`{% generation %}` marks what is to be learned; what it holds is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _text(token: Any) -> str | None:
    """A special token's text, which settings give as such or in an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _json(path: Path, found: list[Finding]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        found.append(Finding(Level.FAULT, "tokenizer", f"{path.name} cannot be read: {error}", "fetch it again"))
        return {}
    return read if isinstance(read, dict) else {}
