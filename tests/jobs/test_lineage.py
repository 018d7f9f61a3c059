"""Where things come from, what was trained on a text, and whether a run can be done again; on a family of records."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import keys, made, records, registry
from cluster.errors import DataError, LicenceRefused
from cluster.licences.gate import Gate
from cluster.models import ModelConfig
from cluster.records import AdapterRecord, RunRecord
from jobs import card, lineage, reproduction
from tests.conftest import TinyModels
from tests.jobs.commands import luthier
from tests.jobs.family import PLANTED, Family, make_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), tiny_models["qwen3"])


def contents(family: Family) -> dict[str, bytes]:
    return {item.key: family.store.get(item.key) for item in family.store.list("")}


def path_of(node: lineage.Node, *kinds: str) -> list[str]:
    """The names met when one goes down by these kinds, each the first of its kind."""
    names = [node.name]
    for kind in kinds:
        node = next(each for each in node.made_from if each.kind == kind)
        names.append(node.name)
    return names


def test_a_lineage_goes_to_the_end_through_a_merge_and_a_parent(family: Family) -> None:
    root = lineage.trace(family.store, "grandchild@1")
    first, child, grandchild = (family.runs[name] for name in ("first", "child", "grandchild"))
    way = ("run", "base", "adapter", "run", "checkpoint", "adapter", "run", "data", "file")
    assert path_of(root, *way) == [
        *("grandchild@1", grandchild.run_id, "mixed", "child@1", child.run_id),
        *(f"{first.run_id}@3", "first@1", first.run_id, first.dataset, str(family.folder / "first.jsonl")),
    ]
    assert not [each.broken for each in root.walk() if each.broken]
    said: dict[str, Any] = json.loads(
        luthier("jobs", "show", "--lineage", "grandchild", "--store", family.store.url, "--json").stdout
    )
    assert said == root.to_dict()
    (run,) = said["made_from"]
    assert grandchild.digests
    assert (run["config"], run["code_digest"], run["by"]) == (
        grandchild.digests.config,
        grandchild.digests.code,
        grandchild.by,
    )
    drawn = luthier("jobs", "show", "--lineage", grandchild.run_id, "--store", family.store.url).stdout
    for name in ("mixed", "child@1", "first@1", "tiny-test", "cc-by-4.0", first.sources[0].sha256[:12]):
        assert name in drawn


def test_every_digest_is_of_what_it_says(family: Family) -> None:
    first, child = (family.runs[name] for name in ("first", "child"))
    version = registry.record(family.store, "child", 1)
    assert version.digests == child.digests
    assert version.parent == child.parent
    assert first.digests
    assert child.digests
    assert child.digests.parent
    assert first.digests.parent is None
    assert child.digests.code == first.digests.code
    assert child.digests.config != first.digests.config
    assert first.sources[0].sha256 == records.describe_file(family.folder / "first.jsonl", "").sha256
    assert first.sources[0].licence == "cc-by-4.0"


def test_links_that_are_broken_are_shown_as_such(family: Family, tmp_path: Path) -> None:
    store, first, child = family.copy(tmp_path).store, family.runs["first"], family.runs["child"]
    store.delete(keys.run_record(first.run_id))
    store.delete(keys.dataset_manifest(child.dataset))
    store.put(keys.adapter_record("clean", 1), b"{}")
    drawn = luthier("jobs", "show", "--lineage", "grandchild@1", "--store", store.url).stdout
    assert f"broken: {keys.run_record(first.run_id)} is not in the store any more" in drawn
    assert f"broken: {keys.dataset_manifest(child.dataset)} is not in the store any more" in drawn
    assert str(family.folder / "child.jsonl") in drawn, "the run's record still names its files"
    assert "is not a AdapterRecord" in luthier("jobs", "show", "--lineage", "clean@1", "--store", store.url).stdout
    store.delete(keys.adapter_record("child", 1))
    merged = next(each for each in lineage.trace(store, "grandchild").walk() if each.name == "child@1")
    assert "no adapter child@1" in merged.broken
    assert merged.made_from[0].name == child.run_id
    luthier("jobs", "show", "--lineage", "nobody@1", "--store", store.url, code=2)


def test_records_of_before_stay_readable(family: Family) -> None:
    run = json.loads(family.runs["first"].to_bytes())
    for new in ("by", "sources", "digests", "reproduces"):
        del run[new]
    assert RunRecord.model_validate(run).digests is None
    version = json.loads(registry.record(family.store, "first", 1).to_bytes())
    for new in ("digests", "parent"):
        del version[new]
    assert AdapterRecord.model_validate_json(json.dumps(version)).parent is None


@pytest.mark.parametrize("text", [PLANTED, 'ylva  "YO"\na\u030angstro\u0308m lives'])
def test_all_that_learned_a_text_is_listed(family: Family, text: str, tmp_path: Path) -> None:
    """The version itself, one that began from it, a model that this was merged into, and one that was trained on it."""
    store, before = family.store, contents(family)
    (tmp_path / "texts").write_text("nothing has this\n" + text.replace("\n", " ") + "\n")
    done = luthier("jobs", "data", "forget", "--file", str(tmp_path / "texts"), "--store", store.url, "--json")
    said = json.loads(done.stdout)
    first, child, grandchild = (family.runs[name].run_id for name in ("first", "child", "grandchild"))
    assert [(each["digest"], each["rows"]) for each in said["matches"]] == [(family.runs["first"].dataset, 1)]
    assert {each["run_id"] for each in said["runs"]} == {first, child, grandchild}
    assert {each["adapter"] for each in said["adapters"]} == {"first@1", "child@1", "grandchild@1"}
    assert [each["because"] for each in said["models"]] == ["child@1 was merged into it"]
    assert said["aliases"] == {f"{name}@stable": f"{name}@1" for name in ("child", "first", "grandchild")}
    assert said["sources"] == [str(family.folder / "first.jsonl")]
    for word in ("ylva", "storgatan", "nimbus"):
        assert word not in (done.stdout + done.stderr).lower()
    assert contents(family) == before
    told = luthier("jobs", "data", "forget", "--contains", text, "--store", store.url).stdout
    assert f"stop serving it: luthier cluster alias first@stable --remove --store {store.url}" in told


def test_what_nobody_learned_and_what_could_not_be_searched(family: Family, tmp_path: Path) -> None:
    family = family.copy(tmp_path)
    forget = ("jobs", "data", "forget", "--store", family.store.url)
    assert "nothing in this store has it" in luthier(*forget, "--contains", "Storgatan 8").stdout
    luthier(*forget, code=2)
    luthier(*forget, "--contains", " ", code=2)
    prefix = keys.prepared_prefix("d" * 40)
    family.store.put(f"{prefix}rows-00000.jsonl", (json.dumps({"text": PLANTED}, ensure_ascii=False) + "\n").encode())
    family.store.put(f"{prefix}check.json", json.dumps({"found": {"example": PLANTED}}).encode())
    base = family.runs["first"].base
    polished = family.train("polished", [{"prompt": "Where?", "completion": "I cannot tell."}], base, prepared="d" * 40)
    family.store.delete(f"{keys.model_prefix(base.name, base.revision)}tokenizer.json")
    done = luthier(*forget, "--contains", PLANTED, "--json", code=1)
    said = json.loads(done.stdout)
    assert [(each["kind"], each["places"], each["is_trained_on"]) for each in said["matches"]] == [
        ("prepared", ["rows-00000.jsonl:1"], True),
        ("prepared", ["check.json:1"], False),
    ]
    assert f"dataset {family.runs['first'].dataset}" in said["unsearched"]
    assert [each["run_id"] for each in said["runs"]] == [polished.run_id]
    assert [each["adapter"] for each in said["adapters"]] == ["polished@1"]
    drawn = luthier("jobs", "show", "--lineage", "polished@1", "--store", family.store.url).stdout
    assert f"prepared {'d' * 12}  broken: {keys.prepared_card('d' * 40)} is not in the store any more" in drawn


def test_prompts_reports_and_the_files_that_have_a_text_are_listed_and_no_others(
    family: Family, tmp_path: Path
) -> None:
    files, family = family.folder, family.copy(tmp_path)
    first, clean = family.runs["first"], family.runs["clean"]
    gone = first.sources[0].model_copy(update={"name": "hf://datasets/a/b/c.json"})
    several = first.model_copy(update={"sources": (*first.sources, *clean.sources, gone)})
    family.store.put(keys.run_record(first.run_id), several.to_bytes())
    suite, report = keys.suite_file("a" * 64, ".jsonl"), keys.evaluation("clean", 1, 1)
    family.store.put(suite, (json.dumps({"prompt": "Who?", "expected": PLANTED}) + "\n").encode())
    family.store.put(keys.suite_file("b" * 64, ".jsonl"), b'{"prompt": "Who?", "expected": "Nobody."}\n')
    family.store.put(report, json.dumps({"examples": [{"prompt": "Who?", "expected": PLANTED}]}).encode())
    said = json.loads(
        luthier("jobs", "data", "forget", "--contains", PLANTED, "--store", family.store.url, "--json").stdout
    )
    listed = [(each["kind"], each["digest"], each["is_trained_on"]) for each in said["matches"]]
    assert listed == [
        ("tokenised", first.dataset, True),
        ("suite", suite, False),
        ("evaluation", report, False),
    ]
    assert said["sources"] == [str(files / "first.jsonl")]
    assert list(said["unread"]) == [gone.name]
    assert all(key in said["to_do"][-1] for key in (suite, report))
    assert "clean@1" not in {each["adapter"] for each in said["adapters"]}


def test_losses_are_compared_step_by_step() -> None:
    def lines(*losses: float | None) -> list[dict[str, Any]]:
        return [{"step": step, "loss": loss} for step, loss in enumerate(losses)]

    equal = reproduction.compare(lines(3.0, None, 2.0), lines(3.00005, None, 2.0))
    assert (equal.is_equal, equal.at, equal.parts) == (True, 0, None)
    assert equal.largest == pytest.approx(5e-5)
    apart = reproduction.compare(lines(3.0, 2.5, 2.0), lines(3.0, 2.5002, 2.1))
    assert (apart.is_equal, apart.at, apart.parts) == (False, 2, 1)
    assert "they part at step 1" in str(apart)
    for other in (lines(3.0, 2.5), lines(3.0, None, 2.0), lines(3.0, float("nan"), 2.0)):
        assert not reproduction.compare(lines(3.0, 2.5, 2.0), other).is_equal
    assert not reproduction.compare(lines(), lines()).is_equal


@pytest.mark.parametrize(
    ("state", "is_reproduced", "code"), [("succeeded", True, 0), ("succeeded", False, 1), ("stopped", False, 1)]
)
def test_a_reproduction_ends_with_what_it_found(state: str, is_reproduced: bool, code: int) -> None:
    assert reproduction.ended({"state": state, "is_reproduced": is_reproduced}) == code


def test_what_was_made_here_may_be_a_base_although_no_hub_knows_its_own(family: Family, tmp_path: Path) -> None:
    """Its card names a base without its licence; luthier.json says that. A stranger's is not believed."""
    run, gate = family.runs["first"], Gate.here()
    assert run.licences
    card.write(family.store, tmp_path, "whole", how := made.of_run(run, "model", 3, run.licences), run, None, "")
    model = ModelConfig(name="whole", source="store", revision=None, licence="apache-2.0", dtype="fp32", shape=None)
    stranger = model.model_copy(update={"source": "lab/whole", "revision": "f" * 40})
    with pytest.raises(LicenceRefused, match="tiny-test: nothing is known of the licence 'none'"):
        gate.require(gate.of_model(model, tmp_path), "whole")
    made.write(tmp_path, how)
    gate.require(gate.of_model(model, tmp_path), "whole")
    with pytest.raises(LicenceRefused, match="tiny-test: nothing is known"):
        gate.require(gate.of_model(stranger, tmp_path), "whole")


def test_a_run_is_not_reproduced_from_other_data(family: Family) -> None:
    run = family.runs["clean"]
    assert reproduction.differences(run) == []
    older = run.model_copy(
        update={
            "versions": {**run.versions, "torch": "1.0"},
            "digests": run.digests and run.digests.model_copy(update={"code": "0" * 64}),
        }
    )
    code, torch = reproduction.differences(older)
    assert "the code has changed" in code
    assert torch.startswith("torch is ")
    assert torch.endswith(", and was 1.0")
    file = family.folder / "clean.jsonl"
    assert reproduction.check_files(family.store, run, family.folder) == {str(file): file}
    was = file.read_text()
    file.write_text(was + "\n")
    with pytest.raises(DataError, match=r"clean\.jsonl has changed since: its SHA-256 is"):
        reproduction.check_files(family.store, run, family.folder)
    luthier("jobs", "reproduce", "clean@1", "--store", family.store.url, code=2)
    file.write_text(was)
    luthier("jobs", "reproduce", "clean@1", "train.seed=1", "--store", family.store.url, code=2)
