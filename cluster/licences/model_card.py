"""The model card that goes with what is made: README.md in the Hub's format, by huggingface_hub.

Its head says what machines read: base model, licences, data sets of the Hub, library, tags. Its text says to people
what it was trained on, with which settings, how far the loss came, what the licences oblige to, how to use it, and what
it is not for. All of it is taken from records; nothing is claimed that no record has.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from cluster import __version__
from cluster.licences.facts import OWN, Facts, is_uninformative, normal
from cluster.records import Artefact, DatasetManifest, Made, RunRecord

_RELATION = {"adapter": "adapter", "merged": "merge", "model": "finetune"}
_WHAT = {
    "adapter": "An adapter for {base}, fine-tuned with Luthier.",
    "merged": "{base} with the adapter {adapter} merged into its weights, fine-tuned with Luthier.",
    "model": "{base}, all weights fine-tuned with Luthier.",
}
_SETTINGS = ("method", "train", "optimizer", "schedule")
_UNKNOWN = "unknown"
ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet")
"""Of data files, which are no data sets of the Hub whatever their folder is called."""


@dataclass(frozen=True)
class Losses:
    """How far training came: the first and the last step's loss, and the held-out loss, where there is one."""

    steps: int
    first: float | None
    last: float | None
    evaluation: float | None = None


def losses(lines: Iterable[dict[str, Any]], evaluation: float | None) -> Losses:
    """From a run's metrics lines."""
    found = [line["loss"] for line in lines]
    known = [loss for loss in found if loss is not None]
    return Losses(len(found), known[0] if known else None, known[-1] if known else None, evaluation)


def compose(
    name: str,
    made: Made,
    run: RunRecord,
    measured: Losses,
    notice: str,
    facts: Facts,
    counted: DatasetManifest | None = None,
) -> str:
    """The card's whole text.

    Args:
        name: what the model is called.
        notice: what its NOTICE says: what it was made from, and the duties.
        counted: of the tokenised data that it was trained on.
    """
    head = ModelCardData(
        base_model=base_model(made),
        base_model_relation=_RELATION[made.kind],
        datasets=hub_datasets(made.artefacts) or None,
        library_name="peft" if made.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["luthier", made.kind, str(run.recipe["method"]["kind"])],
        **_licence(made, facts),
    )
    sections = [
        f"# {name}",
        _WHAT[made.kind].format(base=base_model(made), adapter=_adapter(made)),
        f"## Trained on\n\n{_data(run, counted)}",
        f"## Settings\n\n{_settings(run)}",
        f"## Losses\n\n{_losses(measured)}",
        f"## Licences and duties\n\n{_quoted(notice)}\n\nThe same stands in `NOTICE`; licence texts are beside it.",
        f"## How to use it\n\n{_use(made)}",
        f"## Limits\n\n{_limits(run, measured)}",
        f"## Digests\n\n{_digests(made, run)}",
    ]
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def base_model(made: Made) -> str:
    """The base by its name on the Hub, where it is from there."""
    bases = (each.name for each in made.artefacts if each.kind == "base" and each.of is None)
    return next(bases, made.base.name)


def hub_datasets(artefacts: Iterable[Artefact]) -> list[str]:
    """Data sets of the Hub that it was trained on itself."""
    pattern = re.compile(r"[\w.-]+/[\w.-]+")
    found = (each for each in artefacts if each.kind == "data" and each.of is None and pattern.fullmatch(each.name))
    return list(dict.fromkeys(each.name for each in found if not each.name.endswith(ENDINGS)))


def _licence(made: Made, facts: Facts) -> dict[str, Any]:
    """The fields of a card that say under which licences the model is: all of those that hold, as the Hub writes them.

    Where one is not known or leaves a choice, the Hub has only `other`, with a name.
    """
    own = (each for each in made.artefacts if each.kind == "base" or (each.kind == "data" and each.of is None))
    said = [tag for each in own for tag in _tags(each, facts)] or [made.base.licence]
    tags = list(dict.fromkeys(tag for tag in said if normal(tag) != OWN))
    whole = " AND ".join(f"({tag})" if " OR " in tag and len(tags) > 1 else tag for tag in tags)
    if _UNKNOWN in tags or " OR " in whole:
        return {"license": "other", "license_name": whole}
    ids = list(dict.fromkeys(normal(tag) for each in tags for tag in each.split(" AND ")))
    return {"license": ids[0] if len(ids) == 1 else ids}


