"""OpenAI's API as pure functions: request bodies in, errors out; answers.py has the answers. No Ray, no torch.

Requests are checked strictly. A parameter that we do not support and that would change the answer is a 400
that names it, and so is a parameter nobody knows: nothing is ignored in silence. Parameters at the value
that means "off" are welcome, because clients send them.

The shapes are those of OpenAI's API reference (chat completions, completions, errors). `describe` is the one
place that maps cluster/errors.py to HTTP.
"""

import hashlib
import json
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from cluster.errors import (
    AdapterNotFound,
    AdapterRefused,
    InvalidRequest,
    LicenceRefused,
    LuthierError,
    NotServing,
    ObjectDamaged,
    ObjectNotFound,
    Overloaded,
    RequestError,
    StoreError,
    UnknownModel,
)
from serving.calls import Message, Prompt
from serving.engine.protocol import (
    MAX_BIAS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    SamplingParams,
)
from serving.structured import ResponseFormat, StructuredOutputs

MAX_CHOICES = 128
"""Answers of one request: prompts × n. OpenAI's own limit for n."""

MAX_STOPS = 4
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions. Chat answers may fill the context."""


# What OpenAI's API has and we have not: the values that mean "off", which are the only ones accepted.
_OFF: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


TokenId = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")]  # JSON's keys are strings
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]


class StreamOptions(_Body):
    include_usage: bool = False


class _Sampling(_Body):
    """What chat and completions share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, description="0 and -1 are off; not OpenAI's, but common")] = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    logit_bias: dict[TokenId, Bias] = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    # Not OpenAI's, but vLLM's, and so common:
    repetition_penalty: Annotated[float, Field(ge=1 / MAX_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # OpenAI's note of who asks; it never changes an answer

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        values = (value,) if isinstance(value, str) else value
        if isinstance(values, list | tuple) and len(values) > MAX_STOPS:
            raise ValueError(f"{len(values)} stop strings; give at most {MAX_STOPS}")
        return tuple(values) if isinstance(values, list) else values

    @model_validator(mode="after")
    def _usage_needs_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @model_validator(mode="after")
    def _asks_for_one_form(self) -> Self:
        if self.structured_outputs is not None and self.response_format and self.response_format.wanted:
            raise ValueError("structured_outputs and response_format both say what to answer; give one of them")
        return self

    def _params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        form = self.structured_outputs or self.response_format
        return SamplingParams(
            max_tokens=max_tokens or max(COMPLETION_MAX_TOKENS, self.min_tokens),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            stop=self.stop,
            seed=self.seed,
            logprobs=logprobs,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in self.logit_bias.items()),
            grammar=form.wanted if form is not None else None,
        )


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return (tuple(_message(message, index) for index, message in enumerate(self.messages)),)

    @property
    def limit(self) -> int | None:
        """Tokens asked for; None is up to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def params(self) -> SamplingParams:
        return self._params(self.limit, (self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] = COMPLETION_MAX_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if not self.prompts or [] in (self.prompt if isinstance(self.prompt, list) else ()):
            raise ValueError("prompt is, or holds, an empty list")
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"prompt: {len(self.prompts)} with n {self.n}; at most {MAX_CHOICES} answers at once")
        return self

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (self.prompt,)
        numbers = tuple(each for each in self.prompt if isinstance(each, int))
        if numbers:
            return (numbers,)
        return tuple(
            each if isinstance(each, str) else tuple(each) for each in self.prompt if not isinstance(each, int)
        )

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def params(self) -> SamplingParams:
        return self._params(self.max_tokens, self.logprobs)


Request = TypeVar("Request", bound=BaseModel)


def parse(body: bytes, kind: type[Request]) -> Request:
    """Check a request body. Raises InvalidRequest, which names the parameter at fault."""
    try:
        given = from_json(body, allow_inf_nan=False)  # not json.loads, which a deep nesting breaks
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise InvalidRequest("the body must be a JSON object")
    given = {name: value for name, value in given.items() if value is not None}  # null is "not given" in this API
    for name in [name for name in given if name in _OFF and name not in kind.model_fields]:
        value = given.pop(name)
        if not any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in _OFF[name]):
            accepted = " or ".join(json.dumps(off) for off in _OFF[name])
            raise InvalidRequest(
                f"{name} is not supported here; leave it out (only {accepted} is accepted)",
                name,
                "unsupported_parameter",
            )
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _invalid(error, kind) from None


def _invalid(error: ValidationError, kind: type[BaseModel]) -> InvalidRequest:
    detail = error.errors(include_url=False)[0]
    place = [str(part) for part in detail["loc"]]
    param = place[0] if place else None
    where = ".".join(part for part in place if "[" not in part)
    match detail["type"]:
        case "extra_forbidden" if len(place) == 1:
            known = ", ".join(sorted(kind.model_fields))
            return InvalidRequest(f"unknown parameter: {where}; supported: {known}", param, "unknown_parameter")
        case "missing":
            return InvalidRequest(f"{where} is missing", param, "missing_required_parameter")
        case _ if param == "prompt":
            wanted = "a string, a list of strings, a list of token ids, or a list of such lists"
            return InvalidRequest(f"prompt must be {wanted}", param)
        case "value_error":
            message = str(detail["ctx"]["error"])
            return InvalidRequest(f"{where}: {message}" if where else message, param or message.split()[0].rstrip(":"))
    return InvalidRequest(f"{where}: {detail['msg']}, got {json.dumps(detail['input'], default=str)[:80]}", param)


def _message(message: Message, index: int) -> Message:
    """A message as chat templates take it: a role and text."""
    where = f"messages[{index}]"
    given = {name: value for name, value in message.items() if value not in (None, [])}
    role, content = given.pop("role", None), given.pop("content", None)
    if role not in ("system", "developer", "user", "assistant"):
        raise InvalidRequest(
            f"{where}.role is {role!r}; use system, developer, user or assistant (tools are not supported)", "messages"
        )
    if given:
        raise InvalidRequest(f"{where}.{min(given)} is not supported here; leave it out", "messages")
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be text or a list of text parts", "messages")
    return {"role": "system" if role == "developer" else role, "content": content}


def _text_part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InvalidRequest(f"{where}.content holds a part of type {kind!r}; only text is supported", "messages")


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of the index-th choice: choice 0 is what n=1 would give; the others differ from it and each other."""
    if seed is None or index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class HttpError:
    """An error as it goes over HTTP."""

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def describe(error: Exception) -> HttpError:
    """Which HTTP answer an error is. What nobody raised on purpose says nothing of our insides."""
    message = str(error)
    match error:
        case InvalidRequest():
            return HttpError(400, "invalid_request_error", message, error.param, error.code)
        case UnknownModel() | AdapterNotFound():
            return HttpError(404, "invalid_request_error", message, "model", "model_not_found")
        case Overloaded():
            headers = {"retry-after": str(error.retry_after_s)}
            if isinstance(error, NotServing):
                return HttpError(503, "server_error", message, None, "not_serving", headers)
            return HttpError(429, "rate_limit_error", message, None, "overloaded", headers)
        case RequestError():
            return HttpError(400, "invalid_request_error", message)
        case LicenceRefused():
            return HttpError(403, "permission_error", message, "model", "licence_refused")
        case AdapterRefused():
            # Not 409 or 5xx: those are tried again by OpenAI's client, and the same bytes are refused again.
            return HttpError(422, "invalid_request_error", message, "model", "adapter_refused")
        case ObjectDamaged() | ObjectNotFound():
            return HttpError(500, "server_error", message, "model", "adapter_damaged")
        case StoreError():
            return HttpError(503, "server_error", message, None, "store_unavailable", {"retry-after": "5"})
        case LuthierError():
            return HttpError(500, "server_error", message, None, "internal_error")
    return HttpError(500, "server_error", "an internal error; the ingress's log has it", None, "internal_error")


def describe_status(status: int, detail: str, path: str) -> HttpError:
    """What the router itself refuses: an unknown route, a wrong method."""
    match status:
        case 404:
            message = f"no route {path}; there are /v1/chat/completions, /v1/completions and /v1/models"
        case 405:
            message = f"this method is not allowed on {path}"
        case _:
            message = detail or HTTPStatus(status).phrase
    return HttpError(status, "invalid_request_error", message)
