"""What an answer is to be, as a request says it: JSON, JSON of a schema, or a pattern. The engine holds it to that.

`response_format` is OpenAI's, `structured_outputs` is vLLM's. Whether the engine can follow a schema or a pattern is
found when it compiles it, before the answer begins.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.engine.protocol import Grammar

_ANY_OBJECT = {"type": "object"}


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class JsonSchema(_Form):
    """OpenAI's wrapper of a schema. What is asked is always enforced, so `strict` changes nothing."""

    name: str
    description: str | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Form):
    """What the answer is to be, in OpenAI's form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and only there")
        return self

    @property
    def wanted(self) -> Grammar | None:
        if self.type == "text":
            return None
        return _json(self.json_schema.definition if self.json_schema else _ANY_OBJECT, "response_format")


class StructuredOutputs(_Form):
    """What the answer is to be, in vLLM's form: one of these. `grammar` is in Lark's notation."""

    definition: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("give one of json, json_object, regex, choice and grammar")
        return self

    @property
    def wanted(self) -> Grammar:
        param = "structured_outputs"
        if self.regex is not None:
            return Grammar("regex", self.regex, param)
        if self.choice is not None:
            return Grammar("choice", json.dumps(self.choice), param)
        if self.grammar is not None:
            return Grammar("lark", self.grammar, param)
        return _json(self.definition if self.definition is not None else _ANY_OBJECT, param)


def _json(schema: dict[str, Any], param: str) -> Grammar:
    return Grammar("json_schema", json.dumps(schema), param)
