"""What a store holds, drawn by descent: base → adapters → merged → distilled. Pure, but for reading the records.

    qwen3-8b  b968826d…  apache-2.0
    ├── orders@1
    │   └── orders-merged  4f1c…  apache-2.0  (merged, run 1f2e)
    │       └── redact@3
    └── small  77aa…  apache-2.0  (distilled, run 9b01, taught by qwen3-8b)

An adapter stands below the base that its record names, what it was merged into below the adapter, a model that a run
has trained below the model that the run began from; by whose outputs it learned is told as its teacher. What names a
parent that the store does not hold stands below that parent's name, which says so.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from cluster import keys, models, records, registry
from cluster.errors import ObjectDamaged, ObjectNotFound
from cluster.records import AdapterRecord, Artefact, BaseModelRef, ModelManifest, RunRecord
from cluster.store import Store

Key = tuple[str, str, str]
"""A node's kind, name and version."""

_RUN = "run "
"""How the source of a model begins that a run has published."""


@dataclass
class Node:
    """A model revision or an adapter version. `how`: adapter, trained, merged, distilled."""

    kind: str
    name: str
    version: str
    licence: str = ""
    how: str = ""
    run_id: str = ""
    teachers: tuple[str, ...] = ()
    is_absent: bool = False
    children: "list[Node]" = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.kind, self.name, self.version

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "version": self.version,
            "licence": self.licence,
            "how": self.how,
            "run_id": self.run_id,
            "teachers": list(self.teachers),
            "absent": self.is_absent,
            "children": [each.to_dict() for each in self.children],
        }


def read(store: Store) -> list[Node]:
    """The roots of a store, by name. Records that cannot be read are left out: `licences audit` names them."""
    manifests = models.mirrored(store)
    adapters = []
    for name in registry.names(store):
        for number in registry.version_numbers(store, name):
            try:
                adapters.append(registry.record(store, name, number))
            except ObjectDamaged:
                continue
    return build(manifests, adapters, _runs(store, manifests, adapters))


def _runs(store: Store, manifests: list[ModelManifest], adapters: list[AdapterRecord]) -> dict[str, RunRecord]:
    """The records of the runs that made something, as far as they are there."""
    wanted = {each.run_id for each in adapters} | {run for each in manifests if (run := _run_of(each))}
    found = {}
    for run_id in sorted(wanted):
        try:
            found[run_id] = records.read(store, keys.run_record(run_id), RunRecord)
        except (ObjectNotFound, ObjectDamaged):
            continue
    return found


def build(
    manifests: Iterable[ModelManifest], adapters: Iterable[AdapterRecord], runs: dict[str, RunRecord]
) -> list[Node]:
    """The roots, each with all that descends from it. Every model and adapter stands exactly once."""
    nodes: dict[Key, Node] = {}
    wanted: dict[Key, list[Node]] = {}  # the nodes above each, nearest first, as its record names them
    for adapter in adapters:
        node = Node("adapter", adapter.name, str(adapter.version), adapter.base.licence, "adapter", adapter.run_id)
        node.teachers = _teachers(adapter.artefacts)
        nodes[node.key] = node
        wanted[node.key] = [_absent(adapter.base)]
    for manifest in manifests:
        node = Node("model", manifest.name, manifest.revision, manifest.licence, run_id=_run_of(manifest))
        node.teachers = _teachers(manifest.artefacts)
        nodes[node.key] = node
        if above := _above(manifest, runs.get(node.run_id)):
            node.how = _how(manifest, runs.get(node.run_id))
            wanted[node.key] = above
    above_of: dict[Key, Key] = {}
    for key, line in wanted.items():
        below = key
        for parent in line:
            if below in above_of or below in _with_ancestors(parent.key, above_of):
                break  # it stands already; or records name each other, and neither is above the other
            above_of[below] = parent.key
            nodes.setdefault(parent.key, parent).children.append(nodes[below])
            below = parent.key
    for node in nodes.values():
        node.children.sort(key=lambda each: (each.kind, each.name, each.version.zfill(12)))
    return [nodes[key] for key in sorted(nodes) if key not in above_of]


def _with_ancestors(key: Key, above: dict[Key, Key]) -> list[Key]:
    found = [key]
    while found[-1] in above:
        found.append(above[found[-1]])
    return found


def _above(manifest: ModelManifest, run: RunRecord | None) -> list[Node]:
    """What a model was made of, nearest first: an adapter and its base, or a base. Nothing, if it came from outside."""
    made = manifest.made
    if made and made.adapter:
        adapter = Node("adapter", made.adapter.name, str(made.adapter.version), made.base.licence, is_absent=True)
        return [adapter, _absent(made.base)]
    if made or run:
        base = made.base if made else run.base if run else None
        assert base
        is_itself = (base.name, base.revision) == (manifest.name, manifest.revision)
        return [] if is_itself else [_absent(base)]
    return []


def _absent(base: BaseModelRef) -> Node:
    """A base's node, where the store has no record of it: a Hub model that is not mirrored."""
    return Node("model", base.name, base.revision, base.licence, is_absent=True)


def _run_of(manifest: ModelManifest) -> str:
    if manifest.made:
        return manifest.made.run_id
    return manifest.source.removeprefix(_RUN) if manifest.source.startswith(_RUN) else ""


def _how(manifest: ModelManifest, run: RunRecord | None) -> str:
    if manifest.made and manifest.made.kind == "merged":
        return "merged"
    is_distilled = run is not None and run.recipe.get("objective") == "distill"
    return "distilled" if is_distilled or _teachers(manifest.artefacts) else "trained"


def _teachers(artefacts: Iterable[Artefact]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.name for each in artefacts if each.kind == "teacher"))


def draw(roots: list[Node], store: str) -> Tree:
    """For a terminal."""
    tree = Tree(escape(store), guide_style="dim")
    for root in roots:
        _draw(root, tree)
    return tree


def _draw(node: Node, above: Tree) -> None:
    if node.kind == "adapter":
        text = f"[bold]{escape(node.name)}@{escape(node.version)}[/bold]"
    else:
        text = f"[bold]{escape(node.name)}[/bold]  {escape(node.version[:12])}  {escape(node.licence)}"
    notes = [node.how if node.kind == "model" else "", f"run {node.run_id}" if node.run_id else ""]
    notes += [f"taught by {', '.join(node.teachers)}" if node.teachers else "", "not in this store" * node.is_absent]
    said = ", ".join(filter(None, notes))
    branch = above.add(text + (f"  [dim]({escape(said)})[/dim]" if said else ""))
    for child in node.children:
        _draw(child, branch)
