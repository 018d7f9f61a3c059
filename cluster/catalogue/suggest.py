"""Which open model to take: a pure function of a table, a wish, and the gate of licences.

    every row ─ all reasons against it ─▸ rejected
              ─ none ─▸ ordered: of the domain, languages listed, of the task above all, size or speed, newer ─▸ best

Quality first means the largest that fits, since nothing here was measured: of models half as large or as large again,
the newer. Speed first means the fewest parameters a token.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cluster.catalogue.table import Candidate, Table, Task
from cluster.config import Config
from cluster.errors import ConfigError, Fault
from cluster.licences.gate import Gate
from cluster.licences.organisation import Use
from cluster.records import Artefact

GIB = 1 << 30
_UNITS = {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": GIB,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_OTHERS = 3


class Wish(Config):
    """What is asked for. `memory_bytes` is of one worker's GPU, or of one replica's."""

    task: Task
    languages: tuple[str, ...]
    domain: str | None
    prefer: Literal["quality", "speed"]
    memory_bytes: int
    use: Literal["commercial", "research", "policy"]
    method: Literal["lora", "full"]
    serving: bool


@dataclass(frozen=True)
class Judged:
    """A row, and why it is taken or not. `memory` says what it takes of what there is."""

    model: Candidate
    reasons: tuple[str, ...]
    memory: str

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model.model_dump(mode="json"), "reasons": list(self.reasons)}


@dataclass(frozen=True)
class Answer:
    """What to take, the next best, and every other row with all that speaks against it; nearest misses first."""

    best: Judged | None
    others: tuple[Judged, ...]
    rejected: tuple[Judged, ...]
    read_on: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "best": self.best.to_dict() if self.best else None,
            "others": [each.to_dict() for each in self.others],
            "rejected": [each.to_dict() for each in self.rejected],
            "read_on": self.read_on,
        }


def wish(
    task: str, language: str, domain: str | None, prefer: str, memory: str, use: str, method: str, serving: bool
) -> Wish:
    """From words of a command line. Raises ConfigError, with all that is wrong."""
    faults = []

    def choice(option: str, given: str, allowed: tuple[str, ...]) -> str:
        if given not in allowed:
            faults.append(Fault("command line", option, f"got {given!r}; write {', '.join(allowed)}"))
        return given

    languages = tuple(each.strip().lower() for each in language.split(",") if each.strip())
    if not languages or not all(re.fullmatch(r"[a-z]{2,3}", each) for each in languages):
        faults.append(Fault("command line", "--language", f"got {language!r}; write codes, as en or en,zh"))
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|[kMGT]B)", memory.strip())
    if not match or not float(match[1]):
        faults.append(Fault("command line", "--memory", f"got {memory!r}; write it with its unit, as 24GiB or 80GB"))
    choices = {
        "task": choice("--task", task, get_args(Task)),
        "prefer": choice("--prefer", prefer, ("quality", "speed")),
        "use": choice("--use", use, ("commercial", "research", "policy")),
        "method": choice("--method", method, ("lora", "full")),
    }
    if faults or not match:
        raise ConfigError(faults)
    memory_bytes = int(float(match[1]) * _UNITS[match[2]])
    given = {**choices, "languages": languages, "domain": domain, "memory_bytes": memory_bytes, "serving": serving}
    return Wish.model_validate(given)


def needed_bytes(parameters: int, wished: Wish) -> int:
    """Memory of one GPU for a model in bf16, all of it on that GPU; a simple bound, which `jobs plan` refines.

    serving    2.2 bytes a parameter, and 2 GiB of keys and values
    lora       2.1 bytes a parameter (the frozen base and rank 16), and 5 GiB: runtime, logits, one sequence of 2,048
               tokens with activations recomputed
    full       25 bytes a parameter (weights, gradients, fp32 master and two moments, the update's buffers), and 2 GiB

    The last two were set against `jobs plan` of the shipped models: at most a third above it, never below (a test).
    """
    rate, fixed = (2.2, 2) if wished.serving else (2.1, 5) if wished.method == "lora" else (25, 2)
    return int(parameters * rate) + fixed * GIB


def answer(table: Table, wished: Wish, gate: Gate) -> Answer:
    """The best row for a wish. Every row is in the answer or beyond the best four of those that would do."""
    judged_by = _gate(gate, wished)
    taken: list[Candidate] = []
    rejected: list[Judged] = []
    for model in table.models:
        against = _against(model, wished, judged_by)
        if against:
            rejected.append(Judged(model, tuple(against), _memory(model, wished)))
        else:
            taken.append(model)
    taken.sort(key=lambda model: _order(model, wished))
    rejected.sort(key=lambda each: (len(each.reasons), _order(each.model, wished)))
    ranked = [Judged(model, tuple(_for(model, wished, judged_by)), _memory(model, wished)) for model in taken]
    return Answer(ranked[0] if ranked else None, tuple(ranked[1 : 1 + _OTHERS]), tuple(rejected), table.read_on)


def _gate(gate: Gate, wished: Wish) -> Gate:
    if wished.use == "policy":
        return gate
    organisation = gate.organisation.model_copy(update={"commercial": wished.use == "commercial"})
    return gate.model_copy(update={"organisation": organisation})


def uses(gate: Gate, wished: Wish) -> tuple[Use, ...]:
    """The uses of a licence that a wish means: what the organisation does, without training where it only serves."""
    meant = tuple(use for use in gate.organisation.uses if not (wished.serving and use == "train"))
    return meant or ("serve",)


def _artefact(model: Candidate) -> Artefact:
    return Artefact(kind="base", name=model.hub, licence=model.licence, is_multimodal=model.multimodal)


def _against(model: Candidate, wished: Wish, gate: Gate) -> list[str]:
    """All that speaks against a row."""
    found = []
    if model.unfit:
        found.append(model.unfit)
    if wished.task not in model.tasks:
        found.append(f"task: its card does not name {wished.task}, but {', '.join(model.tasks)}")
    if missing := [each for each in wished.languages if not model.knows(each)]:
        found.append(f"languages: its card does not list {', '.join(missing)}")
    if needed_bytes(model.parameters, wished) > wished.memory_bytes:
        found.append(_memory(model, wished))
    judged = gate.judge_all((_artefact(model),), uses=uses(gate, wished))
    reasons = dict.fromkeys(
        f"{use.use} {why.level}: {why.text}" for use in judged if not use.passes for why in use.reasons
    )
    return [*found, *reasons]


def _for(model: Candidate, wished: Wish, gate: Gate) -> list[str]:
    """Why a row would do."""
    listed = [each for each in wished.languages if each in model.languages]
    found = [f"made for {wished.task}: {model.strengths}"]
    found.append(
        f"languages: its card lists {', '.join(listed)}"
        if len(listed) == len(wished.languages)
        else "languages: its card says that they are many, and does not list all of yours: try them"
    )
    if wished.domain:
        fits = _is_of(model, wished.domain)
        found.append(
            f"domain: made for {wished.domain}" if fits else f"domain: not made for {wished.domain}: train it so"
        )
    found.append(_memory(model, wished))
    found.append(f"context: {model.context_tokens:,} tokens")
    judged = gate.judge_all((_artefact(model),), uses=uses(gate, wished))
    duties = list(dict.fromkeys(str(duty) for each in judged for duty in each.duties))
    found.append(f"licence: {model.licence}: {', '.join(f'{each.use} {each.level}' for each in judged)}")
    found += [f"duty: {duty}" for duty in duties]
    if model.gated:
        found.append("gated: accept its terms on the Hub and set HF_TOKEN")
    found.append(f"by {model.source}, read on {model.read_on}")
    return found


def _memory(model: Candidate, wished: Wish) -> str:
    how = "serving" if wished.serving else "a LoRA" if wished.method == "lora" else "training all weights"
    need = needed_bytes(model.parameters, wished)
    return f"memory: {how} takes about {need / GIB:.1f} GiB of {wished.memory_bytes / GIB:.1f}"


def _is_of(model: Candidate, domain: str | None) -> bool:
    return domain is not None and domain.lower() in model.domains


def _order(model: Candidate, wished: Wish) -> tuple[Any, ...]:
    """Smaller comes first."""
    domain = not _is_of(model, wished.domain)
    unlisted = any(each not in model.languages for each in wished.languages)
    other = model.tasks[0] != wished.task
    newer = -int(model.released.replace("-", ""))
    if wished.prefer == "speed":
        return (domain, unlisted, other, model.speed_parameters, newer, model.name)
    return (
        domain,
        unlisted,
        other,
        -round(2 * math.log2(model.parameters / 1e9)),
        newer,
        -model.parameters,
        model.name,
    )
