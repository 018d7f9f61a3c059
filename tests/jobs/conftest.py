"""Tiny tokenizers with the chat templates of the families we train, imitated in a few lines each.

What is kept of each is what makes finding the assistant's tokens hard: how a turn opens and ends, what the last turn
has that others have not, which roles are refused.
"""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TokenizerOf = Callable[..., PreTrainedTokenizerFast]

_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "# Tools\n<tools>{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n' }}</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
_CALLS = (
    "{% for call in message.tool_calls %}{% if not loop.first or message.content %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{% if call.function.arguments is string %}{{ call.function.arguments }}"
    "{% else %}{{ call.function.arguments | tojson }}{% endif %}}\n</tool_call>{% endfor %}"
)
_TOOL_ANSWER = (
    "{% elif message.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _chatml(answer: str, start: str = "", prompt: str = _PROMPT) -> str:
    """ChatML as Qwen has it, with tools; `answer` is how an assistant's turn is written."""
    return (
        f"{start}{_TOOLS}{{% for message in messages %}}"
        "{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        f"{{% elif message.role == 'assistant' %}}{answer}{_TOOL_ANSWER}{{% endif %}}{{% endfor %}}{prompt}"
    )


TEMPLATES = {
    # Qwen2.5 and Qwen3-2507.
    "chatml": _chatml("<|im_start|>assistant\n{{ message.content }}" + _CALLS + "<|im_end|>\n"),
    # The hybrid Qwen3: a <think> block after the last question only: an empty one, when it is the last turn of all.
    "qwen3": _chatml(
        "{% set parts = message.content.split('</think>') %}{% set content = parts[-1].lstrip('\n') %}"
        "{% set thought = message.reasoning_content if message.reasoning_content is string "
        "else (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') %}"
        "<|im_start|>assistant\n"
        "{% if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}" + _CALLS + "<|im_end|>\n",
        start="{% set ns = namespace(last=0) %}{% for message in messages %}"
        "{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}",
    ),
    # As DeepSeek-R1 and others: the prompt opens the reasoning, the history has none.
    "thinks": _chatml(
        "<|im_start|>assistant\n{{ message.content.split('</think>')[-1] }}<|im_end|>\n",
        prompt="{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    ),
    "marked": _chatml(
        "<|im_start|>assistant\n{% generation %}{{ message.content }}" + _CALLS + "<|im_end|>\n{% endgeneration %}"
    ),
    # The trap: markers around the words alone, so that the end of the turn would never be learned.
    "marked_without_end": _chatml(
        "<|im_start|>assistant\n{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>\n"
    ),
    "llama3": (
        "{{ bos_token }}{% if tools and messages[0].role != 'system' %}"
        "<|start_header_id|>system<|end_header_id|>\n\n{{ tools | tojson }}<|eot_id|>{% endif %}"
        "{% for message in messages %}{% if message.role == 'tool' %}"
        "<|start_header_id|>ipython<|end_header_id|>\n\n{{ message.content | tojson }}<|eot_id|>"
        "{% elif message.tool_calls %}"
        "{% if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once!') }}{% endif %}"
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "{{ message.tool_calls[0].function.name }}", '
        '"parameters": {{ message.tool_calls[0].function.arguments | tojson }}}<|eot_id|>'
        "{% else %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # No generation prompt at all, and strict about who speaks when.
    "mistral": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('conversation roles must alternate user/assistant') }}{% endif %}"
        "{% if message.role == 'user' %}[INST] {{ (system if loop.first else '') + message.content }}[/INST]"
        "{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # Closes the whole conversation, after the last turn's own end.
    "phi3": (
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    # Closes nothing, and drops system turns without a word.
    "bare": (
        "{% for message in messages if message.role != 'system' %}"
        "{{ 'Q' if message.role == 'user' else 'A' }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    ),
}

_ENDS = {  # of a turn, where it is not ChatML's
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "bare": "<|endoftext|>",
}
_CONTROL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"),
]
_CORPUS = [
    "What colour is the sky? Blue it is. The answer is blue, the question is old, and nobody asks it now.",
    '{"name": "weather", "arguments": {"city": "Oslo"}} user assistant system model tool',
] * 4


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return TEMPLATES


@pytest.fixture(scope="session")
def trained() -> dict[str, Tokenizer]:
    """The two kinds in use: bytes (Llama 3, Qwen) and pieces with a mark for the space before (Mistral, Gemma); and an
    old one, that knows the letters it was made from."""
    byte = Tokenizer(models.BPE())
    byte.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=_CONTROL, show_progress=False),
    )
    piece = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    piece.pre_tokenizer = pre_tokenizers.Metaspace()
    piece.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    piece.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *_CONTROL, *bytes_], show_progress=False)
    )
    letters = Tokenizer(models.BPE(unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Metaspace()
    letters.decoder = decoders.Metaspace()
    letters.train_from_iterator(
        [*_CORPUS, "\n"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *_CONTROL], show_progress=False)
    )
    return {"byte": byte, "piece": piece, "letters": letters}


@pytest.fixture(scope="session")
def tokenizer_of(trained: dict[str, Tokenizer]) -> TokenizerOf:
    """`tokenizer_of(template name, kind)`: a tokenizer with that family's template and special tokens."""

    def make(template: str | None = "chatml", kind: str = "byte") -> PreTrainedTokenizerFast:
        eos = _ENDS.get(template or "", "<|im_end|>" if template else "<|endoftext|>")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(trained[kind].to_str()),
            bos_token="<s>",
            eos_token=eos,
            unk_token="<unk>" if kind == "letters" else None,
            additional_special_tokens=_CONTROL,
            name_or_path=f"tiny-{template}",
        )
        tokenizer.chat_template = TEMPLATES.get(template) if template else None
        return tokenizer

    return make
