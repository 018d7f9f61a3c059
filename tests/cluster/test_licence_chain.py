"""Several licences together: the strictest holds, what conflicts is refused, and nothing makes a verdict milder."""

import json
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.config import load
from cluster.licences.chain import Judgement, judge
from cluster.licences.facts import Facts, load_facts
from cluster.licences.gate import Gate
from cluster.licences.organisation import USES, Organisation, SignOff, Use, load_organisation
from cluster.licences.verdict import Level
from cluster.records import Artefact, ArtefactKind

FACTS = load_facts()
SHIPPED = load_organisation()
TODAY = date(2026, 11, 26)
IDS = [row.id for row in FACTS.licences]


def artefact(licence: str | None, kind: ArtefactKind = "base", name: str = "lab/thing") -> Artefact:
    return Artefact(kind=kind, name=name, licence=licence)


def verdict(*artefacts: Artefact, use: Use = "train", name: str | None = None, **who: Any) -> Judgement:
    return judge(artefacts, use, FACTS, Organisation.model_validate(SHIPPED.model_dump() | who), TODAY, name)


tags = st.one_of(
    st.sampled_from(IDS),
    st.tuples(st.sampled_from(IDS), st.sampled_from(["OR", "AND"]), st.sampled_from(IDS)).map(" ".join),
    st.just("other"),
)
named = st.sampled_from(["lab/a", "lab/b", "google/gemma-3-4b-it", "Qwen/Qwen3-8B", "tatsu-lab/alpaca"])
artefacts = st.builds(artefact, tags, st.sampled_from(["base", "data", "teacher"]), named)
organisations = st.fixed_dictionaries(
    {
        "commercial": st.booleans(),
        "hosts": st.sampled_from(["nobody", "internal", "external"]),
        "distributes": st.booleans(),
        "monthly_users": st.sampled_from([None, 1000, 10**9]),
        "regions": st.sampled_from([(), ("EU",), ("US",)]),
    }
)


@given(tags, st.lists(artefacts, max_size=2), artefacts, st.sampled_from(USES), organisations)
def test_one_more_artefact_never_makes_a_verdict_milder(
    base: str, others: list[Artefact], more: Artefact, use: Use, who: dict[str, Any]
) -> None:
    before = [artefact(base), *others]
    assert verdict(*before, more, use=use, **who).level >= verdict(*before, use=use, **who).level


@given(st.sampled_from(IDS), st.sampled_from(IDS), st.sampled_from(USES), organisations)
def test_a_choice_is_at_most_as_strict_as_each_and_both_at_least(
    one: str, other: str, use: Use, who: dict[str, Any]
) -> None:
    levels = [verdict(artefact(tag), use=use, **who).level for tag in (one, other)]
    assert verdict(artefact(f"{one} OR {other}"), use=use, **who).level <= min(levels)
    assert verdict(artefact(f"{one} AND {other}"), use=use, **who).level >= max(levels)


@given(st.lists(artefacts, min_size=1, max_size=3), st.sampled_from(USES), organisations)
def test_signing_everything_off_lifts_reviews_and_nothing_else(
    chain: list[Artefact], use: Use, who: dict[str, Any]
) -> None:
    plain = verdict(*chain, use=use, **who)
    subjects = {subject for reason in plain.reasons for subject in reason.subjects}
    signoffs = [
        {"subject": each, "uses": list(USES), "by": "Ada", "signed_on": "2026-01-01", "why": "read"}
        for each in sorted(subjects | set(IDS) | {each.name for each in chain})
    ]
    signed = verdict(*chain, use=use, **{**who, "signoffs": signoffs})
    assert (signed.level == Level.REFUSED) == (plain.level == Level.REFUSED)
    assert signed.level != Level.REVIEW


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gpl-3.0", "cc-by-nc-sa-4.0"),
        ("gpl-3.0", "cc-by-nc-4.0"),
        ("cc-by-sa-4.0", "llama3.1"),
        ("cc-by-sa-4.0", "gemma"),
        ("cc-by-sa-4.0", "cc-by-nc-sa-4.0"),
        ("gpl-2.0", "gpl-3.0"),
        ("gpl-2.0", "apache-2.0"),
        ("odbl", "cc-by-sa-4.0"),
        ("agpl-3.0", "bigcode-openrail-m"),
    ],
)
def test_licences_that_conflict_are_refused_together_and_not_alone(one: str, other: str) -> None:
    who: dict[str, Any] = {"commercial": False}
    for tag in (one, other):
        assert verdict(artefact(tag), use="distribute", **who).passes, tag
    both = [artefact(one), artefact(other, "data", "lab/data")]
    refused = verdict(*both, use="distribute", **who)
    assert refused.level == Level.REFUSED
    assert any("cannot be combined" in reason.text for reason in refused.reasons)
    assert not verdict(*both, use="train", **who).passes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gpl-3.0", "agpl-3.0"),
        ("gpl-3.0", "cc-by-sa-4.0"),
        ("gpl-3.0", "apache-2.0"),
        ("cc-by-sa-3.0", "cc-by-sa-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
        ("llama3.1", "cc-by-4.0"),
        ("mpl-2.0", "gpl-3.0"),
    ],
)
def test_licences_that_go_together_pass_together(one: str, other: str) -> None:
    both = [artefact(one), artefact(other, "data", "lab/data")]
    assert verdict(*both, use="distribute", commercial=False).passes


