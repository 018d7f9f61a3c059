"""The quickstart's model before training: a tokenizer made from its text, and random weights.

    make_model(Path("model"))        # a Hugging Face folder; AutoModelForCausalLM and AutoTokenizer load it

Nothing comes from a hub. The same arguments give the same bytes, so a second quickstart finds the first one's work.
Tests make smaller models, and other architectures, with the same call.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from scripts.demo import tasks

Architecture = Literal["qwen3", "llama", "mistral", "gemma3"]

CONFIGS: dict[Architecture, type[PreTrainedConfig]] = {
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gemma3": Gemma3TextConfig,
}

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2; padding must not look like an end of turn

MAX_VOCABULARY = 2048  # more than the text gives: every word of it ends up as one token
MAX_POSITIONS = 2048
INITIAL_STD = 0.06  # 0.02, usual for wide models, learned more slowly at a width of 128

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}"
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(
    folder: Path,
    *,
    architecture: Architecture = "qwen3",
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    seed: int = 0,
) -> None:
    """Write config, generation config, tokenizer and fp32 weights (safetensors) into `folder`.

    `heads` query heads share half as many key-value heads, so that grouped-query attention is what is tested and
    shown; `hidden_size` must be a multiple of 2 × heads. Deterministic, and leaves torch's random state as it was.
    """
    if heads % 2 or hidden_size % (2 * heads):
        raise ValueError(
            f"hidden_size={hidden_size}, heads={heads}: heads must be even and 2 × heads divide hidden_size"
        )
    tokenizer = make_tokenizer()
    config = CONFIGS[architecture](
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden_size // heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=INITIAL_STD,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from the training text; any string comes back as it went in."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHATML,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def training_text() -> Iterator[str]:
    """Every turn of every training chat, and the roles: what the tokenizer learns its words from."""
    for task in tasks.TASKS:
        for row in tasks.rows(task, "train"):
            for message in row["messages"]:
                yield f"{message['role']}\n"
                yield message["content"]