def _tags(artefact: Artefact, facts: Facts) -> list[str]:
    """What it is known to be under, and what it says itself where that asks for more."""
    said = [] if is_uninformative(artefact.licence) else [str(artefact.licence)]
    known = facts.known_as(artefact.name)
    if known is None:
        return said or [_UNKNOWN]
    row, holds = facts.find(said[0]) if said else None, facts.find(known.licence)
    asks_more = row and holds and not row.restrictions <= holds.restrictions
    return [known.licence, *(said if asks_more else [])]


def _adapter(made: Made) -> str:
    return f"{made.adapter.name}@{made.adapter.version}" if made.adapter else ""


def _data(run: RunRecord, counted: DatasetManifest | None) -> str:
    rows = [(each.use, _public(each.name), each.licence or "not stated", each.sha256) for each in run.sources]
    if not rows:  # an older record has names alone
        rows = [("train", _public(name), "not stated", "not recorded") for name in run.recipe["data"]["train"]]
    table = _table(("use", "file", "licence", "SHA-256"), rows)
    if counted is None:
        return table
    left_out = sum(counted.skipped.values())
    return (
        f"{table}\n\n{counted.samples:,} samples, {counted.tokens:,} tokens, of which {counted.supervised_tokens:,} "
        f"were learned; {left_out:,} rows were left out."
    )


def _public(source: str) -> str:
    """A source's name without the folders of somebody's machine; cards are for others."""
    is_of_a_machine = source.startswith(("/", "~", "file://"))
    return source.rstrip("/").rpartition("/")[2] if is_of_a_machine else source


def _settings(run: RunRecord) -> str:
    chosen = {name: run.recipe[name] for name in _SETTINGS if name in run.recipe}
    chosen["data"] = {"sequence_length": run.recipe["data"]["sequence_length"]}
    return f"```yaml\n{yaml.safe_dump(chosen, sort_keys=False)}```"


def _losses(measured: Losses) -> str:
    rows = [
        ("training, first step", measured.first),
        (f"training, last of {measured.steps:,} steps", measured.last),
        ("held-out data", measured.evaluation),
    ]
    return _table(("loss", "nats a token"), [(what, "not measured" if x is None else f"{x:.4f}") for what, x in rows])


def _use(made: Made) -> str:
    base = base_model(made)
    # What is on no Hub is named, and its folder is for the reader to know.
    named = f"{base!r}, revision={made.base.revision!r}" if "/" in base else f'"FOLDER OF {base}"'
    if made.kind == "adapter":
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({named})",
            'model = PeftModel.from_pretrained(base, ".")  # this folder',
            f"tokenizer = AutoTokenizer.from_pretrained({named})",
        ]
    else:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained(".")  # this folder',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
        ]
    code = "\n".join(lines)
    return f"With the base model's own chat template.\n\n```python\n{code}\n```"


def _limits(run: RunRecord, measured: Losses) -> str:
    evaluated = (
        "Its loss on held-out data is above; nothing else was measured for this card."
        if measured.evaluation is not None
        else "Nothing was measured on held-out data."
    )
    return (
        "It is meant for requests like those of its training data, in their languages, of at most "
        f"{run.recipe['data']['sequence_length']:,} tokens. {evaluated} It may be wrong, and it repeats what its data "
        "have wrong. What the base model is not for, this is not for either. Look at its answers on your own requests "
        "before anybody relies on them."
    )


def _digests(made: Made, run: RunRecord) -> str:
    rows = [("run", run.run_id), ("base revision", made.base.revision), ("code revision", run.code_revision)]
    found = made.digests or run.digests
    if found:
        rows += [(key, _joined(value)) for key, value in found.model_dump().items() if value]
    else:
        rows.append(("data", run.dataset))
    if made.adapter:
        rows.append((f"adapter {_adapter(made)}", made.adapter.digest))
    if run.parent:
        rows.append(("began from", f"{run.parent.run_id}@{run.parent.step}"))
    rows += [(name, version) for name, version in run.versions.items()] or [("luthier", __version__)]
    return _table(("what", "which"), rows)


def _joined(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _quoted(text: str) -> str:
    return "```text\n" + text.replace("```", "'''").strip("\n") + "\n```"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(each) for each in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
