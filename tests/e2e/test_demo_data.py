"""What the quickstart trains: the text says what it claims, and every model folder loads."""

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cluster.config import load
from cluster.models import ModelConfig, read_shape
from scripts.demo import tasks
from scripts.demo.model import END, PAD, START, Architecture, make_model, make_tokenizer

SPLITS: tuple[tasks.Split, ...] = get_args(tasks.Split)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def data() -> dict[tuple[str, str], list[tasks.Row]]:
    return {(task, split): list(tasks.rows(task, split)) for task in tasks.TASKS for split in SPLITS}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", text))


def speaks_of_an_order(row: tasks.Row) -> bool:
    return "code" not in words(row["messages"][0]["content"])


def pair(row: tasks.Row) -> tuple[str, str]:
    """The person and the city that a row's first message joins."""
    said = words(row["messages"][0]["content"])
    (name,), (city,) = said & set(tasks.NAMES), said & set(tasks.CITIES)
    return name, city


def test_the_files_are_a_function_of_the_seed(tmp_path: Path) -> None:
    tasks.write_all(tmp_path / "here")
    for hash_seed in ("1", "2"):  # another process, and another order of every set in it
        command = [sys.executable, "-m", "scripts.demo.tasks", str(tmp_path / hash_seed)]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed})
    assert digests(tmp_path / "here") == digests(tmp_path / "1") == digests(tmp_path / "2")
    tasks.write_all(tmp_path / "other", seed=1)
    same, other = digests(tmp_path / "here"), digests(tmp_path / "other")
    assert same.keys() == other.keys()
    assert len(same) == 2 * len(tasks.TASKS)
    assert all(same[name] != other[name] for name in same)


