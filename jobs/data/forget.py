"""Which adapters were trained on a text: found in what the store has of the data, followed to all that came of it.

    text ─▸ tokenised datasets, decoded by their base's own tokenizer; prepared rows
         ─▸ runs on them ─▸ their versions and models ─▸ what began from those, or was merged ─▸ … ─▸ aliases now

The text itself is nowhere written: not to the store, not to the cache, not into what is printed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster import keys, records, registry
from cluster.errors import LuthierError, ObjectDamaged
from cluster.models import mirrored
from cluster.records import AdapterRecord, BaseModelRef, CheckpointRef, ModelManifest, RunRecord
from cluster.store import Store
from jobs import runs
from jobs.data.search import Match, Wanted, in_evaluation, in_prepared, in_source, in_tokenised
from jobs.references import adapters as all_adapters


@dataclass
class Affected:
    """All that was trained on the text; each with the reason."""

    matches: list[Match]
    unsearched: dict[str, str]
    runs: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    unread: dict[str, str] = field(default_factory=dict)
    to_do: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "matches": [vars(each) | {"places": list(each.places)} for each in self.matches],
            "runs": [{"run_id": name, "because": why} for name, why in self.runs.items()],
            "adapters": [{"adapter": name, "because": why} for name, why in self.adapters.items()],
            "models": [{"model": name, "because": why} for name, why in self.models.items()],
            "aliases": self.aliases,
            "sources": list(self.sources),
            "unread": self.unread,
            "to_do": list(self.to_do),
            "unsearched": self.unsearched,
        }


def forget(store: Store, texts: Sequence[str]) -> Affected:
    """All that was trained on any of these texts, none of which may be blank."""
    wanted = Wanted(texts)
    known = Known.read(store)
    found = Affected([], dict(known.damaged))
    for digest in _digests(store, keys.datasets_prefix()):
        try:
            match = in_tokenised(store, digest, known.bases_of(digest), wanted)
        except (LuthierError, OSError) as error:
            found.unsearched[f"dataset {digest}"] = str(error)
            continue
        found.matches += [replace(match, is_trained_on=digest in known.learned)] if match else []
    for digest in _digests(store, keys.prepared_sets_prefix()):
        found.matches += in_prepared(store, digest, wanted)
    try:
        found.matches += in_evaluation(store, wanted)
    except (LuthierError, ValueError) as error:
        found.unsearched["evaluations"] = str(error)
    _follow(known, found)
    _advise(store, known, found, wanted)
    return found


@dataclass
class Known:
    """The records of a store that say what was made from what; `damaged` are those that cannot be read."""

    runs: dict[str, RunRecord]
    adapters: dict[str, AdapterRecord]
    models: dict[str, ModelManifest]
    damaged: dict[str, str]

    @classmethod
    def read(cls, store: Store) -> "Known":
        found: dict[str, RunRecord] = {}
        damaged: dict[str, str] = {}
        for run_id in runs.run_ids(store):
            try:
                found[run_id] = records.read(store, keys.run_record(run_id), RunRecord)
            except ObjectDamaged as error:
                damaged[f"run {run_id}"] = str(error)
        versions = {f"{each.name}@{each.version}": each for each in all_adapters(store)}
        for name in registry.names(store):
            for number in registry.version_numbers(store, name):
                if f"{name}@{number}" not in versions:
                    damaged[f"adapter {name}@{number}"] = "its record cannot be read"
        models = {f"{each.name}@{each.revision}": each for each in mirrored(store)}
        return cls(found, versions, models, damaged)

    @property
    def learned(self) -> set[str]:
        """Tokenised datasets that were trained on, and not only measured on."""
        by_adapters = {each.digests.data for each in self.adapters.values() if each.digests}
        return {each.dataset for each in self.runs.values()} | by_adapters

    def bases_of(self, dataset: str) -> Iterator[tuple[BaseModelRef, str | None]]:
        """The bases whose tokenizer made a dataset, and where each came from."""
        for run in self.runs.values():
            if dataset in (run.dataset, run.evaluation):
                yield run.base, run.recipe.get("model", {}).get("source")
        for adapter in self.adapters.values():  # of a run whose record was deleted
            if adapter.digests and dataset in (adapter.digests.data, adapter.digests.evaluation):
                yield adapter.base, None


def _digests(store: Store, prefix: str) -> list[str]:
    return sorted({item.key.removeprefix(prefix).partition("/")[0] for item in store.list(prefix)})


def _follow(known: Known, found: Affected) -> None:
    """From the sets to runs, versions and models, and on to what was made from those, until nothing is added."""
    sets = {each.digest: f"trained on {each.kind} {each.digest[:12]}" for each in found.matches if each.is_trained_on}
    while True:
        before = len(found.runs) + len(found.adapters) + len(found.models)
        for run_id, run in known.runs.items():
            _note(found.runs, run_id, _why(found, (run.dataset, run.prepared), sets, run.parent, run.base))
        for name, adapter in known.adapters.items():
            data = (adapter.digests.data, adapter.digests.prepared) if adapter.digests else ()
            why = f"published by run {adapter.run_id}" if adapter.run_id in found.runs else ""
            _note(found.adapters, name, why or _why(found, data, sets, adapter.parent, adapter.base))
        for name, model in known.models.items():
            _note(found.models, name, _why_model(found, model, sets))
        if len(found.runs) + len(found.adapters) + len(found.models) == before:
            return


def _note(into: dict[str, str], name: str, why: str) -> None:
    if why and name not in into:
        into[name] = why


def _why(
    found: Affected, data: Iterable[str | None], sets: dict[str, str], parent: CheckpointRef | None, base: BaseModelRef
) -> str:
    """The first reason why something is affected; empty when there is none."""
    if told := next((sets[digest] for digest in data if digest and digest in sets), ""):
        return told
    if parent and parent.run_id in found.runs:
        return f"began from {parent.run_id}@{parent.step}"
    model = f"{base.name}@{base.revision}"
    return f"its base is {model}" if model in found.models else ""


def _why_model(found: Affected, model: ModelManifest, sets: dict[str, str]) -> str:
    made = model.made
    if made is None:
        run_id = model.source.removeprefix("run ")
        return f"made by run {run_id}" if run_id in found.runs else ""
    if made.adapter and f"{made.adapter.name}@{made.adapter.version}" in found.adapters:
        return f"{made.adapter.name}@{made.adapter.version} was merged into it"
    if made.run_id in found.runs:
        return f"made by run {made.run_id}"
    data = (made.digests.data, made.digests.prepared) if made.digests else ()
    return _why(found, data, sets, None, made.base)


def _advise(store: Store, known: Known, found: Affected, wanted: Wanted) -> None:
    """Aliases that are on affected versions now, and what to do, in order."""
    to_do = []
    for name in dict.fromkeys(reference.partition("@")[0] for reference in found.adapters):
        state = registry.alias_state(store, name)
        clean = [
            each.version
            for each in known.adapters.values()
            if each.name == name and f"{name}@{each.version}" not in found.adapters
        ]
        for alias, version in (registry.alias_targets(state) if state else {}).items():
            if f"{name}@{version}" not in found.adapters:
                continue
            found.aliases[f"{name}@{alias}"] = f"{name}@{version}"
            move = f"--version {max(clean)}" if clean else "--remove"
            to_do.append(f"stop serving it: luthier cluster alias {name}@{alias} {move} --store {store.url}")
    _find_sources(store, known, found, wanted)
    if found.runs or found.adapters:
        named = ", ".join(found.sources) or "the files that the runs name"
        to_do.append(f"take the rows out of {named}, and train again; what began from an affected run, from its base")
    for name, why in found.unread.items():
        to_do.append(f"look into {name} yourself: {why}")
    prefixes = {"tokenised": keys.dataset_prefix, "prepared": keys.prepared_prefix}
    held = [prefixes.get(each.kind, str)(each.digest) for each in found.matches]
    held += [keys.checkpoints_prefix(run_id) for run_id in found.runs]
    held += [keys.adapter_version_prefix(*_split(name)) for name in found.adapters]
    held += [keys.model_prefix(*name.split("@", 1)) for name in found.models]
    if held:
        to_do.append(f"then remove from {store.url}: {' '.join(dict.fromkeys(held))}")
    found.to_do = tuple(to_do)


def _find_sources(store: Store, known: Known, found: Affected, wanted: Wanted) -> None:
    """The files that have it, of those that affected runs were trained on or that versions are evaluated by; the others
    are only named where nothing can be said of them."""
    suites = {each.digest for each in found.matches if each.kind == "suite"}
    holding = {
        file.source
        for adapter in known.adapters.values()
        for file in (adapter.gate.files if adapter.gate else ())
        if file.key in suites
    }
    for run_id, why in found.runs.items():
        if not why.startswith("trained on"):
            continue
        run = known.runs[run_id]
        looked = {each.name: in_source(store, each.name, each.sha256, wanted) for each in run.sources}
        having = {name for name, places in looked.items() if places and not isinstance(places, str)}
        unread = {name: places for name, places in looked.items() if isinstance(places, str)}
        if not having and not unread:  # a text over two turns of a row, say, as the template joins them
            unread = dict.fromkeys(looked, f"{run_id} was trained on it, and no row of its files has it as one text")
        holding |= having
        found.unread |= unread
    found.sources = tuple(sorted(holding))


def _split(reference: str) -> tuple[str, int]:
    name, _, version = reference.partition("@")
    return name, int(version)