@pytest.mark.parametrize(
    ("base", "teacher", "level"),
    [
        ("apache-2.0", "apache-2.0", Level.ALLOWED),
        ("apache-2.0", "llama2", Level.REFUSED),
        ("llama2", "llama2", Level.DUTIES),
        ("apache-2.0", "llama3.1", Level.DUTIES),
        ("apache-2.0", "gemma", Level.DUTIES),
        ("apache-2.0", "cc-by-nc-4.0", Level.REVIEW),
        ("apache-2.0", "closed-api", Level.REVIEW),
        ("apache-2.0", "other", Level.REFUSED),
    ],
)
def test_what_a_teacher_says_is_under_the_teachers_terms(base: str, teacher: str, level: Level) -> None:
    found = verdict(artefact(base), artefact(teacher, "teacher", "lab/teacher"), use="serve")
    assert found.level == level


def test_a_teachers_name_goes_into_the_pupils() -> None:
    pupil = [artefact("apache-2.0"), artefact("llama3.3", "teacher", "lab/teacher")]
    refused = verdict(*pupil, use="distribute", name="support")
    assert refused.level == Level.REFUSED
    assert "call it 'llama-support'" in refused.reasons[0].way_out
    assert verdict(*pupil, use="distribute", name="llama-support").passes
    assert verdict(*pupil, use="serve", name="support").passes, "what is only hosted is shown under another name"
    assert {duty.kind for duty in verdict(*pupil, use="serve").duties} == {"built with", "name", "use policy"}


def test_a_sign_off_holds_for_its_use_and_its_days() -> None:
    given_ = {"subject": "llama4", "uses": ["train"], "by": "Ada", "signed_on": "2026-11-01", "why": "read"}
    llama = artefact("llama4")
    assert verdict(llama, signoffs=[given_]).passes
    assert not verdict(llama, use="serve", signoffs=[given_]).passes
    assert not verdict(llama, signoffs=[given_ | {"until": "2026-11-25"}]).passes
    assert verdict(llama, signoffs=[given_ | {"until": "2026-11-26"}]).passes
    assert not verdict(llama, signoffs=[given_ | {"signed_on": "2026-11-27"}]).passes
    with pytest.raises(ValidationError, match="is before signed_on"):
        SignOff.model_validate_json(json.dumps(given_ | {"until": "2026-10-01"}))


def test_a_policy_file_says_it_as_a_person_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "organisation.yaml"
    sign_off = '{subject: llama4, uses: [train], by: Ada, signed_on: "2026-11-01", until: "2027-11-01", why: read}'
    path.write_text(f"commercial: false\nhosts: nobody\ndistributes: false\nsignoffs: [{sign_off}]\n")
    read = load(path, Organisation)
    assert (read.uses, read.signoffs[0].by) == (("train",), "Ada")


def test_a_table_that_contradicts_itself_is_refused() -> None:
    table = FACTS.model_dump()
    twice = {**table, "licences": [*table["licences"], table["licences"][1]]}
    with pytest.raises(ValidationError, match="stands in two rows"):
        Facts.model_validate(twice)
    lost = {**table, "known": [*table["known"], table["known"][0] | {"licence": "nobody's"}]}
    with pytest.raises(ValidationError, match="which has no row"):
        Facts.model_validate(lost)


def test_every_name_that_a_row_gives_is_found() -> None:
    for row in FACTS.licences:
        for name in (row.id, row.id.lower(), *row.names):
            assert FACTS.alternatives(name) == (frozenset({row}),), name
        for other in (*row.may_go_under, *row.incompatible_with):
            assert FACTS.find(other), other


def test_a_gate_travels() -> None:
    gate = Gate.here()
    assert pickle.loads(pickle.dumps(gate)) == gate
