"""Golden masks: what is learned of each family's chat format, piece by piece, and what of it is refused.

A file in masks/ says of a family its special tokens, its template in our own words, and what becomes of each of the
conversations: the exact text, what is learned of it between ⟦ and ⟧; or a refusal. The text was written from the
family's published format, not by our code, and nothing here writes it. To look at what our code makes of a family:

    python -m tests.jobs.test_masks qwen3
"""

import sys
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
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
