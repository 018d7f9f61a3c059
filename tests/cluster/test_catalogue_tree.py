"""A store by descent: every model and adapter stands once, below what it was made from."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import given
from rich.console import Console

from cluster import keys
from cluster.catalogue.tree import Node, build, draw, read
from cluster.folder import FolderStore
from cluster.records import AdapterRecord, AdapterRef, Artefact, BaseModelRef, Made, ModelManifest, Record, RunRecord

AT = "2026-11-26T08:00:00Z"


def model(
    name: str, revision: str, source: str = "owner/x", teacher: str = "", made: Made | None = None
) -> ModelManifest:
    made_from = (Artefact(kind="teacher", name=teacher, licence="mit"),) if teacher else ()
    return ModelManifest(
        name=name,
        revision=revision,
        source=source,
        licence="mit",
        files=(),
        created_at=AT,
        artefacts=made_from,
        made=made,
    )


def adapter(name: str, version: int, base: tuple[str, str], run: str = "r0") -> AdapterRecord:
    ref = BaseModelRef(name=base[0], revision=base[1], licence="mit")
    return AdapterRecord(
        name=name, version=version, digest="0" * 64, files=(), base=ref, run_id=run, step=1, created_at=AT
    )


def run(run_id: str, base: tuple[str, str], **recipe: Any) -> RunRecord:
    ref = BaseModelRef(name=base[0], revision=base[1], licence="mit")
    return RunRecord(
        run_id=run_id, recipe=recipe, dataset="d", evaluation=None, code_revision="c", versions={}, base=ref,
        created_at=AT,
    )  # fmt: skip


def merge(itself: tuple[str, str], base: tuple[str, str], adapter: AdapterRef) -> ModelManifest:
    ref = BaseModelRef(name=base[0], revision=base[1], licence="mit")
    return model(*itself, made=Made(kind="merged", run_id="r9", base=ref, adapter=adapter))


def put(store: FolderStore, key: str, record: Record) -> None:
    store.put(key, record.to_bytes())


def test_a_store_is_drawn_from_base_to_what_was_distilled(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    base, tuned, small = ("base", "a" * 40), ("tuned", "b" * 40), ("small", "c" * 40)
    merged = merge(("merged", "e" * 40), base, AdapterRef(name="orders", version=2, digest="0" * 64))
    for manifest in (
        model(*base), model(*tuned, source="run r1"), model(*small, source="run r2", teacher="base"), merged,
    ):  # fmt: skip
        put(store, keys.model_manifest(manifest.name, manifest.revision), manifest)
    for record in (run("r1", base, method={"kind": "full"}), run("r2", tuned, objective="distill")):
        put(store, keys.run_record(record.run_id), record)
    for made in (
        adapter("orders", 2, base), adapter("orders", 10, base), adapter("redact", 1, tuned, "r3"),
        adapter("far", 1, ("hub-model", "d" * 40)), adapter("again", 1, ("merged", "e" * 40)),
    ):  # fmt: skip
        put(store, keys.adapter_record(made.name, made.version), made)
    store.put(keys.adapter_record("broken", 1), b"{")  # names nothing; the rest is drawn all the same
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(draw(read(store), "file:///store"))
    assert [line.rstrip() for line in console.export_text().splitlines()] == [
        "file:///store",
        "├── base  aaaaaaaaaaaa  mit",
        "│   ├── orders@2  (run r0)",
        "│   │   └── merged  eeeeeeeeeeee  mit  (merged, run r9)",
        "│   │       └── again@1  (run r0)",
        "│   ├── orders@10  (run r0)",
        "│   └── tuned  bbbbbbbbbbbb  mit  (trained, run r1)",
        "│       ├── redact@1  (run r3)",
        "│       └── small  cccccccccccc  mit  (distilled, run r2, taught by base)",
        "└── hub-model  dddddddddddd  mit  (not in this store)",
        "    └── far@1  (run r0)",
    ]


REFS = st.tuples(st.sampled_from("abcde"), st.just("0" * 40))


@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["owner/x", "run r0", "run r1", "run r2"])),
    st.dictionaries(st.sampled_from(["r0", "r1", "r2"]), REFS),
    st.lists(st.tuples(st.sampled_from(["x", "y"]), st.integers(1, 3), REFS), unique_by=lambda each: each[:2]),
    st.dictionaries(st.sampled_from("abcd"), st.tuples(REFS, st.sampled_from(["x", "y"]), st.integers(1, 3))),
)
def test_everything_stands_once_whatever_the_records_say(
    sources: dict[str, str],
    bases: dict[str, tuple[str, str]],
    made: list[tuple[str, int, tuple[str, str]]],
    merged: dict[str, tuple[tuple[str, str], str, int]],
) -> None:
    """Records may be missing, or name each other in a circle: nothing is lost, doubled, or drawn without end."""
    manifests = [model(name, "0" * 40, source) for name, source in sources.items() if name not in merged]
    for name, (base, of, version) in merged.items():
        manifests.append(merge((name, "0" * 40), base, AdapterRef(name=of, version=version, digest="0" * 64)))
    runs = {run_id: run(run_id, base) for run_id, base in bases.items()}
    roots = build(manifests, [adapter(*each) for each in made], runs)
    stand = [(node.kind, node.name, node.version) for node in everything(roots) if not node.is_absent]
    expected = [("model", name, "0" * 40) for name in {*sources, *merged}]
    expected += [("adapter", name, str(version)) for name, version, _ in made]
    assert sorted(stand) == sorted(expected)
    parents = {id(child): node for node in everything(roots) for child in node.children}
    named = {(name, str(version)): base for name, version, base in made}
    for node in everything(roots):
        if (node.name, node.version) in named and id(node) in parents:
            assert (parents[id(node)].name, parents[id(node)].version) == named[node.name, node.version]


def everything(nodes: list[Node]) -> Iterator[Node]:
    for node in nodes:
        yield node
        yield from everything(node.children)