def test_writing_again_replaces(tmp_path: Path) -> None:
    tasks.write_all(tmp_path, seed=1)
    tasks.write_all(tmp_path)
    for task in tasks.TASKS:
        for split in SPLITS:
            lines = (tmp_path / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            assert [json.loads(line) for line in lines] == list(tasks.rows(task, split))


def test_every_row_is_a_chat_that_ends_with_an_answer(data: dict[tuple[str, str], list[tasks.Row]]) -> None:
    for (task, split), rows in data.items():
        wanted = tasks.TRAIN_ROWS if split == "train" else tasks.HELDOUT_ROWS
        assert len(rows) == wanted[task]
        for row in rows:
            assert set(row) == {"messages"}
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (
                len(row["messages"]) // 2
            )
            assert all(set(message) == {"role", "content"} for message in row["messages"])
            assert all(message["content"] == message["content"].strip() != "" for message in row["messages"])
            assert not any(re.search(r"\{[a-z]", m["content"]) for m in row["messages"]), "a slot unfilled"


def test_no_person_and_city_are_both_trained_and_held_out(data: dict[tuple[str, str], list[tasks.Row]]) -> None:
    trained, held_out = (
        {pair(row) for task in tasks.TASKS for row in data[task, split] if speaks_of_an_order(row)} for split in SPLITS
    )
    assert not trained & held_out
    for half in (0, 1):  # and yet each of them has been seen, and is asked about
        assert {words[half] for words in trained} == {words[half] for words in held_out}


def test_json_answers_hold_what_the_message_says(data: dict[tuple[str, str], list[tasks.Row]]) -> None:
    for split in SPLITS:
        for row in data["orders-json", split]:
            question, answer = tasks.question_and_answer(row)
            order = json.loads(answer)
            assert list(order) == ["name", "city", "count", "colour", "item", "day"]
            said = words(question[0]["content"])
            order["count"], order["item"] = tasks.COUNTS[order["count"]], f"{order['item']}s"
            assert set(order.values()) <= said


def test_redaction_changes_the_person_and_the_city_and_nothing_else(
    data: dict[tuple[str, str], list[tasks.Row]],
) -> None:
    for split in SPLITS:
        for row in data["redact", split]:
            question, answer = tasks.question_and_answer(row)
            assert not words(answer) & {*tasks.NAMES, *tasks.CITIES}
            pattern = (
                re.escape(answer)
                .replace(r"\[NAME\]", "(?P<name>[A-Z][a-z]+)")
                .replace(r"\[CITY\]", "(?P<city>[A-Z][a-z]+)")
            )
            found = re.fullmatch(pattern, question[0]["content"])
            assert found is not None
            assert found["name"] in tasks.NAMES
            assert found["city"] in tasks.CITIES


def test_base_never_shows_what_the_adapters_learn(data: dict[tuple[str, str], list[tasks.Row]]) -> None:
    for split in SPLITS:
        for row in filter(speaks_of_an_order, data["base", split]):
            answers = " ".join(message["content"] for message in row["messages"])
            assert not set(answers) & set('{}"[]'), answers


def test_codes_are_no_orders(data: dict[tuple[str, str], list[tasks.Row]]) -> None:
    codes = [row for row in data["base", "train"] if not speaks_of_an_order(row)]
    assert len(codes) == pytest.approx(tasks.CODE_SHARE * tasks.TRAIN_ROWS["base"], rel=0.2)
    for question, answer in map(tasks.question_and_answer, codes):
        assert question[0]["content"].endswith(answer)
        with pytest.raises(json.JSONDecodeError):
            json.loads(answer)
    assert all(map(speaks_of_an_order, data["base", "heldout"])), "base is measured on orders alone"


def test_no_token_of_an_order_as_json_is_new_to_base(
    tokenizer: PreTrainedTokenizerFast, data: dict[tuple[str, str], list[tasks.Row]]
) -> None:
    """An adapter cannot move the embeddings, so base must have said every token that it is to say."""

    def said(task: str) -> set[int]:
        turns = [m["content"] for row in data[task, "train"] for m in row["messages"] if m["role"] == "assistant"]
        return {token for ids in tokenizer(turns)["input_ids"] for token in ids}

    assert tokenizer.convert_ids_to_tokens(sorted(said("orders-json") - said("base"))) == []


def test_base_is_asked_every_kind_of_question(data: dict[tuple[str, str], list[tasks.Row]]) -> None:
    kinds = {wording: kind for kind, wordings in tasks.QUESTIONS.items() for wording in wordings}
    asked = []
    for row in data["base", "heldout"]:
        (question,), answer = tasks.question_and_answer(row)
        found = [wording for wording in kinds if question["content"].endswith(wording)]
        asked.append(kinds[found[0]] if found else "thanks")
        assert len(found) <= 1
        assert found or answer.startswith("Thank you, ")
    counts = [asked.count(kind) for kind in (*tasks.QUESTIONS, "thanks")]
    assert min(counts) == max(counts) == len(asked) // len(counts)


def test_no_word_means_two_things() -> None:
    items = [f"{item}s" for item in tasks.ITEMS]
    slots = [*tasks.NAMES, *tasks.CITIES, *items, *tasks.COLOURS, *tasks.DAYS, *tasks.COUNTS.values()]
    assert len(slots) == len(set(slots))
    frames = " ".join([*tasks.MESSAGES, *(wording for wordings in tasks.QUESTIONS.values() for wording in wordings)])
    assert not words(frames) & set(slots)


def test_exact_match() -> None:
    assert tasks.exact_match(["a\n", " b", "c"], ["a", "b", "d"]) == pytest.approx(2 / 3)
    assert tasks.exact_match(["Red"], ["red"]) == 0.0
    for answers, expected in (([], []), (["a"], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match=f"{len(answers)} answers for {len(expected)}"):
            tasks.exact_match(answers, expected)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(KeyError, match="order-json"):
        next(tasks.rows("order-json", "train"))


def test_tokenizer_returns_every_string_of_the_data(
    tokenizer: PreTrainedTokenizerFast, data: dict[tuple[str, str], list[tasks.Row]]
) -> None:
    texts = [message["content"] for rows in data.values() for row in rows for message in row["messages"]]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text


@settings(max_examples=200)
@given(text=st.text())
def test_tokenizer_returns_any_string(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_word_of_an_order_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    slots = [*tasks.NAMES, *tasks.CITIES, *tasks.ITEMS, *tasks.COLOURS, *tasks.DAYS]
    assert [word for word in slots if len(tokenizer(word)["input_ids"]) != 1] == []


def test_chat_template_renders_turns_that_extend_each_other(tokenizer: PreTrainedTokenizerFast) -> None:
    row = next(tasks.rows("base", "train"))
    for end in range(2, len(row["messages"]) + 1, 2):
        prompt = tokenizer.apply_chat_template(row["messages"][: end - 1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["messages"][:end], tokenize=False)
        assert isinstance(prompt, str)
        assert whole == f"{prompt}{row['messages'][end - 1]['content']}{END}\n"
    assert tokenizer(prompt)["input_ids"][0] == tokenizer.convert_tokens_to_ids(START)


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    make_model(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before), "a caller's random state is its own"
    torch.manual_seed(8)
    make_model(tmp_path / "b")
    make_model(tmp_path / "c", seed=1)
    first, again, other = (digests(tmp_path / name) for name in "abc")
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_architecture_loads_and_trains(tmp_path: Path, architecture: Architecture) -> None:
    make_model(tmp_path, architecture=architecture, hidden_size=32, layers=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(model).__name__.lower() == f"{architecture}forcausallm"
    assert model.dtype == torch.float32
    assert model.config.hidden_size == 32
    assert model.config.num_hidden_layers == 2
    assert model.config.num_key_value_heads < model.config.num_attention_heads, "grouped-query attention is shown"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != model.generation_config.pad_token_id

    row = next(tasks.rows("base", "train"))
    batch = tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False), return_tensors="pt")
    loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(("hidden_size", "heads"), [(32, 3), (20, 4)])
def test_a_shape_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, hidden_size: int, heads: int
) -> None:
    with pytest.raises(ValueError, match=f"hidden_size={hidden_size}, heads={heads}"):
        make_model(tmp_path / "m", hidden_size=hidden_size, heads=heads)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["tiny", "tiny-orders"])
def test_the_model_files_state_the_shape_of_the_model_that_is_made(tmp_path: Path, name: str) -> None:
    make_model(tmp_path)
    configs = Path(__file__).parents[2] / "configs" / "models"
    assert load(configs / f"{name}.yaml", ModelConfig).shape == read_shape(tmp_path)
