"""`luthier jobs data show`: what is printed is what is trained on, and faults are by file, line and reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from cluster import cli, models
from cluster.models import ModelConfig
from cluster.store import open_store
from jobs.chat import Renderer, Sample
from jobs.cli import app
from jobs.data.sample import coloured, look, pieces
from jobs.formats import Text
from jobs.rows import Place
from tests.e2e.submit import write_recipe, write_rows

TokenizerOf = Callable[..., PreTrainedTokenizerFast]
ROW = {
    "messages": [
        {"role": "user", "content": "What colour is the sky?"},
        {"role": "assistant", "content": "Blue it is."},
    ]
}


@pytest.fixture
def model(tokenizer_of: TokenizerOf, tmp_path: Path) -> Path:
    tokenizer_of("chatml").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = write_rows(tmp_path / "rows.jsonl", [ROW, {"prompt": "The sky is", "completion": " blue."}, {"nothing": 1}])
    path.write_text("\n" + path.read_text())  # rows and lines are not the same numbers
    return path


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run(app, "luthier jobs", ["data", "show", *map(str, arguments)])
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return run


Show = Callable[..., tuple[int, str, str]]


def test_a_sample_as_the_model_sees_it(show: Show, data: Path, model: Path) -> None:
    code, out, _ = show(data, "--model", model)
    assert code == 0
    assert out.startswith(
        "<|im_start|>user\nWhat colour is the sky?<|im_end|>\n<|im_start|>assistant\n⟦Blue it is.<|im_end|>⟧\n"
    )
    assert out.endswith(f"{data}:2: 21 tokens, 5 learned\n")


def test_json_has_what_the_trainer_gets(show: Show, data: Path, model: Path, tokenizer_of: TokenizerOf) -> None:
    code, out, _ = show(data, "--model", model, "--sample", 2, "--json")
    shown = json.loads(out)
    sample = Renderer(tokenizer_of("chatml"), 512).render(Text("The sky is", " blue."))
    assert isinstance(sample, Sample)
    assert (code, shown["input_ids"], shown["supervised"]) == (0, sample.input_ids, sample.supervised)
    assert (shown["place"], shown["tokens"]) == (f"{data}:3", len(sample.input_ids))
    assert shown["text"] == "The sky is⟦ blue.<|im_end|>⟧"


def test_what_is_cut_is_shown_and_counted(show: Show, data: Path, model: Path) -> None:
    code, out, _ = show(data, "--model", model, "--line", 2, "--length", 18)
    assert code == 0
    assert "⟦Blue it⟧\n--- cut from here ---\n is.<|im_end|>\n" in out
    assert "18 tokens, 2 learned; cut: 3 tokens, 3 of them to learn" in out


def test_learned_is_green_and_control_tokens_are_bold(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of("mistral", "piece")
    shown = look(tokenizer, Place("rows.jsonl", 1), ROW, 512, "error")
    runs = pieces(tokenizer, shown.input_ids, shown.supervised)
    assert [(run.text, run.learned, run.control) for run in runs if run.learned] == [
        (" Blue it is.", True, False),
        ("</s>", True, True),
    ]
    console = Console(force_terminal=True, color_system="standard", width=200, file=None)
    with console.capture() as captured:
        console.print(coloured(runs))
    assert "\x1b[32m Blue it is.\x1b[0m\x1b[1;32m</s>\x1b[0m" in captured.get()


def test_a_recipe_brings_its_model_its_files_and_its_length(
    show: Show, data: Path, model: Path, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", [ROW | {"tools": ""}])
    recipe = write_recipe(tmp_path, model, [data, other], store=f"file://{tmp_path}/store", sequence_length=18)
    assert f"{data}:2: 21 tokens, longer than sequence_length 18" in show(recipe)[2]
    assert f"{other}:1: 18 tokens" in show(recipe, "data.overlong=truncate", "--file", other)[1]
    code, out, _ = show(recipe, "data.overlong=drop")
    assert (code, "left out: 21 tokens, longer than sequence_length 18" in out) == (0, True)
    code, _, err = show(recipe, "--file", "nowhere.jsonl")
    assert (code, "nowhere.jsonl is none of the recipe's" in err) == (2, True)


def test_a_recipes_rules_have_been_at_the_row(show: Show, model: Path, tmp_path: Path) -> None:
    asked, answer = (
        {"role": "user", "content": "My  mail is a.nother@posteo.de"},
        {"role": "assistant", "content": "Hm."},
    )
    key = {"role": "user", "content": "key AKIA" + "QYLPMN5HHHFPZAM2"}  # as AWS writes them
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": [turn, answer]} for turn in (asked, key)])
    recipe = write_recipe(tmp_path, model, [data], store=f"file://{tmp_path}/store")
    rules = ["data.rules.personal.do=mask", "data.rules.secrets.do=refuse", "data.rules.language.do=off"]
    code, out, err = show(recipe, *rules, "--line", 1)
    assert code == 0, err
    assert "a.nother@posteo.de" not in out
    assert "put right: personal (" in out
    code, _, err = show(recipe, *rules, "--line", 2)
    assert code == 2
    assert f"{data}:2: refused by data.rules: secrets" in err
    assert "a.nother@posteo.de" in show(recipe, "--line", 1)[1]


def test_a_row_cannot_command_the_terminal(show: Show, model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "\x1b[2J\x07"}, {"role": "assistant", "content": "Hm.\x9b1A"}]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    code, out, _ = show(data, "--model", model)
    assert code == 0
    assert "␛[2J␇" in out
    assert not set(out) & {"\x1b", "\x07", "\x9b"}


def test_of_a_mirrored_model_the_tokenizer_alone_is_fetched(
    show: Show, data: Path, model: Path, tmp_path: Path
) -> None:
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 8)
    (model / "config.json").write_text(json.dumps(sizes | {"intermediate_size": 8, "model_type": "llama"}))
    (model / "model.safetensors").write_bytes(b"weights")
    config = tmp_path / "base.yaml"
    config.write_text("name: base\nsource: store\nlicence: apache-2.0\n")
    url = f"file://{tmp_path}/store"
    models.mirror(ModelConfig(name="base", source=str(model), licence="apache-2.0"), model, open_store(url))
    for path in (tmp_path / "store").rglob("model.safetensors"):
        path.unlink()
    assert "⟦Blue it is.<|im_end|>⟧" in show(data, "--model", config, "--store", url)[1]
    code, _, err = show(data, "--model", config)
    assert (code, "base is in a store: name it by --store" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--line", 4], "rows.jsonl:4: columns nothing: no known format"),
        (["--line", 1], "rows.jsonl:1: no row starts on this line; the last starts on 4"),
        (["--sample", 9], "rows.jsonl: --sample 9: the file has 3 rows"),
        (["--sample", 1, "--line", 2], "by --sample or by --line, not by both"),
        (["--length", 3], "rows.jsonl:2: no token to learn within sequence_length 3"),
    ],
)
def test_faults_are_by_file_line_and_reason(
    show: Show, data: Path, model: Path, arguments: list[object], told: str
) -> None:
    code, out, err = show(data, "--model", model, *arguments)
    assert (code, out) == (2, "")
    assert told in err


def test_what_is_missing_is_named(show: Show, data: Path, tmp_path: Path) -> None:
    assert "name the model's folder or config" in show(data)[2]
    assert f"{tmp_path}/none is no folder of a model" in show(data, "--model", tmp_path / "none")[2]
    assert "there is no such file" in show(tmp_path / "none.jsonl", "--model", tmp_path)[2]
