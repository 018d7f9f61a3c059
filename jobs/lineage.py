"""Where an adapter, a model or a run comes from: read from the store's records alone, followed to the end.

    adapter version ─▸ run ─▸ base ─▸ (a model that was made here: the adapter that was merged, or its run) ─▸ …
                        ├──▸ data sets ─▸ source files
                        └──▸ the checkpoint that it began from ─▸ the adapter that was published then, its run ─▸ …

A record that is not in the store any more, or cannot be read, is a broken link: a node that says so, where the tree
would have gone on. What hangs on one thing twice is drawn once, and named the second time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from cluster import evaluation, keys, records, registry
from cluster.errors import AdapterNotFound, ObjectDamaged, ObjectNotFound
from cluster.records import (
    AdapterRecord,
    Artefact,
    BaseModelRef,
    CheckpointManifest,
    CheckpointRef,
    DatasetManifest,
    Made,
    ModelManifest,
    Record,
    RunRecord,
    run_state,
)
from cluster.store import Store
from jobs import runs
from jobs.data.card import Card
from jobs.references import adapters as all_adapters
from jobs.references import find_model

Kind = Literal["adapter", "model", "run", "base", "data", "prepared", "file", "checkpoint", "artefact", "licences"]
Facts = dict[str, str | int | None]
AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass
class Node:
    """One thing, and what it was made from.

    Attributes:
        facts: what its record says, in the order to be shown.
        broken: why its record cannot be followed.
        again: it stands elsewhere in the same tree, with what it was made from.
    """

    kind: Kind
    name: str
    facts: Facts = field(default_factory=dict)
    made_from: "list[Node]" = field(default_factory=list)
    broken: str = ""
    again: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For scripts."""
        found: dict[str, Any] = {"kind": self.kind, "name": self.name, **self.facts}
        if self.broken:
            found["broken"] = self.broken
        if self.again:
            found["again"] = True
        return {**found, "made_from": [each.to_dict() for each in self.made_from]}

    def walk(self) -> "Iterator[Node]":
        """This node and all below it."""
        yield self
        for each in self.made_from:
            yield from each.walk()


def trace(store: Store, reference: str) -> Node:
    """The whole lineage of an adapter (NAME, NAME@3, NAME@alias), a model (NAME@REVISION) or a run.

    Raises InputError when there is no such thing.
    """
    return _Tracer(store).of(reference)


