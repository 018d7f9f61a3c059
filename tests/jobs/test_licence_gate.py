"""Nothing passes the gate: every command that could go past it, as a person meets it, and what it leaves behind.

What a run leaves for serving is built here by the same calls; a whole run through the gate is in tests/e2e.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import keys, records, registry
from cluster.config import load
from cluster.errors import ConfigError, LicenceRefused, PlanError
from cluster.folder import FolderStore
from cluster.licences import notice
from cluster.licences.gate import Gate
from cluster.records import Artefact, BaseModelRef, CheckpointRef, ModelManifest, RunRecord
from jobs import driver, terms
from jobs.config import Recipe
from tests.jobs.commands import luthier

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "configs" / "recipes" / "support.yaml"
LLAMA = "model=llama-3.1-8b-instruct"
NC = Artefact(kind="data", name="lab/nc", licence="cc-by-nc-4.0")
BASE = BaseModelRef(name="base", revision="r1", licence="apache-2.0")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a policy of its own, where weights are given away."""
    folder = tmp_path / "elsewhere"
    (folder / "configs" / "policy").mkdir(parents=True)
    policy = yaml.safe_load((ROOT / "configs" / "policy" / "organisation.yaml").read_text())
    (folder / "configs" / "policy" / "organisation.yaml").write_text(yaml.safe_dump(policy | {"distributes": True}))
    return folder


def publish(store: FolderStore, folder: Path, name: str, *artefacts: Artefact, **files: str) -> None:
    made = folder / f"made-{name}"
    made.mkdir()
    written = {"adapter_config.json": "{}", "adapter_model.safetensors": name, "NOTICE": "made\n", **files}
    for file, text in written.items():
        (made / file).write_text(text)
    registry.publish(store, name, made, BASE, "run", 1, artefacts=artefacts)
    registry.set_alias(store, name, registry.STABLE, 1, "a test")


@pytest.mark.parametrize("command", ["plan", "submit", "train"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.licence=cc-by-nc-4.0", "does not allow commercial use (train refused, serve refused)"),
        ("model.licence=my-own", "nothing is known of the licence 'my-own'"),
        ("data.licences={data/: cc-by-nc-sa-4.0}", "data/tickets.jsonl is under CC-BY-NC-SA-4.0"),
        (
            "data.licences={data/tickets.jsonl: {licence: own, teachers: [meta-llama/Llama-2-7b-hf]}}",
            "may only improve",
        ),
        ("data.train=[hf://datasets/lab/unknown/a.jsonl]", "lab/unknown: nothing is known of the licence 'none'"),
        ("data.train=[hf://datasets/tatsu-lab/alpaca/a.jsonl]", "tatsu-lab/alpaca is under CC-BY-NC-4.0"),
        (
            "data={train: [hf://datasets/tatsu-lab/alpaca/a.jsonl], licences: {hf://datasets/tatsu-lab/alpaca: own}}",
            "tatsu-lab/alpaca is under CC-BY-NC-4.0",
        ),
        ("model.made_from=[{name: Qwen/Qwen2.5-3B}]", "Qwen/Qwen2.5-3B is under qwen-research"),
    ],
)
def test_plan_submit_and_train_refuse_before_anything_is_done(command: str, override: str, said: str) -> None:
    store = "store=s3://nowhere/at-all"
    done = luthier("jobs", command, str(SUPPORT), override, store, code=2)
    assert said in done.stderr


def test_plan_shows_the_verdict_and_its_duties() -> None:
    shown = luthier("jobs", "plan", str(SUPPORT), LLAMA).stdout
    assert "llama3.1; train: allowed with duties; serve: allowed with duties" in shown
    assert "show 'Built with Llama' [/v1/models]" in shown
    said = json.loads(luthier("jobs", "plan", str(SUPPORT), LLAMA, "--json").stdout)["licence"]
    assert said["verdict"] == "allowed with duties"
    assert {duty["kind"] for duty in said["uses"]["serve"]["duties"]} == {"built with", "name", "use policy"}
    mistagged = luthier("jobs", "plan", str(SUPPORT), LLAMA, "model.licence=mit").stdout
    assert "says mit, but is known to be under llama3.1, which holds" in mistagged


def test_a_name_without_its_prefix_is_refused_where_weights_are_given_away(elsewhere: Path) -> None:
    refused = luthier("jobs", "plan", str(SUPPORT), LLAMA, cwd=elsewhere, code=2)
    assert "the name 'support' does not begin with 'Llama'" in refused.stderr
    assert "call it 'llama-support'" in refused.stderr
    luthier("jobs", "plan", str(SUPPORT), LLAMA, "publish.name=llama-support", cwd=elsewhere)


def test_no_recipe_chooses_its_own_policy() -> None:
    with pytest.raises(ConfigError, match="policy: unknown key"):
        load(SUPPORT, Recipe, ["policy={commercial: false}"])
    with pytest.raises(ConfigError, match="is not how any source"):
        load(SUPPORT, Recipe, ["data.licences={other.jsonl: mit}"])


