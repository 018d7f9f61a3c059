"""Grammars with vLLM: its llguidance chooses the tokens, and ours, told what the native engine tells it, judges them.

    compile ▸ ours must understand it ▸ vLLM must ▸ vLLM's tokens, each taken by our own matcher ▸ complete, or an error

So a grammar means what it means with the native engine, refusals are the same, and an answer that leaves its grammar
(vLLM ends one that came to a dead end as if it were whole) is an error and not a wrong answer.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable

import aiohttp

from cluster.errors import InvalidRequest, NotServing
from serving.engine.grammar import Grammars, Matcher, choice_pattern, strict_schema
from serving.engine.protocol import GenerationRequest, Grammar, SamplingParams
from serving.engine.vllm_api import Json, completion_body
from serving.engine.vllm_facts import ModelFacts
from serving.engine.vllm_server import VllmServer

_MAX_KNOWN = 1024

_WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""Between two parts of JSON: nothing, or one space after a comma or a colon; a part of what the native engine allows.
The llguidance of vLLM 0.32 (1.7) lets any other whitespace be repeated, and weak models then write nothing else."""


class VllmGrammars:
    """The grammars of one model that both sides understand. For use from any thread."""

    def __init__(self, facts: ModelFacts, ask: Callable[[Grammar], None]) -> None:
        """`ask` raises InvalidRequest when vLLM does not understand one; it blocks."""
        self._ours = Grammars(facts.tokenizer, facts.vocabulary, facts.eos_ids)
        self._ask = ask
        self._lock = threading.Lock()
        self._known: OrderedDict[Grammar, None] = OrderedDict()  # which vLLM understands; the last ones used

    def compile(self, grammar: Grammar) -> None:
        """See Engine.compile. Raises what `ask` raises, too."""
        self._ours.compile(grammar)
        with self._lock:
            is_known = grammar in self._known
        if not is_known:
            self._ask(grammar)
        with self._lock:
            self._known[grammar] = None
            self._known.move_to_end(grammar)
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A new answer's place in the grammar. Raises InvalidRequest."""
        return self._ours.matcher(grammar)


async def ask(server: VllmServer, model: str, facts: ModelFacts, grammar: Grammar) -> None:
    """Raises InvalidRequest when vLLM does not understand a grammar, and Overloaded when it went away.

    It gets the grammar with a prompt that it refuses too, but looks at later. So it says which of the two it refuses at
    once, whatever waits, and computes nothing.
    """
    stray = facts.vocabulary + len(facts.tokenizer)
    body = completion_body(GenerationRequest("ask", [stray], model, SamplingParams()), ())
    try:
        of_prompt = await server.refusal(body)
        of_either = await server.refusal({**body, "structured_outputs": structured_outputs(grammar)})
    except aiohttp.ClientError as error:
        raise NotServing("vLLM went away while it looked at a grammar") from error
    if of_either != of_prompt:
        raise InvalidRequest(f"{grammar.param} cannot be followed by vLLM: {of_either}", grammar.param)


def structured_outputs(grammar: Grammar) -> Json:
    """The request's parameter of that name, by which vLLM's guidance backend makes the same of it as grammar.py."""
    match grammar.kind:
        case "json_schema":
            return {"json": strict_schema(grammar.text, **_WHITESPACE)}
        case "regex":
            return {"regex": grammar.text}
        case "choice":
            return {"regex": choice_pattern(grammar.text)}
        case "lark":  # without this line, one whose first rule is written `?start` would be read as GBNF
            return {"grammar": f"%llguidance {{}}\n{grammar.text}"}
