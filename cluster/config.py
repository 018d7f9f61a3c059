"""Strict config: one schema, typed and frozen, all faults reported together.

A config file is YAML for one schema. A field marked `Reference` may hold a mapping, or the name of
another file that holds that mapping: files compose by reference to disjoint sections, never by a
deep merge. Precedence is schema default < file < `key=value` on the command line.

    load(Path("configs/recipes/support.yaml"), Recipe, ["train.steps=10", "model=qwen3-8b"])

Two traps of YAML are closed: `1e-4` is a number (PyYAML reads it as text), and a key given twice is
a fault (PyYAML keeps the last).
"""

import difflib
import json
import re
from collections.abc import Container, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from cluster import secret
from cluster.errors import ConfigError, Fault


class Config(BaseModel):
    """Base of every schema: unknown keys fail, nothing is coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Reference:
    """Marks a field (in `Annotated`) that may name a file: configs/<folder>/<name>.yaml, or a path ending in .yaml."""

    folder: str


def _checked(named: dict[str, str]) -> dict[str, str]:
    secret.check(named)
    return named


Secrets = Annotated[dict[str, str], AfterValidator(_checked)]
"""Variables by name, with the place of each one's value: see secret.py."""

Schema = TypeVar("Schema", bound=Config)
Path_ = tuple[str | int, ...]