def test_what_a_run_keeps_says_how_it_was_judged(tmp_path: Path) -> None:
    gate = Gate.here()
    recipe = load(SUPPORT, Recipe, [LLAMA, "data.licences={data/: cc-by-4.0}"])
    judged = terms.require(recipe, gate)
    kept = gate.record(terms.artefacts_of(recipe, gate), judged)
    assert kept.verdicts == {"train": "allowed with duties", "serve": "allowed with duties"}
    assert kept.organisation["monthly_users"] == gate.organisation.monthly_users
    (tmp_path / "base").mkdir()
    for file in ("LICENSE", "USE_POLICY.md", "NOTICE"):
        (tmp_path / "base" / file).write_text(f"the base's {file}")
    (tmp_path / "NOTICE").write_text(kept.notice)
    notice.add_licences(tmp_path / "base", tmp_path)
    written = (tmp_path / "NOTICE").read_text()
    assert "data: data/tickets.jsonl, licence cc-by-4.0" in written
    assert "Copyright © Meta Platforms, Inc. All Rights Reserved." in written
    assert written.endswith("the base's NOTICE")
    assert (tmp_path / "LICENSE").read_text() == "the base's LICENSE"
    assert (tmp_path / "USE_POLICY.md").exists()
    with pytest.raises(LicenceRefused, match="does not allow commercial use"):
        terms.require(recipe, gate, (NC,))  # what only the store knows: a parent's data, a stored base's


