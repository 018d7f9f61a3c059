"""Which model to take: for any table and any wish the answer fits and is allowed, and each rejection is true."""

from datetime import date

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from cluster.catalogue.suggest import GIB, Answer, Judged, Wish, answer, needed_bytes, uses, wish
from cluster.catalogue.table import ANY, Candidate, Table, load_table
from cluster.errors import ConfigError
from cluster.licences.chain import judge
from cluster.licences.gate import Gate
from cluster.licences.organisation import Organisation
from cluster.records import Artefact

LICENCES = ("apache-2.0", "mit", "llama3.1", "llama3.2", "gemma", "cc-by-nc-4.0", "qwen-research", "qwen", "unheard-of")
TASKS = ("chat", "code", "extract")
GATE = Gate.here()

candidates = st.builds(
    lambda number, **fields: Candidate(
        name=f"m{number}", hub=f"someone/m{number}", context_tokens=4096, strengths="", source="https://x.org",
        read_on="2026-11-26", released="2025-01", **fields,
    ),
    number=st.integers(0, 10**6),
    licence=st.sampled_from(LICENCES),
    parameters=st.integers(10**8, 10**11),
    languages=st.lists(st.sampled_from(["en", "zh", "de", ANY]), min_size=1, unique=True).map(tuple),
    tasks=st.lists(st.sampled_from(TASKS), min_size=1, unique=True).map(tuple),
    domains=st.sampled_from([(), ("law",)]),
    unfit=st.sampled_from([None, None, None, "it is stored in ternary"]),
    multimodal=st.booleans(),
)  # fmt: skip
tables = st.lists(candidates, min_size=1, max_size=8, unique_by=lambda each: each.name).map(
    lambda models: Table(models=tuple(models))
)
wishes = st.builds(
    Wish,
    task=st.sampled_from(TASKS),
    languages=st.lists(st.sampled_from(["en", "zh", "de"]), min_size=1, unique=True).map(tuple),
    domain=st.sampled_from([None, "law"]),
    prefer=st.sampled_from(["quality", "speed"]),
    memory_bytes=st.integers(GIB, 200 * GIB),
    use=st.sampled_from(["commercial", "research", "policy"]),
    method=st.sampled_from(["lora", "full"]),
    serving=st.booleans(),
)
organisations = st.builds(
    Organisation,
    commercial=st.booleans(),
    hosts=st.sampled_from(["nobody", "internal", "external"]),
    distributes=st.booleans(),
    monthly_users=st.sampled_from([None, 1000, 10**9]),
    regions=st.sampled_from([(), ("EU",), ("US",)]),
)


def failures(model: Candidate, wished: Wish, organisation: Organisation) -> set[str]:
    """What speaks against a model, found here by other means than the answer's."""
    found = set()
    if model.unfit:
        found.add(model.unfit)
    if wished.task not in model.tasks:
        found.add("task")
    if ANY not in model.languages and not set(wished.languages) <= set(model.languages):
        found.add("languages")
    if needed_bytes(model.parameters, wished) > wished.memory_bytes:
        found.add("memory")
    if wished.use != "policy":
        organisation = organisation.model_copy(update={"commercial": wished.use == "commercial"})
    gate = Gate(facts=GATE.facts, organisation=organisation)
    itself = [Artefact(kind="base", name=model.hub, licence=model.licence, is_multimodal=model.multimodal)]
    for use in uses(gate, wished):
        if not judge(itself, use, GATE.facts, organisation, date.today()).passes:
            found.add(use)
    return found


def named(rejected: Judged) -> set[str]:
    """What an answer says against a model, by the first word of each reason."""
    return {reason if reason == rejected.model.unfit else reason.split()[0].rstrip(":") for reason in rejected.reasons}


