"""From what a client sends to token ids, by the model's own tokenizer and chat template.

It stands beside the engine, in the replica, and not in the ingress: the model's folder, its template and its
vocabulary are then in one process, and an ingress needs no model files and starts in a second.
"""

from pathlib import Path

import jinja2
from transformers import AutoTokenizer

from cluster.errors import InvalidRequest
from serving.calls import Prompt


class Prompts:
    """The tokenizer of one model folder. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a chat (through the template, with the assistant's turn opened), of text, or as given.

        Raises InvalidRequest when the model has no chat template, or when its template refuses the messages.
        """
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        numbers = [each for each in prompt if isinstance(each, int)]
        if numbers:
            return numbers
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "messages")
        try:
            text = self._tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from None
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
