"""Golden masks: what is learned of each family's chat format, piece by piece, and what of it is refused.

A file in masks/ says of a family its special tokens, its template in our own words, and what becomes of each of the
conversations: the exact text, what is learned of it between ⟦ and ⟧; or a refusal. The text was written from the
family's published format, not by our code, and nothing here writes it. To look at what our code makes of a family:

    python -m tests.jobs.test_masks qwen3
"""

import re
import sys
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cluster.errors import DataError, ModelError
from jobs.chat import Renderer
from jobs.data.sample import marked, pieces
from jobs.formats import Conversation, normalise
from jobs.rows import Row, Unusable

FOLDER = Path(__file__).parent / "masks"
CONVERSATIONS: dict[str, Row] = yaml.safe_load((FOLDER / "conversations.yaml").read_text())
CONVERSATIONS["tool call without tools"] = {"messages": CONVERSATIONS["tool call"]["messages"]}
FAMILIES: dict[str, dict[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.stem != "conversations"
}


@cache
def trained() -> str:
    """Bytes, and the commonest pairs of them; no token of any family."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [yaml.safe_dump(row) for row in CONVERSATIONS.values()] + ["\n\n"] * 9
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return str(tokenizer.to_str())


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer made on the spot, with the family's special tokens and template."""
    family = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained()),
        bos_token=family.get("bos"),
        eos_token=family["eos"],
        pad_token=family.get("pad"),
        additional_special_tokens=family["special"],
        name_or_path=name,
    )
    tokenizer.add_tokens(family.get("added", []))
    tokenizer.chat_template = family["template"]
    return tokenizer


def outcome(name: str, conversation: str) -> str:
    """What our code makes of it: the text with what is learned marked, or the reason why not."""
    tokenizer = tokenizer_of(name)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[name]["stops"]]
    example = normalise(CONVERSATIONS[conversation])
    assert isinstance(example, Conversation)
    try:
        ids, supervised = Renderer(tokenizer, 10_000, stops=stops).tokens(example)
    except (DataError, ModelError) as error:
        return f"refused: {error}"
    return marked(pieces(tokenizer, ids, supervised))


@pytest.mark.parametrize(
    ("family", "conversation"), [(name, which) for name, family in FAMILIES.items() for which in family["golden"]]
)
def test_the_mask_is_the_golden_one(family: str, conversation: str) -> None:
    golden = FAMILIES[family]["golden"][conversation].replace("TODAY", f"{datetime.now():%Y-%m-%d}")
    assert outcome(family, conversation) == golden


@pytest.mark.parametrize(
    ("family", "conversation"), [(name, which) for name, family in FAMILIES.items() for which in family["refused"]]
)
def test_what_a_family_has_no_place_for_is_refused(family: str, conversation: str) -> None:
    assert outcome(family, conversation).startswith(f"refused: {FAMILIES[family]['refused'][conversation]}")


@settings(max_examples=100)
@given(
    family=st.sampled_from([name for name, family in FAMILIES.items() if "two exchanges" in family["golden"]]),
    texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6),
)
def test_whatever_is_said_each_answer_follows_what_a_server_would_ask_and_ends(family: str, texts: list[str]) -> None:
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts[: len(texts) // 2 * 2])]
    tokenizer, example = tokenizer_of(family), normalise({"messages": turns})
    assert isinstance(example, Conversation)
    stops = [tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, FAMILIES[family]["stops"])]
    try:
        ids, supervised = Renderer(tokenizer, 10_000, stops=stops).tokens(example)
    except DataError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert re.search("rewrites|half of a surrogate|holds the end of what|before an earlier turn", reason)
        return
    begins = [n for n, learned in enumerate(supervised) if learned and not supervised[n - 1]]
    ends = [n for n, learned in enumerate(supervised) if learned and not (*supervised, False)[n + 1]]
    assert len(begins) == len(turns) // 2
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        asked, answer = turns[: 2 * number + 1], turns[2 * number + 1]["content"]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        # Of an earlier answer's header a server joins no white space any more: in one row both cannot be had.
        assert ids[:begin] == prompt if number == 0 else ids[begin - 2 : begin] == prompt[-2:]
        assert tokenizer.decode(ids[:begin]) == tokenizer.decode(prompt)
        assert ids[end] in stops
        assert answer.strip() in tokenizer.decode(ids[begin:end])


def test_every_family_says_what_becomes_of_every_conversation() -> None:
    assert len(FAMILIES) >= 20
    for name, family in FAMILIES.items():
        said = {*family["golden"], *family["refused"]} - {"tool call without tools"}
        assert said == set(CONVERSATIONS) - {"tool call without tools"}, name
        for text in family["golden"].values():
            ends = text[: text.rindex("⟧")]
            assert ends.endswith((family["eos"], *family["stops"])), name


def test_an_unusable_row_is_none_of_these() -> None:
    assert not any(isinstance(normalise(row), Unusable) for row in CONVERSATIONS.values())


if __name__ == "__main__":
    for which in CONVERSATIONS:
        print(f"--- {which}\n{outcome(sys.argv[1], which)}")