class _Tracer:
    """One walk through the records of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: set[tuple[str, str]] = set()
        self._published: dict[str, list[AdapterRecord]] | None = None

    def of(self, reference: str) -> Node:
        if keys.is_name(reference) and self._store.exists(keys.run_record(reference)):
            return self._run(reference)
        if model := find_model(self._store, reference):
            return self._model(model)
        try:
            return self._adapter(registry.resolve(self._store, reference))
        except ObjectDamaged as error:
            return Node("adapter", reference, broken=str(error))

    def _adapter(self, record: AdapterRecord) -> Node:
        name = f"{record.name}@{record.version}"
        node = Node("adapter", name, {"digest": record.digest, "step": record.step, "created": record.created_at})
        if self._was_seen(node):
            return node
        node.facts["evaluation"] = evaluation.state(self._store, record) or None
        node.made_from.append(self._run(record.run_id))
        if node.made_from[0].broken:  # what the version itself knows is all that is left
            if record.digests:
                node.facts |= {key: _joined(value) for key, value in record.digests.model_dump().items() if value}
            node.made_from += [self._base(record.base, None), *_artefacts(record.artefacts)]
            if record.parent:
                node.made_from.append(self._checkpoint(record.parent))
        return node

    def _run(self, run_id: str) -> Node:
        node = Node("run", run_id)
        if self._was_seen(node):
            return node
        record = self._read(node, keys.run_record(run_id), RunRecord)
        if record is None:
            return node
        digests = record.digests
        node.facts = {
            "state": self._state(run_id),
            "by": record.by,
            "begun": record.created_at,
            "config": digests.config if digests else None,
            "code": record.code_revision,
            "code_digest": digests.code if digests else None,
            "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
            "checks": digests.checks if digests else None,
            "reproduces": record.reproduces,
        }
        if record.licences:
            verdicts = ", ".join(f"{use} {verdict}" for use, verdict in record.licences.verdicts.items())
            judged: Facts = {"on": record.licences.on, "facts": record.licences.facts}
            judged["digest"] = digests.licences if digests else None
            node.made_from.append(Node("licences", verdicts, judged))
        node.made_from.append(self._base(record.base, record))
        node.made_from.append(self._data(record, record.dataset, "train"))
        if record.evaluation:
            node.made_from.append(self._data(record, record.evaluation, "evaluation"))
        if record.licences:
            node.made_from += _artefacts(record.licences.artefacts)
        if record.parent:
            node.made_from.append(self._checkpoint(record.parent))
        return node

    def _state(self, run_id: str) -> str:
        try:
            return run_state(self._store, run_id, runs.read_events(self._store, run_id))
        except ObjectDamaged:
            return "unknown: its events cannot be read"

    def _base(self, base: BaseModelRef, run: RunRecord | None) -> Node:
        node = Node("base", base.name, {"revision": base.revision, "licence": base.licence})
        source = run.recipe.get("model", {}).get("source") if run else None
        if source:
            node.facts["source"] = source
        if run and run.digests:
            node.facts["digest"] = run.digests.base
        if self._was_seen(node, base.revision):
            return node
        key = keys.model_manifest(base.name, base.revision)
        if _is_on_hub(source) and not self._store.exists(key):
            return node  # not mirrored: its commit says which it is
        manifest = self._read(node, key, ModelManifest)
        if manifest:
            node.made_from += self._made(manifest)
        return node

    def _model(self, manifest: ModelManifest) -> Node:
        node = Node(
            "model",
            f"{manifest.name}@{manifest.revision}",
            {"licence": manifest.licence, "source": manifest.source, "created": manifest.created_at},
        )
        node.made_from += self._made(manifest)
        return node

    def _made(self, manifest: ModelManifest) -> list[Node]:
        """What a model of this store was made from; of one that came from elsewhere, what its card said."""
        made = manifest.made
        if made is None:
            run_id = manifest.source.removeprefix("run ")  # how a model of before `made` names its run
            if run_id != manifest.source:
                return [self._run(run_id)]
            own = (manifest.name, manifest.source)
            return _artefacts(each for each in manifest.artefacts if each.name not in own)
        if made.adapter:
            return [self._merged(made), self._base(made.base, None)]
        return [self._run(made.run_id)]

    def _merged(self, made: Made) -> Node:
        assert made.adapter is not None
        wanted = made.adapter
        try:
            record = registry.record(self._store, wanted.name, wanted.version)
        except (AdapterNotFound, ObjectDamaged) as error:
            node = Node("adapter", f"{wanted.name}@{wanted.version}", {"digest": wanted.digest}, broken=str(error))
            node.made_from.append(self._run(made.run_id))
            return node
        node = self._adapter(record)
        if record.digest != wanted.digest:
            node.broken = f"the model was made from {wanted.digest[:12]}, and this store has another of that name"
        return node

    def _data(self, record: RunRecord, digest: str, use: Literal["train", "evaluation"]) -> Node:
        node = Node("data", digest, {"use": use})
        if self._was_seen(node):
            return node
        manifest = self._read(node, keys.dataset_manifest(digest), DatasetManifest)
        if manifest:
            left_out = sum(manifest.skipped.values())
            node.facts |= {"samples": manifest.samples, "tokens": manifest.tokens, "left_out": left_out}
        if record.prepared:
            node.made_from.append(self._prepared(record.prepared))
        files = [each for each in record.sources if each.use == use]
        for file in files:
            node.made_from.append(Node("file", file.name, {"sha256": file.sha256, "licence": file.licence}))
        if not files:  # an older record knows their names alone
            named = record.recipe.get("data", {}).get(use) or ()
            node.made_from += [Node("file", name, {"sha256": None}) for name in named]
        return node

    def _prepared(self, digest: str) -> Node:
        """The set of checked rows that a dataset was made from: what its card counts."""
        node = Node("prepared", digest)
        if self._was_seen(node):
            return node
        card = self._read(node, keys.prepared_card(digest), Card)
        if card:
            node.facts = {
                "rules": card.rules_digest,
                "rows_before": card.before.rows,
                "rows": card.after.rows,
                "removed": card.removed,
                "created": card.created_at,
            }
        return node

    def _checkpoint(self, parent: CheckpointRef) -> Node:
        """The checkpoint that a run began from, the versions that were published with its weights, and its run."""
        node = Node("checkpoint", f"{parent.run_id}@{parent.step}")
        if self._was_seen(node):
            return node
        self._read(node, keys.checkpoint_manifest(parent.run_id, parent.step), CheckpointManifest)
        same = [each for each in self._published_by(parent.run_id) if each.step == parent.step]
        node.made_from += [self._adapter(each) for each in same] or [self._run(parent.run_id)]
        return node

    def _published_by(self, run_id: str) -> list[AdapterRecord]:
        if self._published is None:
            self._published = {}
            for record in all_adapters(self._store):
                self._published.setdefault(record.run_id, []).append(record)
        return self._published.get(run_id, [])

    def _read(self, node: Node, key: str, kind: type[AnyRecord]) -> AnyRecord | None:
        """A record; where it is gone or damaged, the node says so."""
        try:
            return records.read(self._store, key, kind)
        except ObjectNotFound:
            node.broken = f"{key} is not in the store any more"
        except ObjectDamaged as error:
            node.broken = str(error)
        return None

    def _was_seen(self, node: Node, more: str = "") -> bool:
        """Whether this thing has been drawn already; from now on it has."""
        what = (node.kind, node.name + more)
        node.again = what in self._seen
        self._seen.add(what)
        return node.again


def _is_on_hub(source: str | None) -> bool:
    """A Hub id, and no folder or store: nothing that this store would have to hold."""
    return source is not None and source != "store" and not source.startswith(("/", "./", "../", "~"))


def _artefacts(found: Iterable[Artefact]) -> list[Node]:
    """What is known by name alone: teachers, what the base was made from by its card, data sets of others."""
    chosen = [each for each in dict.fromkeys(found) if each.of is not None or each.kind == "teacher"]
    return [
        Node("artefact", each.name, {"as": each.kind, "of": each.of, "licence": each.licence or "not stated"})
        for each in chosen
    ]


def _joined(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