def test_export_refuses_or_adds_what_goes_along(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    llama = Artefact(kind="base", name="meta-llama/Llama-3.1-8B", licence="llama3.1")
    publish(store, tmp_path, "old")
    publish(store, tmp_path, "bad", NC)
    publish(store, tmp_path, "llama", llama)
    publish(store, tmp_path, "whole", llama, LICENSE="Meta's", USE_POLICY="Meta's")
    publish(store, tmp_path, "kept", Artefact(kind="base", name="lab/nd", licence="cc-by-nd-4.0"))

    def export(name: str, *more: str, code: int = 0) -> str:
        folder = more[0] if more else name
        return luthier("jobs", "export", name, folder, "--store", store.url, *more[1:], cwd=tmp_path, code=code).stderr

    export("old")
    assert (tmp_path / "old" / "LICENSE.Apache-2.0.txt").read_text() == (ROOT / "LICENSE").read_text()
    assert "credit base, its licence and that it was changed" in (tmp_path / "old" / "NOTICE").read_text()
    assert "lab/nc is under CC-BY-NC-4.0" in export("bad", code=2)
    assert "lab/nc is under CC-BY-NC-4.0" in export("bad", "bad", "--internal", code=2)
    assert "save it as configs/policy/texts/llama3.1.txt" in export("llama", code=2)
    assert "the name 'support' does not begin with 'Llama'" in export("whole", "support", code=2)
    assert "show 'Built with Llama' [NOTICE]" in export("whole", "Llama-support")
    assert (tmp_path / "Llama-support" / "LICENSE").read_text() == "Meta's"
    export("whole", "support", "--internal")
    assert "does not allow to give away what is made from it" in export("kept", code=2)
    export("kept", "kept", "--internal")
    made = {path.name for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith("made-")}
    assert made == {"store", "old", "Llama-support", "support", "kept"}, "what was refused left nothing"


def test_deploy_refuses_a_base_before_it_looks_for_a_cluster() -> None:
    tiny = str(ROOT / "configs" / "serving" / "tiny.yaml")
    refused = luthier("serving", "deploy", tiny, "model.licence=cc-by-nc-4.0", code=2)
    assert "tiny-orders is under CC-BY-NC-4.0, which does not allow commercial use (serve refused)" in refused.stderr
    assert "give --address" in luthier("serving", "deploy", tiny, code=2).stderr


def test_a_card_in_the_models_folder_is_believed_against_the_config(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (tmp_path / "model.yaml").write_text(f"name: mine\nsource: {tmp_path}\nlicence: apache-2.0\n")
    assert (
        "which does not allow commercial use" in luthier("licences", "check", f"{tmp_path}/model.yaml", code=2).stderr
    )


def test_check_reads_configs_recipes_folders_and_cards(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: google/gemma-3-4b-it\n---\n")
    for what in (str(tmp_path), f"{tmp_path}/README.md", f"{ROOT}/configs/models/gemma-3-4b-it.yaml"):
        said = json.loads(luthier("licences", "check", what, "--use", "serve", "--json").stdout)
        assert {"pass on", "use policy", "notice"} == {duty["kind"] for duty in said["uses"]["serve"]["duties"]}
    assert "distribute  allowed with duties, by Apache-2.0" in luthier("licences", "check", str(SUPPORT)).stdout
    assert (
        "write train, serve, distribute" in luthier("licences", "check", str(SUPPORT), "--use", "sell", code=2).stderr
    )


def test_audit_judges_all_that_is_stored(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    publish(store, tmp_path, "good", Artefact(kind="base", name="Qwen/Qwen3-8B", licence="apache-2.0"))
    publish(store, tmp_path, "bad", Artefact(kind="base", name="Qwen/Qwen3-8B", licence="apache-2.0"), NC)
    store.put("adapters/damaged/1/record.json", b"{}")
    assert "CC-BY-NC-4.0" in luthier("licences", "audit", "--store", store.url).stdout
    rows: list[dict[str, Any]] = json.loads(luthier("licences", "audit", "--store", store.url, "--json").stdout)
    found = {row["name"]: row["uses"].get("serve", {}).get("verdict") for row in rows}
    assert found == {"good": "allowed", "bad": "refused", "damaged": None}
    assert "is not a AdapterRecord" in next(row["problem"] for row in rows if row["name"] == "damaged")
    bom = json.loads(luthier("licences", "audit", "--store", store.url, "--bom").stdout)
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    refs = {component["bom-ref"] for component in bom["components"]}
    assert {"adapter:bad@1", "base:Qwen/Qwen3-8B", "data:lab/nc"} <= refs
    assert all(each["ref"] in refs and refs.issuperset(each["dependsOn"]) for each in bom["dependencies"])
    depends = {each["ref"]: each["dependsOn"] for each in bom["dependencies"]}
    assert depends["adapter:bad@1"] == ["base:Qwen/Qwen3-8B", "data:lab/nc"]
    (bad,) = (each for each in bom["components"] if each["bom-ref"] == "adapter:bad@1")
    said = {each["name"]: each["value"] for each in bad["properties"]}
    assert said["luthier:licence:verdict:serve"] == "refused"
    assert {"license": {"id": "CC-BY-NC-4.0"}} in bad["licenses"]


def begun(store: FolderStore, recipe: Recipe, *artefacts: Artefact, judged: bool = True) -> RunRecord:
    """The record of a run that was trained on these."""
    gate = Gate.here()
    record = RunRecord(
        run_id="earlier",
        recipe=recipe.model_dump(mode="json", by_alias=True),
        dataset="d",
        evaluation=None,
        code_revision="unknown",
        versions={},
        base=BASE,
        licences=gate.record(artefacts, gate.judge_all(artefacts)) if judged else None,
        created_at=records.now(),
    )
    store.create(keys.run_record("earlier"), record.to_bytes())
    return record


def tiny(store: FolderStore, *overrides: str) -> Recipe:
    recipe = ROOT / "configs" / "recipes" / "quickstart-redact.yaml"
    return load(recipe, Recipe, [f"store={store.url}", *overrides])


def test_a_run_from_refused_weights_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    store, parent = FolderStore(tmp_path / "store"), CheckpointRef(run_id="earlier", step=1)
    begun(store, tiny(store), NC)
    before = [item.key for item in store.list("")]
    with pytest.raises(LicenceRefused, match=r"lab/nc is under CC-BY-NC-4\.0"):
        driver.begin(tiny(store), [], parent, store, Gate.here())
    assert [item.key for item in store.list("")] == before


def test_a_parent_of_before_the_gate_is_judged_by_its_recipe(tmp_path: Path) -> None:
    store, parent = FolderStore(tmp_path / "store"), CheckpointRef(run_id="earlier", step=1)
    begun(store, tiny(store, "data.train=[hf://datasets/tatsu-lab/alpaca/a.jsonl]"), judged=False)
    with pytest.raises(LicenceRefused, match=r"tatsu-lab/alpaca is under CC-BY-NC-4\.0"):
        driver.begin(tiny(store), [], parent, store, Gate.here())


def test_a_stored_base_is_judged_by_what_its_record_says(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = ModelManifest(
        name="tiny-orders",
        revision="r1",
        source="run x",
        licence="apache-2.0",
        files=(),
        created_at="2026",
        artefacts=(NC,),
    )
    store.create(keys.model_manifest("tiny-orders", "r1"), manifest.to_bytes())
    with pytest.raises(LicenceRefused, match=r"lab/nc is under CC-BY-NC-4\.0"):
        driver.begin(tiny(store), [], None, store, Gate.here())


def test_resuming_keeps_to_what_was_decided_and_judges_what_never_was(
    tmp_path: Path,
) -> None:
    recipe = tiny(FolderStore(tmp_path / "old"), "model.licence=cc-by-nc-4.0")
    old = FolderStore(tmp_path / "old")
    begun(old, recipe, judged=False)
    with pytest.raises(LicenceRefused, match="does not allow commercial use"):
        driver.resume("earlier", old.url, [])
    decided = FolderStore(tmp_path / "decided")
    begun(decided, recipe, Artefact(kind="base", name="tiny-orders", licence="cc-by-nc-4.0"))
    with pytest.raises(PlanError, match=r"127\.0\.0\.1:1"):  # so it went on, to look for its cluster
        driver.resume("earlier", decided.url, ["cluster.address=127.0.0.1:1"])