@settings(max_examples=100)
@given(tables, wishes, organisations)
def test_what_is_suggested_fits_and_is_allowed_and_every_rejection_is_true(
    table: Table, wished: Wish, organisation: Organisation
) -> None:
    found = answer(table, wished, Gate(facts=GATE.facts, organisation=organisation))
    taken = [found.best, *found.others] if found.best else []
    for each in taken:
        assert each
        assert not failures(each.model, wished, organisation)
    for each in found.rejected:
        assert named(each) == failures(each.model, wished, organisation), "all reasons, and no other"
    would_do = [model for model in table.models if not failures(model, wished, organisation)]
    assert len(taken) == min(4, len(would_do))
    assert len(would_do) + len(found.rejected) == len(table.models)
    if found.best and wished.prefer == "speed":
        rivals = [
            model for model in would_do
            if (model.domains, model.tasks[0]) == (found.best.model.domains, found.best.model.tasks[0])
            and set(wished.languages) <= set(model.languages)
        ]  # fmt: skip
        assert all(found.best.model.speed_parameters <= model.speed_parameters for model in rivals)


@settings(max_examples=50)
@given(tables, wishes, st.integers(1, 100 * GIB))
def test_more_memory_never_takes_a_model_away(table: Table, wished: Wish, more: int) -> None:
    def rejected(given_bytes: int) -> set[str]:
        larger = wished.model_copy(update={"memory_bytes": given_bytes})
        return {each.model.name for each in answer(table, larger, GATE).rejected}

    assert rejected(wished.memory_bytes + more) <= rejected(wished.memory_bytes)


def ask(**said: str) -> Answer:
    given: dict[str, str] = {
        "task": "chat", "language": "en", "prefer": "quality", "memory": "24GiB", "use": "policy", "method": "lora",
    }  # fmt: skip
    given |= said
    wished = wish(domain=given.pop("domain", None), serving=bool(given.pop("serving", "")), **given)
    return answer(load_table(), wished, GATE)


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ({"language": "en,zh"}, "qwen3-8b"),
        ({"task": "code", "memory": "48GiB"}, "qwen2.5-coder-14b-instruct"),
        ({"task": "extract", "domain": "business"}, "granite-3.1-8b-instruct"),
        ({"task": "extract", "memory": "80GB"}, "mistral-small-24b-instruct-2501"),
        ({"prefer": "speed", "serving": "yes"}, "qwen3-0.6b"),
        ({"language": "el", "use": "research", "memory": "48GiB", "task": "translate"}, "aya-expanse-8b"),
        ({"language": "hi", "memory": "2TiB", "method": "full"}, "llama-3.3-70b-instruct"),
    ],
)
def test_what_the_shipped_table_answers(said: dict[str, str], taken: str) -> None:
    found = ask(**said)
    assert found.best
    assert found.best.model.name == taken


def test_reasons_are_said_and_so_is_what_is_not_there() -> None:
    best = ask(domain="law", language="vi").best
    assert best
    assert any("not made for law" in reason for reason in best.reasons)
    nothing = ask(memory="1GiB")
    assert nothing.best is None
    assert "memory" in nothing.rejected[0].reasons[0]
    by_name = {each.model.name: " ".join(each.reasons) for each in ask(memory="1TB").rejected}
    assert "CC-BY-NC-4.0, which does not allow commercial use" in by_name["aya-expanse-8b"]
    assert "MXFP4" in by_name["gpt-oss-20b"]


def test_a_wish_that_is_none_is_told_whole() -> None:
    with pytest.raises(ConfigError) as refused:
        ask(task="singing", language="english", memory="24", prefer="luck")
    for said in (
        "--task: got 'singing'; write chat",
        "--language: got 'english'",
        "write it with its unit",
        "--prefer",
    ):
        assert said in str(refused.value)


def test_every_row_of_the_table_has_terms_that_are_known() -> None:
    for model in load_table().models:
        assert GATE.facts.find(model.licence), model.name
        known = GATE.facts.known_as(model.hub)
        assert known is None or GATE.facts.find(known.licence) == GATE.facts.find(model.licence), model.name
