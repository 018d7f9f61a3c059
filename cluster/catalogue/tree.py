"""What a store holds, drawn by descent: base → adapters → merged → distilled. Pure, but for reading the records.

    qwen3-8b  b968826d…  apache-2.0
    ├── orders-json@1
    └── orders-merged  4f1c…  (merged, from run 1f2e)
        └── redact@3

An adapter stands below the base revision that its record names. A model that a run has made stands below the model that
the run began from; what it learned by the outputs of is told as its teacher. What names a parent that the store does
not hold stands below that parent's name, marked absent.
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

Key = tuple[str, str]
"""A model's name and revision."""

_MADE = "run "
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
    begun: dict[Key, RunRecord] = {}
    for manifest in manifests:
        key = (manifest.name, manifest.revision)
        run_id = _run_of(manifest)
        nodes[key] = Node("model", *key, manifest.licence, run_id=run_id, teachers=_teachers(manifest.artefacts))
        if run_id in runs:
            begun[key] = runs[run_id]
            nodes[key].how = _how(manifest, runs[run_id])
    above: dict[Key, Key] = {}
    for key, run in begun.items():
        parent = (run.base.name, run.base.revision)
        if key not in _with_ancestors(parent, above):  # else records name each other, and neither is above the other
            above[key] = parent
            _node(nodes, run.base).children.append(nodes[key])
    for adapter in adapters:
        made = Node("adapter", adapter.name, str(adapter.version), adapter.base.licence, "adapter", adapter.run_id)
        made.teachers = _teachers(adapter.artefacts)
        _node(nodes, adapter.base).children.append(made)
    for node in nodes.values():
        node.children.sort(key=lambda each: (each.kind, each.name, each.version.zfill(12)))
    return [nodes[key] for key in sorted(nodes) if key not in above]


def _with_ancestors(key: Key, above: dict[Key, Key]) -> list[Key]:
    found = [key]
    while found[-1] in above:
        found.append(above[found[-1]])
    return found


def _node(nodes: dict[Key, Node], base: BaseModelRef) -> Node:
    """The base's node; of one that the store does not hold (a Hub model), one that says so."""
    key = (base.name, base.revision)
    if key not in nodes:
        nodes[key] = Node("model", *key, base.licence, is_absent=True)
    return nodes[key]


def _run_of(manifest: ModelManifest) -> str:
    return manifest.source.removeprefix(_MADE) if manifest.source.startswith(_MADE) else ""


def _how(manifest: ModelManifest, run: RunRecord) -> str:
    if any(each.kind == "teacher" for each in manifest.artefacts) and run.recipe.get("objective") == "distill":
        return "distilled"
    return "merged" if run.recipe.get("method", {}).get("kind") not in (None, "full") else "trained"


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
