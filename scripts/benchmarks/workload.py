"""What the training benchmark trains, and on what: a model of about 20 million parameters and chat rows, made here.

Everything is a function of constants in this file, so that two machines measure the same work. Weights are random and
words are invented, because the time of a step depends on shapes and lengths and not on what they mean.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from scripts.demo.model import CHATML, END, PAD, START

SEQUENCE_LENGTH = 512
GLOBAL_BATCH = 4
VOCABULARY = 16_384
"""Rows of the embedding. The tokenizer fills about half of them; models are padded to a round number too."""

_WORDS = 6_000
_LETTERS = "bdfgklmnprstvz", "aeiou", ("", "", "", "n", "r", "s", "l")


@dataclass(frozen=True)
class Shape:
    """A Qwen3 or Llama shape: grouped-query attention with half as many key-value heads as query heads.

    `vocabulary` is the rows of the embedding, which Qwen3 uses as its output layer too.
    """

    hidden_size: int
    layers: int
    heads: int
    vocabulary: int = VOCABULARY
    family: Literal["qwen3", "llama"] = "qwen3"


_FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}

FULL = Shape(hidden_size=384, layers=8, heads=6)
"""19.3 million parameters, 6.3 of them in the embedding, which is also the output layer."""

MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""CHATML for rows without tools, with marks that say what the assistant's tokens are."""

QUICK = Shape(hidden_size=64, layers=2, heads=4)
"""For a test that the benchmark works; its figures mean nothing."""


def write_model(folder: Path, shape: Shape) -> int:
    """Write a Hugging Face folder with fp32 weights and a tokenizer. Returns the number of parameters."""
    tokenizer = make_tokenizer()
    make_config, make_model = _FAMILIES[shape.family]
    config = make_config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=8 * shape.hidden_size // 3 // 64 * 64,  # real ones divide so too
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        head_dim=shape.hidden_size // shape.heads,
        max_position_embeddings=4 * SEQUENCE_LENGTH,
        tie_word_embeddings=shape.family == "qwen3",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = make_model(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_rows(path: Path, count: int) -> None:
    """Write chat rows as JSON lines: an occasional system turn, a question, an answer, sometimes a second exchange.

    Lengths are log-normal, as those of chat data are; about two thirds of the tokens are the assistant's, between
    Alpaca (nine tenths) and tool calls with their schemas (a half).
    """
    draw = random.Random(1)
    lexicon = _lexicon()
    with path.open("w") as out:
        for _ in range(count):
            turns = [("system", _text(draw, lexicon, 20, 0.3))] if draw.random() < 0.3 else []
            for _ in range(2 if draw.random() < 0.2 else 1):
                turns.append(("user", _text(draw, lexicon, 35, 0.7)))
                turns.append(("assistant", _text(draw, lexicon, 85, 0.6)))
            messages = [{"role": role, "content": content} for role, content in turns]
            out.write(json.dumps({"messages": messages}) + "\n")


def _text(draw: random.Random, lexicon: list[str], median_words: int, sigma: float) -> str:
    """Words with the frequencies of Zipf's law, at most as many as leave room for the other turns."""
    words = min(int(median_words * draw.lognormvariate(0, sigma)), 2 * median_words)
    return " ".join(lexicon[int(_WORDS ** draw.random()) - 1] for _ in range(max(words, 2)))


def _lexicon() -> list[str]:
    draw = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < _WORDS:
        syllables = draw.choice((1, 2, 2, 3))
        words["".join(draw.choice(letters) for _ in range(syllables) for letters in _LETTERS)] = None
    return list(words)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, in which nearly every word is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_spelled(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _spelled() -> Iterator[str]:
    yield "system\nuser\nassistant\n"
    for word in _lexicon():
        yield f"{word} {word}"
