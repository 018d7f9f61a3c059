"""The card that goes with what is made, read back by the Hub's own client and by our gate."""

import pytest
from huggingface_hub import ModelCard

from cluster.licences.card import parse_card
from cluster.licences.chain import judge
from cluster.licences.gate import Gate, today
from cluster.licences.model_card import Losses, compose
from cluster.records import AdapterRef, Artefact, BaseModelRef, Made, RunRecord, SourceFile

LLAMA = Artefact(kind="base", name="meta-llama/Llama-3.1-8B-Instruct", licence="llama3.1")
QWEN = Artefact(kind="base", name="Qwen/Qwen3-8B", licence="apache-2.0")
TUNED = Artefact(kind="base", name="lab/tuned", licence="apache-2.0")
LLAMA_OF_TUNED = LLAMA.model_copy(update={"of": TUNED.name})
OWN = Artefact(kind="data", name="data/tickets.jsonl", licence="own")
DOLLY = Artefact(kind="data", name="databricks/databricks-dolly-15k", licence="cc-by-sa-3.0")
OURS = Artefact(kind="data", name="lab/rows", licence="cc-by-4.0")


def card(*artefacts: Artefact, kind: str = "adapter", notice: str = "") -> str:
    base = BaseModelRef(name="base", revision="f" * 40, licence=str(artefacts[0].licence))
    run = RunRecord(
        run_id="support-1",
        recipe={
            "method": {"kind": "lora", "rank": 16},
            "train": {"steps": 400},
            "data": {"train": ["a|b.jsonl"], "sequence_length": 2048},
            "secrets": {"HF_TOKEN": "secret://env/T"},
            "store": "s3://bucket/prefix",
        },
        dataset="d" * 40,
        evaluation=None,
        code_revision="c" * 40,
        versions={"torch": "2.13.0"},
        base=base,
        created_at="2026-11-26T08:00:00Z",
        sources=(
            SourceFile(use="train", name="a|b.jsonl", size=1, sha256="e" * 64, licence="own"),
            SourceFile(use="train", name="/home/ada/secret-project/c.jsonl", size=1, sha256="f" * 64, licence="own"),
        ),
    )
    made = Made.model_validate(
        {
            "kind": kind,
            "run_id": run.run_id,
            "base": base,
            "adapter": AdapterRef(name="support", version=3, digest="a" * 64),
            "artefacts": artefacts,
        }
    )
    text = notice or Gate.here().notice(artefacts)
    return compose("llama-support", made, run, Losses(400, 2.5, 1.25, 1.5), text, Gate.here().facts)


def test_the_hubs_client_reads_what_it_says() -> None:
    data = ModelCard(card(QWEN, OWN)).data
    assert (data.base_model, data.base_model_relation, data.license) == ("Qwen/Qwen3-8B", "adapter", "apache-2.0")
    assert (data.library_name, data.pipeline_tag, data.tags) == (
        "peft",
        "text-generation",
        ["luthier", "adapter", "lora"],
    )
    assert data.datasets is None
    merged = ModelCard(card(QWEN, OURS, kind="merged")).data
    assert (merged.library_name, merged.base_model_relation, merged.datasets) == ("transformers", "merge", ["lab/rows"])
    assert merged.license == ["apache-2.0", "cc-by-4.0"]
    assert ModelCard(card(TUNED, LLAMA_OF_TUNED)).data.license == ["apache-2.0", "llama3.1"], "its base's base too"


def test_it_says_what_it_was_trained_on_how_far_it_came_and_what_it_obliges_to() -> None:
    text = card(LLAMA, OWN)
    for said in (
        "| train | a\\|b.jsonl | own | " + "e" * 64 + " |",
        "rank: 16",
        "sequence_length: 2048",
        "| training, first step | 2.5000 |",
        "| training, last of 400 steps | 1.2500 |",
        "| held-out data | 1.5000 |",
        "the model's name begins with 'Llama'",
        "Built with Llama",
        "Llama 3.1 is licensed under the Llama 3.1 Community License",
        "at most 2,048 tokens",
        "| adapter support@3 | " + "a" * 64 + " |",
    ):
        assert said in text, said
    assert "secret://" not in text
    assert "bucket" not in text


@pytest.mark.parametrize(
    "artefacts",
    [
        (QWEN, OWN),
        (LLAMA, OWN),
        (QWEN, DOLLY),
        (QWEN.model_copy(update={"licence": "mit"}),),
        (LLAMA.model_copy(update={"licence": "mit"}),),
        (QWEN, Artefact(kind="data", name="lab/rows", licence="cc-by-nc-4.0")),
        (QWEN, Artefact(kind="data", name="lab/rows", licence=None)),
        (QWEN, Artefact(kind="data", name="lab/rows", licence="mit OR cc-by-nc-4.0")),
    ],
    ids=lambda found: " + ".join(f"{each.name}: {each.licence}" for each in found),
)
def test_who_reads_the_card_alone_judges_no_milder(artefacts: tuple[Artefact, ...]) -> None:
    """What is exported may be somebody's base later."""
    gate = Gate.here()
    known = parse_card(card(*artefacts), "somebody/support", gate.facts)
    for use in ("train", "serve", "distribute"):
        ours, theirs = (
            judge(found, use, gate.facts, gate.organisation, today(), "llama-support") for found in (artefacts, known)
        )
        assert theirs.level >= ours.level, f"{use}: {theirs}"
        if ours.passes and theirs.passes:
            assert {duty.words for duty in ours.duties if duty.kind in ("name", "built with")} <= {
                duty.words for duty in theirs.duties
            }


def test_a_text_of_a_run_stays_text() -> None:
    text = card(QWEN, notice="```\n# not a heading\n---\nlicense: mit\n---")
    assert ModelCard(text).data.license == "apache-2.0"
    assert "'''\n# not a heading" in text
    assert text.count("```") == 6, "three blocks, each opened and closed once"
