"""A folder explained: a whole one without a complaint, and each thing that can be wrong by its own finding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cluster import models
from cluster.catalogue import remote_code, tokenizer
from cluster.catalogue.finding import Level
from cluster.catalogue.inspection import Inspection, inspect
from cluster.errors import ModelError
from cluster.licences.facts import load_facts
from jobs.model import load_model, load_tokenizer, skeleton
from scripts.demo.model import Architecture
from serving.config import VllmConfig
from serving.prompts import Prompts
from tests.conftest import TinyModels

FACTS = load_facts()
CARD = "---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-8B\n---\n# A model\n"


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A whole model's folder, with a card and a licence."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_models["qwen3"], copy)
    (copy / "README.md").write_text(CARD)
    (copy / "LICENSE").write_text("Apache License")
    return copy


def look(folder: Path) -> Inspection:
    return inspect(folder, FACTS)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral", "gemma3"])
def test_a_whole_folder_is_explained_without_a_complaint(architecture: Architecture, tiny_models: TinyModels) -> None:
    found = look(tiny_models[architecture])
    assert found.definition
    assert found.weights
    assert [str(each) for each in found.findings if "no card" not in each.text] == []
    assert found.is_usable
    config = AutoConfig.from_pretrained(tiny_models[architecture])
    model = load_model(tiny_models[architecture], "fp32")
    assert found.weights.parameters == model.num_parameters()
    assert (found.definition.context_tokens, found.definition.family) == (
        config.max_position_embeddings, config.model_type,
    )  # fmt: skip
    theirs = AutoTokenizer.from_pretrained(tiny_models[architecture])
    assert (found.tokenizer.vocabulary, found.tokenizer.eos_id) == (len(theirs), theirs.eos_token_id)
    assert found.tokenizer.renders


def test_the_card_says_the_licence_and_what_it_was_made_from(folder: Path) -> None:
    found = look(folder)
    assert (found.licence, found.made_from, found.licence_files) == (
        "apache-2.0",
        ("base Qwen/Qwen3-8B",),
        ("LICENSE",),
    )
    assert found.findings == ()


def edit(file: str, **changed: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file of the folder; None removes one."""

    def do(folder: Path) -> None:
        said = json.loads((folder / file).read_text()) | changed
        (folder / file).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))

    return do


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of the folder."""

    def do(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return do


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def sharded(folder: Path, skip: str = "", index: bool = True) -> None:
    """Two shards in place of one file; the tensor whose name ends in `skip` is in neither."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (place % 2)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in sorted(set(where.values())):
        kept = {name: tensors[name] for name in names if where[name] == file and not (skip and name.endswith(skip))}
        save_file(kept, folder / file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def pickled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def renamed(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "weights.pt")


def own_code(folder: Path) -> None:
    edit("config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})(folder)
    (folder / "modeling_mine.py").write_text("")


def link_out(folder: Path) -> None:
    secret = folder.parent / "credentials"
    secret.write_text("aws_secret_access_key = x")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(secret)


def text_as_size(folder: Path) -> None:
    """Multiplied, it would be a gigabyte of letters."""
    header = json.dumps({"a": {"dtype": "F32", "shape": ["x", 2**30], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


WRONG: dict[str, tuple[Callable[[Path], Any], Level, str, str]] = {
    "no config": (without("config.json"), Level.FAULT, "definition", "no config.json"),
    "no JSON": (write("config.json", "{"), Level.FAULT, "definition", "not valid JSON"),
    "no object": (write("config.json", "[]"), Level.FAULT, "definition", "does not describe a decoder"),
    "nested without end": (write("config.json", "[" * 99999), Level.FAULT, "definition", "not valid JSON"),
    "sizes that are none": (edit("config.json", hidden_size="wide"), Level.FAULT, "definition", "that are none"),
    "too many layers": (
        edit("config.json", num_hidden_layers=10**9), Level.FAULT, "definition", "num_hidden_layers Input should",
    ),
    "a size without end": (
        edit("config.json", vocab_size=10**4000), Level.FAULT, "definition", "vocab_size Input should be less",
    ),
    "a size below zero": (edit("config.json", hidden_size=-1), Level.FAULT, "definition", "hidden_size Input should"),
    "a tensor's size that is text": (text_as_size, Level.FAULT, "weights", "that its shape and type do not give"),
    "a tokenizer that is none": (write("tokenizer.json", '{"model": []}'), Level.FAULT, "tokenizer", "is none of"),
    "not a language model": (
        edit("config.json", architectures=["ViTModel"]), Level.FAULT, "definition", "no causal language model",
    ),
    "quantised": (
        edit("config.json", quantization_config={"quant_method": "gptq"}), Level.FAULT, "definition", "(gptq)",
    ),
    "no weights": (without("model.safetensors"), Level.FAULT, "weights", "no *.safetensors"),
    "cut off": (cut, Level.FAULT, "weights", "where its header says"),
    "a layer missing": (
        weights(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name]),
        Level.FAULT, "weights", "no tensor is of layer 1",
    ),
    "no embedding": (
        weights(lambda tensors: tensors.pop("model.embed_tokens.weight")), Level.FAULT, "weights", "token embedding",
    ),
    "another vocabulary": (edit("config.json", vocab_size=1000), Level.FAULT, "weights", "a vocabulary of 1000"),
    "no head": (edit("config.json", tie_word_embeddings=False), Level.FAULT, "weights", "there is no lm_head"),
    "another size": (edit("config.json", intermediate_size=999), Level.WARNING, "weights", "parameters where"),
    "a tensor missing": (
        lambda folder: sharded(folder, "mlp.up_proj.weight"), Level.FAULT, "weights", "and it is not (2 such tensors)",
    ),
    "a shard missing": (
        lambda folder: (sharded(folder), without("model-00002-of-00002.safetensors")(folder)),
        Level.FAULT, "weights", "model-00002-of-00002.safetensors, which is not there",
    ),
    "no index": (lambda folder: sharded(folder, index=False), Level.FAULT, "weights", "2 shards and no model.safe"),
    "an index that leads out": (
        lambda folder: (sharded(folder), write("model.safetensors.index.json", '{"weight_map": {"a": "/x"}}')(folder)),
        Level.FAULT, "weights", "not one of the folder",
    ),
    "twice": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors"),
        Level.FAULT, "weights", "in consolidated.safetensors and in model.safetensors",
    ),
    "no tokenizer": (without("tokenizer.json"), Level.FAULT, "tokenizer", "neither tokenizer.json nor"),
    "a slow tokenizer": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
        Level.WARNING, "tokenizer", "no tokenizer.json, which says",
    ),
    "no end": (edit("tokenizer_config.json", eos_token=None), Level.WARNING, "tokenizer", "no eos_token"),
    "an unknown end": (edit("tokenizer_config.json", eos_token="<eot>"), Level.FAULT, "tokenizer", "not in the vocab"),
    "padding is the end": (edit("tokenizer_config.json", pad_token="<|im_end|>"), Level.WARNING, "tokenizer", "masks"),
    "ids that disagree": (edit("generation_config.json", eos_token_id=[0]), Level.WARNING, "generation settings", "[0"),
    "an end beyond": (edit("generation_config.json", eos_token_id=[2, 9999]), Level.FAULT, "generation settings", "99"),
    "no template": (without("chat_template.jinja"), Level.WARNING, "chat template", "there is none"),
    "a broken template": (write("chat_template.jinja", "{% for %}"), Level.FAULT, "chat template", "does not render"),
    "a template that refuses": (
        write("chat_template.jinja", "{{ raise_exception('no') }}"), Level.FAULT, "chat template", "assistant: no",
    ),
    "a template that reaches out": (
        write("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        Level.FAULT, "chat template", "unsafe",
    ),
    "a template that drops turns": (
        write("chat_template.jinja", "{{ messages[0].content }}"), Level.WARNING, "chat template", "all of their text",
    ),
    "an end of turn that is none": (
        write("chat_template.jinja", "{% for m in messages %}<|im_start|>{{ m.content }}<|pad|>{% endfor %}"),
        Level.WARNING, "chat template", "ends with '<|pad|>' (id 0)",
    ),
    "no card": (without("README.md"), Level.WARNING, "meta information", "no card"),
    "a card without a licence": (write("README.md", "# Hi"), Level.WARNING, "meta information", "names no licence"),
    "pickled": (pickled, Level.REFUSED, "pickles", "runs whatever code it names; add it with --convert"),
    "pickled under another name": (renamed, Level.REFUSED, "pickles", "only pytorch_model*.bin"),
    "a pickle beside": (write("optimizer.pt", ""), Level.NOTE, "pickles", "left behind"),
    "code of its own": (own_code, Level.REFUSED, "remote code", "running its own code (modeling_mine.Mine"),
    "a tokenizer of its own": (
        lambda folder: (
            edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]})(folder),
            (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
        ),
        Level.REFUSED, "remote code", "the tokenizer ['t.T', None]",
    ),
    "a link out": (link_out, Level.REFUSED, "links", "LICENSE -> "),
    "code that is not needed": (
        edit("config.json", auto_map={"AutoModelForCausalLM": "x.Y"}), Level.NOTE, "remote code", "never run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_found_and_said_with_its_way_out(wrong: str, folder: Path) -> None:
    change, level, part, text = WRONG[wrong]
    change(folder)
    found = look(folder)
    said = [each for each in found.findings if (each.level, each.part) == (level, part)]
    assert any(text in f"{each.text}; {each.fix}" for each in said), list(map(str, found.findings))
    assert all(each.fix for each in found.findings if each.level is not Level.NOTE)
    assert found.is_usable == (level not in (Level.REFUSED, Level.FAULT))
    others = {each.part for each in found.findings if each.level in (Level.REFUSED, Level.FAULT)} - {part}
    assert not others, "one thing is wrong, and another part is blamed"


def test_a_template_that_does_not_end_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for a in range(9999) %}"
    (folder / "chat_template.jinja").write_text(loop * 4 + "{% endfor %}" * 4)
    monkeypatch.setattr(tokenizer, "RENDER_S", 0.3)
    assert ["it takes more than 0.3 s" in each.text for each in look(folder).findings] == [True]


def test_generation_markers_are_seen_and_rendered_through(folder: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    found = look(folder)
    assert found.tokenizer.generation_markers
    assert found.findings == ()


@pytest.fixture
def trap(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model that runs code of its own when it is loaded with trust; the code leaves a trace."""
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w')\nfrom transformers import PretrainedConfig\nclass Mine(PretrainedConfig):\n"
    (folder / "mine.py").write_text(code + "    model_type = 'mine'\n")
    auto_map = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.T", None]}
    edit("config.json", model_type="mine", auto_map=auto_map)(folder)
    edit("tokenizer_config.json", tokenizer_class="T", auto_map=auto_map)(folder)
    return folder, trace


def test_no_door_runs_a_models_code(trap: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, trace = trap
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers asks at a terminal; somebody says yes
    for load in (load_tokenizer, skeleton, lambda path: load_model(path, "fp32"), lambda path: Prompts(path, 100)):
        with pytest.raises((ModelError, ValueError)):
            load(folder)
    assert not trace.exists()
    with pytest.raises(ModelError, match="never done here"):
        models.check_loadable(folder)
    with pytest.raises(ValidationError, match="leave out --trust-remote-code"):
        VllmConfig(arguments="--trust_remote_code")


def test_the_families_that_need_no_code_are_those_of_the_pinned_transformers() -> None:
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= remote_code.NATIVE_FAMILIES
