"""Everything that a store holds, judged: models, adapters, and the data that runs were trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import keys, records, registry
from cluster.errors import ObjectDamaged
from cluster.licences.chain import Judgement
from cluster.licences.gate import Gate
from cluster.models import mirrored
from cluster.records import Artefact, RunRecord
from cluster.store import Store


@dataclass(frozen=True)
class Row:
    """One thing that is stored, with what it was made from, judged for every use.

    `problem` is why it could not be read; nothing is known of it then.
    """

    kind: str
    name: str
    version: str
    artefacts: tuple[Artefact, ...]
    judgements: tuple[Judgement, ...]
    digest: str = ""
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "kind": self.kind,
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "artefacts": [each.model_dump() for each in self.artefacts],
            "uses": {each.use: each.to_dict() for each in self.judgements},
            "problem": self.problem,
        }


def audit(store: Store, gate: Gate) -> list[Row]:
    """A row for each model revision, adapter version and data source, in this order; damaged records have one too."""
    return [*_models(store, gate), *_adapters(store, gate), *_data(store, gate)]


def _models(store: Store, gate: Gate) -> Iterator[Row]:
    for manifest in mirrored(store):
        artefacts = manifest.chain
        yield Row("model", manifest.name, manifest.revision, artefacts, _judge(gate, artefacts, manifest.name))


def _adapters(store: Store, gate: Gate) -> Iterator[Row]:
    for name in registry.names(store):
        for number in registry.version_numbers(store, name):
            try:
                record = registry.record(store, name, number)
            except ObjectDamaged as error:
                yield Row("adapter", name, str(number), (), (), problem=str(error))
                continue
            artefacts = record.chain
            yield Row("adapter", name, str(number), artefacts, _judge(gate, artefacts, name), record.digest)


def _data(store: Store, gate: Gate) -> Iterator[Row]:
    """By the runs that were judged: a dataset's own record has no licence, since several may ask for the same one."""
    seen: dict[tuple[str, Artefact], tuple[Artefact, ...]] = {}
    for item in store.list(keys.runs_prefix()):
        if not item.key.endswith("/run.json"):
            continue
        try:
            record = records.read(store, item.key, RunRecord)
        except ObjectDamaged as error:
            yield Row("run", item.key.split("/")[1], "", (), (), problem=str(error))
            continue
        known = record.licences.artefacts if record.licences else ()
        for artefact in known:
            if artefact.kind == "data" and artefact.of is None:
                made = (artefact, *(each for each in known if each.of == artefact.name))
                seen[record.dataset, artefact] = made
    for (dataset, artefact), made in seen.items():
        yield Row("data", artefact.name, dataset[:12], made, _judge(gate, made, None), dataset)


def _judge(gate: Gate, artefacts: Sequence[Artefact], name: str | None) -> tuple[Judgement, ...]:
    return gate.judge_all(artefacts, name, ("train", "serve", "distribute"))
