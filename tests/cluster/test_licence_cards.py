"""Cards made after real ones get the exact verdict, duties and files: tests/cluster/cards/cards.yaml."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.licences.card import parse_card, read_card
from cluster.licences.chain import Judgement, judge
from cluster.licences.facts import load_facts
from cluster.licences.organisation import USES, Organisation, load_organisation

CARDS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "cards" / "cards.yaml").read_text())
FACTS = load_facts()
SHIPPED = load_organisation()
TODAY = date(2026, 11, 26)
LEVELS = {"a": "allowed", "d": "allowed with duties", "r": "needs review", "no": "refused"}


def test_there_are_enough_of_them() -> None:
    assert len(CARDS) >= 40
    assert sum("says" in case.get("said", "") for case in CARDS) >= 3, "mis-tagged ones among them"


def judged(case: dict[str, Any]) -> dict[str, Judgement]:
    text = f"---\n{yaml.safe_dump(case['card'])}---\n# A card\n"
    artefacts = parse_card(text, case["name"], FACTS, case.get("kind", "base"))
    who = Organisation.model_validate(SHIPPED.model_dump() | case.get("who", {}))
    return {use: judge(artefacts, use, FACTS, who, TODAY) for use in USES}


def duties(found: Judgement) -> list[str]:
    return sorted({f"{duty.kind} {duty.licence}" for duty in found.duties})


def files(found: Judgement) -> list[str]:
    copies = {f"LICENSE {duty.licence}" for duty in found.duties if duty.by == "LICENSE"}
    return sorted(copies | {"NOTICE" for duty in found.duties if duty.by == "NOTICE"})


@pytest.mark.parametrize("case", CARDS, ids=lambda case: f"{case['name']}-{case.get('who', '')}")
def test_a_card_is_judged_exactly(case: dict[str, Any]) -> None:
    found = judged(case)
    assert [str(found[use].level) for use in USES] == [LEVELS[each] for each in case["verdicts"].split()]
    assert duties(found["serve"]) == sorted(case.get("serve", []))
    assert duties(found["distribute"]) == sorted(case.get("distribute", []))
    assert files(found["distribute"]) == sorted(case.get("files", []))
    said = " | ".join(
        line for each in found.values() for line in (*each.notes, *(f"{r.text}; {r.way_out}" for r in each.reasons))
    )
    assert case.get("said", "") in said, said
    for each in found.values():
        assert each.passes == (not any(reason.way_out for reason in each.reasons)), "what is refused has a way out"


def test_a_card_is_read_from_a_models_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: google/gemma-3-4b-it\n---\ntext")
    names = [(artefact.name, artefact.licence) for artefact in read_card(tmp_path, "mine", FACTS)]
    assert names == [("mine", "apache-2.0"), ("google/gemma-3-4b-it", "gemma")]
