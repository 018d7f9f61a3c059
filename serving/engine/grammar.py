"""Grammars over tokens: which tokens may follow, so that the whole answer is JSON of a schema, or whatever was asked.

The only file that touches llguidance, which compiles a grammar within milliseconds and then says for each state which
tokens of the vocabulary keep to it. A grammar is compiled once for its text and copied for each request.
"""

import json
import re
import threading
from collections import OrderedDict
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from cluster.errors import InvalidRequest
from serving.engine.protocol import Grammar

_MAX_CACHED = 128
_MAX_TEXT = 256 * 1024  # characters; the largest take half a second to compile
_LIMITS = LLParserLimits(
    max_grammar_size=15_000,  # symbols; objects of about 1,500 properties. The time to compile grows with their square
    max_items_in_row=10_000,  # 2,000 by default, which is met by 500 properties that need not be there
    verbose_errors=False,
)
_MAX_MESSAGE = 300  # characters of what the library says

_WHITESPACE = r" |\n( {0,40}|\t{0,12})"
"""Between two parts of JSON: a space, or a line break with an indentation. Where any whitespace may stand, a weak model
writes blank lines until max_tokens."""


class Grammars:
    """The compiled grammars of one model, the last ones used kept. For use from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: frozenset[int]) -> None:
        """`tokenizer` is transformers'; `vocabulary` is the model's, which may be larger than the tokenizer's."""
        self._source = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = sorted(eos_ids)
        self._making = threading.Lock()
        self._tokenizer: LLTokenizer | None = None  # made for the first grammar: it takes a second
        self._lock = threading.Lock()  # never held while something is compiled
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> LLMatcher:
        """The grammar at its beginning, not to be moved on. Raises InvalidRequest, see Engine.compile."""
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        return compiled

    def matcher(self, grammar: Grammar) -> "Matcher":
        """A new answer's place in the grammar; microseconds when it is compiled. Raises as `compile` does."""
        return Matcher(self.compile(grammar).deep_copy(), self._vocabulary)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if len(grammar.text) > _MAX_TEXT:
            raise _refused(grammar, f"it has {len(grammar.text)} characters; at most {_MAX_TEXT} are compiled")
        try:
            source = _source(grammar)
        except ValueError as error:
            raise _refused(grammar, str(error)) from None
        compiled = LLMatcher(self._made_tokenizer(grammar), source, log_level=0, limits=_LIMITS)
        if compiled.is_error():
            raise _refused(grammar, compiled.get_error())
        compiled.compute_logit_bias()  # the first mask is the dearest; and only it shows that nothing may begin
        if compiled.is_error():
            raise _refused(grammar, "no answer belongs to it")
        return compiled

    def _made_tokenizer(self, grammar: Grammar) -> LLTokenizer:
        with self._making:
            if self._tokenizer is None:
                try:
                    self._tokenizer = from_tokenizer(self._source, self._vocabulary, self._eos_ids)
                except ValueError as error:  # not one of the tokenizers library, or of a kind unknown to llguidance
                    raise _refused(grammar, f"this model's tokenizer has no grammars: {error}") from None
            return self._tokenizer


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further: nothing may follow, or a limit of its states."""
        return _shortened(self._matcher.get_error()) if self._matcher.is_error() else None

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, bool [vocabulary], on the CPU; none after an error."""
        biases = self._matcher.compute_logit_bias()  # a byte a token
        if self._matcher.is_error():
            return torch.zeros(self._vocabulary, dtype=torch.bool)
        return torch.frombuffer(bytearray(biases), dtype=torch.uint8)[: self._vocabulary] != 0

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen."""
        self._matcher.consume_token(token_id)


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises ValueError."""
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(strict_schema(grammar.text, whitespace_pattern=_WHITESPACE))
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            return LLMatcher.grammar_from_regex(choice_pattern(grammar.text))
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


def strict_schema(schema: str, **whitespace: object) -> str:
    """A JSON schema that says how llguidance shall take it; `whitespace` is in its terms. The schema's own `x-guidance`
    is dropped: what is not understood must stay an error, and what is written must be JSON."""
    return json.dumps({**json.loads(schema), "x-guidance": {"lenient": False, "coerce_one_of": False, **whitespace}})


def choice_pattern(choices: str) -> str:
    """The regular expression of a JSON list of strings."""
    return "|".join(map(re.escape, json.loads(choices)))


def _refused(grammar: Grammar, why: str) -> InvalidRequest:
    return InvalidRequest(f"{grammar.param} cannot be followed: {_shortened(why)}", grammar.param)


def _shortened(message: str) -> str:
    return " ".join(message.split())[:_MAX_MESSAGE]