def load(path: Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """Read, compose, override and check a config file.

    Args:
        path: the YAML file.
        schema: what it must be.
        overrides: `key.sub=value` strings; split at the first `=`, the value parsed as YAML.

    Raises:
        ConfigError: with every fault of the file, the files it names and the overrides.
    """
    source = _Source()
    tree = source.read(path, (), "" if path.exists() else "no such file; give the path of a .yaml file")
    _override_references(tree, schema, overrides, source)
    _compose(tree, schema, path, source)
    for override in overrides:
        _apply(tree, override, _references(schema), source)
    if found := list(_secrets(tree, (), source)):
        raise ConfigError(found)  # alone, for the others repeat what was given
    try:
        # Through JSON, because only there does pydantic's strict mode accept a list for a tuple.
        config = schema.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        source.faults += _faults(error, schema, source)
    except (TypeError, ValueError) as error:
        source.faults.append(Fault(str(path), "", f"{error}; quote dates and other special values"))
    if source.faults:
        raise ConfigError(source.faults)
    return config


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a float, and refuses a key given twice and aliases, which can hide a bomb."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, f"the alias *{event.anchor}: write out what it stands for", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Source:
    """Where each value came from, the faults found so far, and what could not be read at all."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.unread: set[Path_] = set()
        self._places: dict[Path_, str] = {}

    def read(self, path: Path, at: Path_, missing: str = "") -> dict[str, Any]:
        """The file's mapping, its lines remembered below `at`; faults are noted and give {}."""
        self._places[at] = str(path)
        self.unread.add(at)
        if missing:
            self.faults.append(Fault(str(path), "", missing))
            return {}
        try:
            text = path.read_text(encoding="utf-8")
            tree = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
            node = yaml.compose(text, _Loader)
        except (OSError, UnicodeDecodeError) as error:
            self.faults.append(Fault(str(path), "", f"cannot be read: {error}"))
            return {}
        except RecursionError:
            self.faults.append(Fault(str(path), "", "is nested too deeply to be a config"))
            return {}
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
            self.faults.append(Fault(place, "", f"not valid YAML: {error.problem}"))
            return {}
        except yaml.YAMLError as error:
            self.faults.append(Fault(str(path), "", f"not valid YAML: {' '.join(str(error).split())}"))
            return {}
        if not isinstance(tree, dict):
            self.faults.append(Fault(str(path), "", "a config file is a mapping of keys to values"))
            return {}
        self.unread.discard(at)
        self._note(node, path, at)
        return tree

    def _note(self, node: yaml.Node | None, path: Path, at: Path_) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self._places[(*at, key.value)] = f"{path}:{key.start_mark.line + 1}"
                self._note(value, path, (*at, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._places[(*at, index)] = f"{path}:{value.start_mark.line + 1}"
                self._note(value, path, (*at, index))

    def set_place(self, at: Path_, place: str) -> None:
        self._places = {key: old for key, old in self._places.items() if key[: len(at)] != at}
        self._places[at] = place

    def place(self, at: Path_) -> str:
        """The place of a value, or of the nearest thing around it."""
        while at not in self._places:
            at = at[:-1]
        return self._places[at]


def _references(schema: type[BaseModel]) -> dict[str, Reference]:
    """By key: `model`, or `data.rules` for one in a section."""
    found = {}
    for name, field in schema.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Reference)]
        if marks:
            found[name] = marks[0]
        elif isinstance(section := field.annotation, type) and issubclass(section, BaseModel):
            found |= {f"{name}.{key}": mark for key, mark in _references(section).items()}
    return found


def _override_references(
    tree: dict[str, Any], schema: type[BaseModel], overrides: Sequence[str], source: _Source
) -> None:
    """`model=qwen3-8b` chooses another file, so it must come before files are composed."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals and key in _references(schema) and _is_name(text.strip()):
            *sections, last = key.split(".")
            if (section := _section(tree, sections)) is not None:
                section[last] = text.strip()
                source.set_place(tuple(key.split(".")), f"command line `{override}`")


def _compose(tree: dict[str, Any], schema: type[BaseModel], path: Path, source: _Source) -> None:
    for key, reference in _references(schema).items():
        *sections, last = key.split(".")
        section = _section(tree, sections)
        name = section.get(last) if section is not None else None
        if section is None or not isinstance(name, str):
            continue
        at = (*sections, last)
        if name.endswith(".yaml"):
            candidates = [path.parent / name, Path(name)]
        else:
            candidates = [
                folder / reference.folder / f"{name}.yaml" for folder in (path.parent.parent, Path("configs"))
            ]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found:
            section[last] = source.read(found, at)
        else:
            place = source.place(at)
            have = sorted({file.stem for candidate in candidates for file in candidate.parent.glob("*.yaml")})
            near = difflib.get_close_matches(name, have, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(have) or 'none'}"
            source.faults.append(Fault(place, key, f"no file {candidates[0]}; {advice}"))
            source.unread.add(at)


def _is_name(text: str) -> bool:
    return not text.startswith("{") and text not in ("", "null", "~")


def _section(tree: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """A section of the file; None where there is no such mapping (and another fault says so)."""
    here: Any = tree
    for name in names:
        here = here.get(name)
        if not isinstance(here, dict):
            return None
    return here if isinstance(here, dict) else None


def _apply(tree: dict[str, Any], override: str, references: Container[str], source: _Source) -> None:
    key, equals, text = override.partition("=")
    place = f"command line `{override}`"
    names = key.split(".")
    if not equals or not all(names):
        source.faults.append(Fault(place, "", "write key=value, for example train.steps=100"))
        return
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        source.faults.append(Fault(place, key, f"the value is not valid YAML: {problem}; quote it if it is text"))
        return
    if key in references and isinstance(value, str):
        return  # its file has been read already
    here = tree
    for depth, name in enumerate(names[:-1], start=1):
        if name not in here:
            source.set_place(tuple(names[:depth]), place)
        inner = here.setdefault(name, {})
        if inner is None:
            inner = here[name] = {}
        if not isinstance(inner, dict):
            source.faults.append(Fault(place, key, f"{name} holds a value, not a section"))
            return
        here = inner
    here[names[-1]] = value
    source.set_place(tuple(names), place)


def _secrets(tree: Any, at: Path_, source: _Source) -> Iterator[Fault]:
    """A config is stored with its run and shown by Ray, so no value in it may be a secret; it is not repeated here."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _secrets(value, (*at, key), source)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _secrets(value, (*at, index), source)
    elif isinstance(tree, str) and secret.looks_like_one(tree):
        place = source.place(at)
        message = "looks like a secret; keep it elsewhere, and name its place: `secrets: {NAME: secret://env/NAME}`"
        yield Fault("command line" if tree in place else place, ".".join(map(str, at)), message)


def _faults(error: ValidationError, schema: type[BaseModel], source: _Source) -> list[Fault]:
    """pydantic's findings in our words: the place, the key, what is wrong and what to write instead."""
    faults = []
    for detail in error.errors(include_url=False):
        location = tuple(detail["loc"])
        at, known = _strip_tags(location, schema)
        if any(at[: len(unread)] == unread for unread in source.unread):
            continue  # its own fault has been reported
        key = ".".join(map(str, at))
        match detail["type"]:
            case "extra_forbidden":
                near = difflib.get_close_matches(str(at[-1]), known, n=1)
                advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
                message = f"unknown key; {advice}"
            case "missing":
                message = "missing; add this key"
            case "value_error":
                message = str(detail["ctx"]["error"])
            case "list_type" | "tuple_type":
                message = f"got {json.dumps(detail['input'], default=str)[:80]}; write a list: [{detail['input']}]"
            case _:
                got = json.dumps(detail["input"], default=str)[:80]
                message = f"got {got}; {detail['msg'][0].lower()}{detail['msg'][1:]}"
        faults.append(Fault(source.place(at), key, message))
    return faults


def _strip_tags(location: Path_, schema: type[BaseModel]) -> tuple[Path_, list[str]]:
    """Drop the union tags that pydantic puts into a location; also the keys known at its end."""
    at: list[str | int] = []
    models: list[type[BaseModel]] = [schema]
    known = list(_fields(schema))
    for part in location:
        fields = {name: field for model in models for name, field in _fields(model).items()}
        tags = {_tag(model) for model in models}
        if part in tags and part not in fields:
            models = [model for model in models if _tag(model) == part]
            known = [name for model in models for name in _fields(model)]
            continue
        at.append(part)
        known = list(fields) or known
        if part in fields:
            models = _models_in(fields[str(part)].annotation)
    return tuple(at), known


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """By the names that a file has for them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    values = get_args(kind.annotation) if kind else ()
    return values[0] if values else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
