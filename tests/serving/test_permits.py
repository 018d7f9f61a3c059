"""What may answer, and what is shown for it; over HTTP the same is in test_http.py."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster import registry
from cluster.errors import LicenceRefused
from cluster.folder import FolderStore
from cluster.licences import gate as licences
from cluster.licences.gate import Gate
from cluster.models import ModelConfig
from cluster.records import AdapterRecord, Artefact, BaseModelRef
from serving.app import build
from serving.config import ServingConfig
from serving.ingress import Ingress
from serving.permits import Permits
from tests.serving.endpoint import free_port, serving_config

BASE = BaseModelRef(name="base", revision="r1", licence="apache-2.0")


def config(tmp_path: Path, licence: str = "apache-2.0") -> ServingConfig:
    model = ModelConfig(name="base", source=str(tmp_path), licence=licence, dtype="fp32")
    return serving_config(model, f"file://{tmp_path}/store", free_port())


def adapter(*artefacts: Artefact, licence: str = "apache-2.0") -> AdapterRecord:
    base = BASE.model_copy(update={"licence": licence})
    return AdapterRecord(
        name="a",
        version=1,
        digest="0" * 64,
        files=(),
        base=base,
        run_id="r",
        step=1,
        created_at="",
        artefacts=artefacts,
    )


def test_a_record_of_before_the_gate_is_judged_by_its_base(tmp_path: Path) -> None:
    permits = Permits.here(config(tmp_path))
    permits.check(adapter())
    with pytest.raises(LicenceRefused, match=r"base is under CC-BY-NC-4\.0"):
        permits.check(adapter(licence="cc-by-nc-4.0").model_copy(update={"version": 2}))


def test_what_the_store_knows_of_the_base_counts_for_every_adapter(tmp_path: Path) -> None:
    permits = Permits.here(config(tmp_path))
    permits.check(adapter())
    parent = Artefact(kind="base", name="lab/parent", licence="cc-by-nc-4.0", of="base")
    for record in (None, adapter()):
        with pytest.raises(LicenceRefused, match="lab/parent"):
            permits.with_base((parent,)).check(record)


def test_an_application_of_a_refused_base_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(LicenceRefused, match="does not allow commercial use"):
        build(config(tmp_path, "cc-by-nc-4.0"), BASE)


def test_the_ingress_resolves_nothing_that_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (made / file).write_text("{}")
    store = FolderStore(tmp_path / "store")
    data = Artefact(kind="data", name="lab/nc", licence="cc-by-nc-4.0")
    for name, artefacts in (("good", ()), ("bad", (data,))):
        registry.publish(store, name, made, BASE, "run", 1, artefacts=artefacts)

    async def main() -> None:
        nowhere: Any = None  # no call is made
        resolver = Ingress(config(tmp_path), BASE, nowhere)._resolver
        assert [model.id for model in await resolver.models()] == ["base", "good@1"]
        assert await resolver.resolve("good@1")
        for reference in ("bad@1", "base:bad@1"):
            with pytest.raises(LicenceRefused, match=r"lab/nc is under CC-BY-NC-4\.0"):
                await resolver.resolve(reference)

    asyncio.run(main())


def test_a_base_shows_what_its_licence_wants_to_be_shown(tmp_path: Path) -> None:
    shown = Permits.here(config(tmp_path, "gemma")).shown("base", None)
    assert shown["licences"] == ["gemma"]
    assert shown["notices"][0].startswith("Gemma is provided under")
    assert "display_name" not in shown
    llama = Permits.here(config(tmp_path, "llama3.1")).shown("my-llama", None)
    assert (llama["built_with"], llama["display_name"]) == (["Built with Llama"], "llama-my-llama")
    assert "display_name" not in Permits.here(config(tmp_path, "llama3.1")).shown("llama-mine", None)


def test_a_sign_off_ends_while_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate.here()
    sign_off = {"subject": "llama4", "uses": ["serve"], "by": "Ada", "signed_on": "2026-01-01", "why": "read"}
    who = gate.organisation.model_dump() | {"signoffs": [sign_off | {"until": licences.today().isoformat()}]}
    signed = Gate(facts=gate.facts, organisation=type(gate.organisation).model_validate(who))
    permits = Permits("base", signed, (Artefact(kind="base", name="base", licence="llama4"),))
    permits.check(None)
    tomorrow = licences.today() + timedelta(days=1)
    monkeypatch.setattr(licences, "today", lambda: tomorrow)
    with pytest.raises(LicenceRefused, match="needs review"):
        permits.check(None)


def test_who_hosts_nothing_serves_nothing(tmp_path: Path) -> None:
    gate = Gate.here()
    none = Gate(facts=gate.facts, organisation=gate.organisation.model_copy(update={"hosts": "nobody"}))
    with pytest.raises(LicenceRefused, match="hosts: nobody"):
        Permits("base", none, Permits.here(config(tmp_path)).base).check(None)
