"""What the API server would say to a manifest, offline: the CRDs' schema, closed, and their CEL rules.

Rules that compare with `oldSelf` are for changes, and say nothing about a new object; the API server skips them too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
from jsonschema import Draft202012Validator

SCHEMAS = json.loads(Path(__file__).with_name("schemas.json").read_text())
RULES = "x-kubernetes-validations"


def faults(manifest: dict[str, Any]) -> list[str]:
    """Everything wrong with it, each with its place; [] when it would be accepted."""
    kind = manifest.get("kind")
    if not isinstance(kind, str) or kind not in SCHEMAS["kinds"]:
        return [f"$.kind: {kind} is none of {', '.join(SCHEMAS['kinds'])}"]
    schema = SCHEMAS["kinds"][kind] | {"$defs": SCHEMAS["$defs"]}
    found = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(manifest)]
    return found + [
        f"{place}: {rule['message']}"
        for place, rule, value in _ruled(schema, manifest, "$")
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value)
    ]


def _ruled(schema: Any, value: Any, place: str) -> Iterator[tuple[str, dict[str, str], Any]]:
    """Every rule, with the value that it is about."""
    while "$ref" in schema:
        schema = SCHEMAS["$defs"][schema["$ref"].rpartition("/")[2]]
    for rule in schema.get(RULES, ()):
        yield place, rule, value
    if isinstance(value, dict):
        extra = schema.get("additionalProperties")
        for key, inner in value.items():
            within = schema.get("properties", {}).get(key, extra)
            if isinstance(within, dict):
                yield from _ruled(within, inner, f"{place}.{key}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, inner in enumerate(value):
            yield from _ruled(schema["items"], inner, f"{place}[{index}]")


def _holds(rule: str, value: Any) -> bool:
    environment = celpy.Environment()
    program = environment.program(environment.compile(rule))
    return bool(program.evaluate({"self": celpy.json_to_cel(value)}))
