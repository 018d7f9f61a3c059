"""What lies beside a tag: a licence's own text, the model that config.json was loaded from, how Luthier made it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import made
from cluster.catalogue.inspection import inspect
from cluster.cli import app
from cluster.errors import LicenceRefused
from cluster.licences.evidence import of_title
from cluster.licences.gate import Gate
from cluster.models import ModelConfig
from cluster.records import Artefact, BaseModelRef, Made

GATE = Gate.here()
LLAMA = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: July 23, 2024\n"
NOT_FOR_MONEY = "Creative Commons Attribution-NonCommercial 4.0 International\n\n Creative Commons Corporation"
APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (APACHE, "Apache-2.0"),
        ("MIT License\n\nCopyright (c) 2026 Me", "MIT"),
        ("Modified MIT License\n\nCopyright (c) 2025 Moonshot AI", "modified-mit"),
        ("Copyright (c) 2026 Me\n\nPermission is hereby granted, free of charge", None),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", "llama2"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"),
        (LLAMA, "llama3.1"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "llama3.2"),
        ("**Llama 3.3** Community License Agreement", "llama3.3"),
        ("Gemma Terms of Use\n\nLast modified: March 24, 2025", "gemma"),
        (NOT_FOR_MONEY, "CC-BY-NC-4.0"),
        ("Attribution-NonCommercial-ShareAlike 4.0 International", "CC-BY-NC-SA-4.0"),
        ("Attribution-ShareAlike 4.0 International", "CC-BY-SA-4.0"),
        ("Attribution 4.0 International", "CC-BY-4.0"),
        ("Qwen RESEARCH LICENSE AGREEMENT", "qwen-research"),
        ("Qwen LICENSE AGREEMENT", "qwen"),
        ("Tongyi Qianwen LICENSE AGREEMENT", "tongyi-qianwen"),
        ("DEEPSEEK LICENSE AGREEMENT\n\nVersion 1.0, 23 October 2023", "deepseek"),
        ("GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007", "GPL-3.0-only"),
        ("word " * 30 + "Gemma Terms of Use", None),
    ],
)
def test_a_text_is_known_by_its_title(text: str, licence: str | None) -> None:
    found = of_title(text, GATE.facts)
    assert (found.id if found else None) == licence


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "LICENSE").write_text(APACHE)
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "Qwen/Qwen3-8B"}))
    return folder


@pytest.mark.parametrize(
    ("file", "text", "licence", "is_allowed"),
    [
        ("LICENSE", APACHE, None, True),
        ("LICENSE", LLAMA, "llama3.1", True),
        ("LICENSE.txt", NOT_FOR_MONEY, "CC-BY-NC-4.0", False),
        ("LICENSE", "Qwen RESEARCH LICENSE AGREEMENT", "qwen-research", False),
        ("config.json", '{"_name_or_path": "meta-llama/Llama-3.1-8B"}', "llama3.1", True),
        ("config.json", '{"_name_or_path": "me/mine"}', None, True),
        ("config.json", "[]", None, True),
    ],
)
def test_what_contradicts_a_tag_is_kept_beside_it(
    folder: Path, file: str, text: str, licence: str | None, is_allowed: bool
) -> None:
    """By every door: the gate's for a recipe and `models add`, `licences check`, and `models inspect`."""
    (folder / file).write_text(text)
    model = ModelConfig(name="tiny", source=str(folder), revision=None, licence="apache-2.0", shape=None)
    checked = CliRunner().invoke(app, ["licences", "check", str(folder), "--use", "serve"])
    for judged in (GATE.judge(GATE.of_model(model), "serve"), GATE.judge(GATE.of_folder(folder), "serve")):
        assert set(judged.licences) == {"Apache-2.0", *([licence] if licence else [])}
        assert judged.passes == is_allowed
        assert bool(judged.notes) == (licence is not None), "and it is said why"
        assert all(note in checked.output for note in judged.notes)
    assert isinstance(checked.exception, LicenceRefused) != is_allowed, checked.output
    said = [each.text for each in inspect(folder, GATE.facts).findings if "its card says apache-2.0" in each.text]
    assert len(said) == (licence is not None)
    assert all(file in each and str(licence) in each for each in said)


def test_what_is_declared_is_no_contradiction(folder: Path) -> None:
    """A base's licence may lie beside the model's own, as in what Luthier exports."""
    (folder / "README.md").write_text("---\nlicense: [apache-2.0, cc-by-sa-3.0]\nbase_model: google/gemma-3-1b\n---\n")
    (folder / "LICENSE.CC-BY-SA-3.0.txt").write_text("Attribution-ShareAlike 3.0 Unported")
    (folder / "LICENSE.gemma").write_text("Gemma Terms of Use")
    before = GATE.of_folder(folder)
    assert [each.licence for each in before] == ["apache-2.0 AND cc-by-sa-3.0", "gemma"]


def test_what_luthier_exported_is_judged_by_what_it_says_of_itself(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: ours\n---\n")
    command = ["licences", "check", str(folder)]
    assert isinstance(CliRunner().invoke(app, command).exception, LicenceRefused), "nobody knows `ours`"
    base = BaseModelRef(name="ours", revision="f" * 40, licence="apache-2.0")
    artefacts = (Artefact(kind="base", name="ours", licence="apache-2.0"),)
    made.write(folder, Made(kind="merged", run_id="r1", base=base, artefacts=artefacts))
    assert CliRunner().invoke(app, command).exit_code == 0
    of_others = (*artefacts, Artefact(kind="data", name="lab/rows", licence="cc-by-nc-4.0"))
    made.write(folder, Made(kind="merged", run_id="r1", base=base, artefacts=of_others))
    assert isinstance(CliRunner().invoke(app, command).exception, LicenceRefused), "more than its card can say"
