"""From what a client sends to token ids, by the model's own tokenizer and chat template.

It stands beside the engine, in the replica, and not in the ingress: the model's folder, its template and its
vocabulary are then in one process, and an ingress needs no model files and starts in a second.
"""

from pathlib import Path

import jinja2
from transformers import AutoTokenizer

from cluster.catalogue.remote_code import NO_CODE
from cluster.errors import InvalidRequest
from serving.calls import Prompt


class Prompts:
    """The tokenizer of one model folder. Not for several threads at once."""

    def __init__(self, folder: Path, max_context: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE)
        # No text of more characters fits the context, whatever its tokens. Tokenising 20 MB to find out takes minutes,
        # in which everybody else's prompts would wait.
        self._max_characters = max_context * max(map(len, self._tokenizer.get_vocab()))
        self._max_context = max_context

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a chat (through the template, with the assistant's turn opened), of text, or as given.

        Raises InvalidRequest when the model has no chat template, or when its template refuses the messages.
        """
        if isinstance(prompt, str):
            self._check_length(prompt, "prompt")
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
        self._check_length(text, "messages")
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_length(self, text: str, param: str) -> None:
        if len(text) > self._max_characters:
            raise InvalidRequest(
                f"the context here is {self._max_context} tokens, and {len(text):,} characters are more than that in "
                f"any tokens; shorten the {param}",
                param,
                "context_length_exceeded",
            )
