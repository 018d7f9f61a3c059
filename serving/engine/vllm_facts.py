"""What must be known of a model to check requests and to make text, before and while vLLM runs it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from cluster.catalogue.remote_code import NO_CODE
from cluster.errors import InvalidRequest, ModelError, RequestError
from serving.engine.protocol import GenerationRequest, TokenLogprob
from serving.engine.vllm_api import Candidate


@dataclass(frozen=True)
class ModelFacts:
    """A model as requests meet it."""

    tokenizer: Any
    vocabulary: int
    max_context: int  # prompt and answer, in tokens
    eos_ids: frozenset[int]

    def check(self, request: GenerationRequest) -> None:
        """Raises RequestError when vLLM can never answer it as the native engine would."""
        params = request.params
        prompt, new = len(request.prompt_ids), params.max_tokens
        if not prompt:
            raise RequestError("the prompt is empty; it must hold at least one token")
        stray = self._stray(request.prompt_ids)
        if stray is not None:
            raise RequestError(f"prompt token {stray} is not in the model's vocabulary of {self.vocabulary}")
        stray = self._stray(token for token, _ in params.logit_bias)
        if stray is not None:
            raise InvalidRequest(
                f"logit_bias has token {stray}, which is not in the model's vocabulary of {self.vocabulary}",
                "logit_bias",
            )
        if params.grammar is not None and params.logprobs is not None:
            raise InvalidRequest(
                f"logprobs together with {params.grammar.param} need the native engine, and this base is served by "
                "vLLM (engine.kind), whose log probabilities are then not the model's own; leave one of them out",
                "logprobs",
            )
        if prompt + new > self.max_context:
            raise RequestError(
                f"{prompt} prompt tokens and max_tokens {new} are more than the context of {self.max_context}; "
                "shorten the prompt or lower max_tokens"
            )

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._text(list(token_ids), skip_special_tokens=True)

    def named(self, candidate: Candidate) -> TokenLogprob:
        """A candidate with its text as it is, special or not."""
        text = self._text([candidate.token_id], skip_special_tokens=False)
        return TokenLogprob(candidate.token_id, text, candidate.logprob)

    def _stray(self, token_ids: Iterable[int]) -> int | None:
        return next((each for each in token_ids if not 0 <= each < self.vocabulary), None)

    def _text(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        text = self.tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def read_facts(folder: Path, max_context: int | None = None) -> ModelFacts:
    """What a model's folder says; `max_context` None is the model's own. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} cannot be read as a causal language model: {error}") from error
    try:
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:  # without the file, transformers takes what the model's config says
        eos = GenerationConfig.from_model_config(config).eos_token_id
    eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
    if tokenizer.eos_token_id is not None:
        eos_ids.add(tokenizer.eos_token_id)
    text = config.get_text_config()
    own = int(text.max_position_embeddings)
    return ModelFacts(tokenizer, int(text.vocab_size), min(own, max_context or own), frozenset(eos_ids))
