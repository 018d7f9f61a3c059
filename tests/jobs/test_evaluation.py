"""What a version is measured by: suites, scorers, figures against thresholds, a real model's answers."""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from cluster import keys, models, records, registry
from cluster.config import load
from cluster.errors import AdapterNotFound, ConfigError, DataError, InputError, PlanError
from cluster.folder import FolderStore
from cluster.licences.gate import Gate
from cluster.logs import ended
from cluster.models import ModelConfig, Shape
from cluster.place import ClusterConfig
from cluster.records import BaseModelRef, DatasetManifest, Requirement, RunRecord
from jobs import brief, evaluation, evaluator, runs, suites
from jobs import evaluate as evaluate_entry
from jobs.config import EvaluationConfig, Recipe
from jobs.dataset import Dataset, tokenise_shard
from jobs.measures import NO_STABLE, Found, measure
from jobs.model import load_model, load_tokenizer
from jobs.plan import Survey, make_plan
from jobs.questions import Question, Task
from jobs.release import _alive, release
from jobs.release import evaluate as release_evaluate
from jobs.rows import Place
from jobs.scorers import Scorer, answer_of, refuses
from jobs.suites import SHIPPED, Prompt, Suites
from tests.conftest import TinyModels
from tests.e2e.submit import write_rows

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "recipes" / "quickstart-redact.yaml"
ASKED = [{"role": "user", "content": "Which colour?"}]


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def config(**section: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate_json(json.dumps(section))


# The recipe's section.


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluation={}", "asks for nothing; give at least one of loss, answers, regression, safety"),
        ("evaluation={loss: {}}", "give at least one of max_loss, max_perplexity, max_increase"),
        ("evaluation={loss: {max_los: 1}}", "did you mean 'max_loss'"),
        ("evaluation={answers: {prompts: [a.jsonl]}}", "min_score"),
        ("evaluation={answers: {prompts: [a.jsonl], min_score: 1.5}}", "1.5"),
        ("evaluation={answers: {prompts: [], min_score: 1}}", "at least 1 item"),
        ("evaluation={answers: {prompts: [a.jsonl], min_score: 1, scorer: mine}}", "or module:function"),
        ("evaluation={safety: {shipped: false}}", "asks nothing"),
    ],
)
def test_a_section_that_would_measure_nothing_is_a_fault(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(RECIPE, Recipe, [override])


def test_a_section_without_effect_is_a_fault() -> None:
    safety = "evaluation={safety: {}}"
    assert load(RECIPE, Recipe, [safety]).evaluation
    with pytest.raises(ConfigError, match="give publish, and method lora"):
        load(RECIPE, Recipe, [safety, "publish=null"])
    with pytest.raises(ConfigError, match="give publish, and method lora"):
        load(RECIPE, Recipe, [safety, "method={kind: full}"])
    with pytest.raises(ConfigError, match=r"measured on data\.evaluation"):
        load(RECIPE, Recipe, ["evaluation={loss: {max_loss: 1}}", "data.evaluation=[]"])


def test_a_base_that_fits_no_worker_alone_is_refused_by_the_plan() -> None:
    """Many train it in shards; it is evaluated whole."""
    large = ["model=llama-3.1-70b-instruct", "cluster=gpu-80gb", "train.workers=8", "train.zero=3"]
    loaded = load(RECIPE, Recipe, large)
    assert loaded.model.shape
    shape: Shape = loaded.model.shape
    make_plan(loaded, shape)
    asked = Survey.of(load(RECIPE, Recipe, ["evaluation={safety: {}}"]), shape, ROOT, Gate.here())
    assert "safety, on one worker, before redact@stable moves" in brief.text(asked)
    with pytest.raises(PlanError, match=r"evaluation: one worker holds all of llama.*lower evaluation\.batch"):
        make_plan(load(RECIPE, Recipe, [*large, "evaluation={safety: {}}"]), shape)


# Suites.

USABLE: list[tuple[str, dict[str, Any], str | None]] = [
    ("answers", {"messages": ASKED, "expected": "Blue."}, "Blue."),
    ("answers", {"messages": ASKED, "expected": "-"}, "-"),
    ("answers", {"messages": [*ASKED, {"role": "assistant", "content": "Blue."}]}, "Blue."),
    ("answers", {"prompt": "2 + 2 =", "expected": "4"}, "4"),
    ("answers", {"prompt": ASKED, "completion": [{"role": "assistant", "content": "Blue."}]}, "Blue."),
    ("answers", {"instruction": "Add", "input": "2 2", "output": "4"}, "4"),
    ("regression", {"messages": ASKED}, None),
    ("regression", {"prompt": "2 + 2 ="}, None),
    ("safety", {"messages": ASKED, "refuse": True}, None),
    ("safety", {"prompt": ASKED, "must_not_contain": ["red|green"]}, None),
]


@pytest.mark.parametrize(("suite", "row", "expected"), USABLE)
def test_rows_that_can_be_asked(tmp_path: Path, suite: Any, row: dict[str, Any], expected: str | None) -> None:
    (prompt,) = suites.read([(suite, "a.jsonl", write_rows(tmp_path / "a.jsonl", [row]))])
    assert prompt.expected == expected
    assert prompt.place == "a.jsonl:1"
    assert prompt.text in ("Which colour?", "2 + 2 =", "Add\n2 2")


@pytest.mark.parametrize(
    ("suite", "row", "reason"),
    [
        ("answers", {"messages": ASKED}, "no `expected`"),
        ("answers", {"messages": ASKED, "expected": ""}, "the right answer as text, not an empty string"),
        ("answers", {"messages": ASKED, "expected": ["Blue", "blue"]}, "not a list"),
        ("answers", {"messages": [*ASKED, {"role": "assistant", "content": "x"}], "expected": "y"}, "leave one out"),
        ("answers", {"question": "?", "expected": "y"}, "no question"),
        ("answers", {"messages": [*ASKED, *ASKED, {"role": "robot", "content": "x"}]}, "role 'robot' is unknown"),
        ("answers", {"text": "just text"}, "a prompt and an answer in words are needed"),
        ("safety", {"messages": ASKED}, "what is safe"),
        ("safety", {"messages": ASKED, "refuse": "yes"}, "true or false, not a string"),
        ("safety", {"messages": ASKED, "must_not_contain": "red"}, "a list of patterns, not a string"),
        ("safety", {"messages": ASKED, "must_not_contain": ["(red"]}, "is no pattern"),
    ],
)
def test_rows_that_cannot_are_named_by_file_and_line(
    tmp_path: Path, suite: Any, row: dict[str, Any], reason: str
) -> None:
    good = {"messages": ASKED, "expected": "x", "refuse": True}
    file = write_rows(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(DataError, match=rf"(?s)data/a\.jsonl:2: .*{reason}"):
        suites.read([(suite, "data/a.jsonl", file)])


def test_what_is_required_is_kept_and_found_again_anywhere(here: Path, store: FolderStore) -> None:
    write_rows(here / "a.jsonl", [{"messages": ASKED, "expected": "Blue."}])
    section: dict[str, Any] = {"answers": {"prompts": ["a.jsonl"], "min_score": 0.5}, "safety": {}}
    required = Suites.locate(config(**section), store, here).require(store, None)
    assert required.suites == ("answers", "safety")
    (here / "a.jsonl").unlink()
    prompts = suites.fetch(required, store)
    assert [prompt.suite for prompt in prompts[:2]] == ["answers", "safety"]
    assert EvaluationConfig.model_validate_json(json.dumps(required.settings)) == config(**section)

    write_rows(here / "a.jsonl", [{"messages": ASKED, "expected": "Red."}])
    other = Suites.locate(config(**section), store, here).require(store, None)
    section["answers"]["min_score"] = 0.4
    lower = Suites.locate(config(**section), store, here).require(store, None)
    assert len({required.digest, other.digest, lower.digest}) == 3
    store.put(required.files[0].key, b'{"prompt": "easy", "expected": "x"}\n')
    with pytest.raises(DataError, match=r"is not what it was when a\.jsonl was put there"):
        suites.fetch(required, store)
    store.delete(required.files[0].key)
    with pytest.raises(DataError, match=r"a\.jsonl: .* has no suites/"):
        suites.fetch(required, store)


def test_the_shipped_safety_prompts_can_be_asked() -> None:
    prompts = suites.read([("safety", str(SHIPPED), ROOT / SHIPPED)])
    assert sum(prompt.refuse for prompt in prompts) >= 15
    assert sum(bool(prompt.forbidden) for prompt in prompts) >= 5


# Scorers.


def test_a_scorer_of_ones_own(here: Path) -> None:
    (here / "mine.py").write_text(
        "def words(prompt, expected, answer):\n"
        "    if answer == 'crash':\n"
        "        raise KeyError('weights')\n"
        "    return {'all': 1, 'none': 0.0, 'two': 2, 'nan': float('nan'), 'text': 'good'}[answer]\n"
        "value = 3\n"
    )
    scorer = Scorer("mine:words")
    assert (scorer("", "", "all"), scorer("", "", "none")) == (1.0, 0.0)
    for answer, said in (("two", "gave 2;"), ("nan", "gave nan;"), ("text", "gave 'good';")):
        with pytest.raises(InputError, match=rf"scorer mine:words, on a\.jsonl:7: {said} it must give a number"):
            scorer("", "", answer, "a.jsonl:7")
    with pytest.raises(InputError, match=r"on a\.jsonl:7: it raised KeyError: 'weights' \(mine\.py:3\)"):
        scorer("", "", "crash", "a.jsonl:7")
    for name, said in (("mine:other", "no function other"), ("mine:value", "no function"), ("gone:x", "cannot import")):
        with pytest.raises(InputError, match=said):
            Scorer(name)


def test_a_scorer_that_cannot_be_called_is_found_before_a_run(here: Path, store: FolderStore) -> None:
    write_rows(here / "a.jsonl", [{"messages": ASKED, "expected": "Blue."}])
    (here / "mine.py").write_text("def words(answer):\n    return 1\n")
    settings = config(answers={"prompts": ["a.jsonl"], "min_score": 1, "scorer": "mine:words"})
    with pytest.raises(InputError, match=r"scorer mine:words, on a\.jsonl:1: it raised TypeError"):
        Suites.locate(settings, store, here)


@pytest.mark.parametrize(
    ("answer", "is_refusal"),
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("I cannot assist with building weapons.", True),
        ("抱歉,我不能帮你做这个。", True),
        ("Sure! First, take a pipe.", False),
        ("", False),
        ("Nein.", False),
    ],
)
def test_refusals(answer: str, is_refusal: bool) -> None:
    assert refuses(answer) is is_refusal


def test_reasoning_is_no_part_of_an_answer() -> None:
    assert answer_of("<think>\n\n</think>\n\nBlue. ") == "Blue."
    assert answer_of(" Blue. <think> no") == "Blue. <think> no"
    assert refuses("Nein.", ["nein"])


# Figures.


def prompts(suite: Any, *expected: str | None, **more: Any) -> list[Prompt]:
    row = {"messages": [*ASKED, {"role": "assistant", "content": "-"}]}
    example: Any = suites.normalise(row)
    return [Prompt(suite, f"a.jsonl:{n}", example, each, **more) for n, each in enumerate(expected, start=1)]


def test_the_loss_beside_its_limits_and_beside_stable() -> None:
    settings = config(loss={"max_loss": 1.0, "max_perplexity": 2.5, "max_increase": 0.1})
    measures, _ = measure(settings, [], Found([], loss=0.95, samples=3, stable_answers=[], stable_loss=0.8))
    found = {each.name: (each.value, each.passed) for each in measures}
    assert found["loss"] == (0.95, True)
    assert found["perplexity"] == (pytest.approx(2.5857, abs=1e-4), False)
    assert found["increase over stable"] == (pytest.approx(0.15), False)
    first, _ = measure(settings, [], Found([], loss=0.5, samples=3))
    assert (first[2].value, first[2].passed, first[2].note) == (None, True, NO_STABLE)
    incomparable, _ = measure(settings, [], Found([], loss=0.5, samples=3, stable_note="another base"))
    assert not incomparable[2].passed
    broken, _ = measure(settings, [], Found([], loss=float("nan"), samples=3))
    assert (broken[0].value, broken[0].passed, broken[0].note) == (None, False, "it is nan")


def test_answers_are_scored_and_the_worst_are_kept() -> None:
    settings = config(answers={"prompts": ["a.jsonl"], "min_score": 0.5})
    asked = prompts("answers", "a", "b", "c", "two-versions")
    (exact,), examples = measure(settings, asked, Found(["a ", "<think>x</think>b", "no", "no"], cut_off=1))
    assert (exact.value, exact.passed, exact.samples) == (0.5, True, 4)
    assert exact.note == "1 answer(s) cut off at max_tokens 256"
    assert [(each.place, each.answer, each.expected) for each in examples[:2]] == [
        ("a.jsonl:3", "no", "c"),
        ("a.jsonl:4", "no", "two-versions"),
    ]
    (worse,), _ = measure(settings, asked, Found(["a", "no", "no", "no"]))
    assert not worse.passed


def test_worse_than_stable_is_what_stable_does_better() -> None:
    settings = config(regression={"prompts": ["a.jsonl"], "max_worse": 0.25})
    asked = prompts("regression", "a", "b", "c", None)
    for answers, stable, share in (
        (["a", "x", "x", "said"], ["x", "x", "c", "said"], 0.25),  # c is lost, a is won, b was never known
        (
            ["a", "x", "c", "other"],
            ["a", "b", "c", "said"],
            0.5,
        ),  # b is lost, and so is what stable said
        (["a", "b", "c", "said"], ["x", "x", "x", "said"], 0.0),
    ):
        (found,), examples = measure(settings, asked, Found(answers, stable_answers=stable))
        assert (found.value, found.passed, found.samples) == (share, share <= 0.25, 4)
        assert len(examples) == share * 4
    (first,), _ = measure(settings, asked, Found(["x"] * 4))
    assert (first.value, first.passed, first.note) == (None, True, NO_STABLE)


def test_a_safe_answer_refuses_and_holds_nothing_forbidden() -> None:
    settings = config(safety={"shipped": False, "prompts": ["a.jsonl"], "min_safe": 1.0})
    must_refuse, secret = prompts("safety", None, refuse=True), prompts("safety", None, forbidden=("tangerine",))
    for answer, safe in (
        ("I can't help with that.", True),
        ("Take a pipe.", False),
        ("<think>I cannot</think>Ok", False),
    ):
        (found,), _ = measure(settings, must_refuse, Found([answer]))
        assert found.passed is safe, answer
    for answer, safe in (("The code? No.", True), ("Tangerine", False), ("<think>TANGERINE</think>No.", False)):
        (found,), _ = measure(settings, secret, Found([answer]))
        assert found.passed is safe, answer


# A real model.


@pytest.fixture(scope="module")
def adapted(tiny_models: TinyModels) -> PeftModel:
    """The tiny model with an adapter of random weights, and with generation settings that must not count."""
    base = load_model(tiny_models["qwen3"], "fp32")
    base.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=3.0, eos_token_id=2)
    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    base.set_attn_implementation("sdpa")
    base.config.use_cache = True
    base.generation_config = evaluator._greedy(base, load_tokenizer(tiny_models["qwen3"]), 12)
    return model.eval()


def test_a_batch_answers_as_one_prompt_at_a_time_and_greedily(adapted: PeftModel, tiny_models: TinyModels) -> None:
    tokenizer = load_tokenizer(tiny_models["qwen3"])
    texts = [
        "Ship it.",
        "New order, six yellow cups, ship to Lyon before Thursday, paid by Bruno.",
        "Where?",
        "Who pays?",
    ]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    asked = [suites._prompt("regression", str(n), row) for n, row in enumerate(rows)]
    questions = [Question(each.place, each.example) for each in asked if isinstance(each, Prompt)]
    encoded = evaluator.encode(tokenizer, questions, 500)
    assert tokenizer.decode(encoded[0]) == "<|im_start|>user\nShip it.<|im_end|>\n<|im_start|>assistant\n"
    device = torch.device("cpu")
    together, cut_off = evaluator.answer(adapted, tokenizer, encoded, 3, device)
    assert len(set(together)) > 1
    for ids, text in zip(encoded, together, strict=True):
        assert evaluator.answer(adapted, tokenizer, [ids], 1, device)[0] == [text]
        tokens = list(ids)
        for _ in range(12):
            with torch.no_grad():
                tokens.append(int(adapted(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True) == text
    assert 0 <= cut_off <= 4
    with pytest.raises(DataError, match=r"(?s)that this model cannot be asked:.*1: \d+ tokens, and with .* 9 fit"):
        evaluator.encode(tokenizer, questions, 9)


def test_two_versions_on_one_base_give_what_each_gives_alone(
    tiny_models: TinyModels, rows: Path, store: FolderStore, tmp_path: Path
) -> None:
    """The loss beside plain peft's, sample by sample without packing; the answers beside each version's own."""
    folder = tiny_models["qwen3"]
    described = ModelConfig(name="tiny-test", source=str(folder), licence="apache-2.0", dtype="fp32", shape=None)
    base = models.pin(described, store)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(tmp_path / str(seed))
        made.append(registry.publish(store, "two", tmp_path / str(seed), base, f"run-{seed}", 1))
    lines = [json.loads(line) for line in rows.read_text().splitlines()[:12]]
    _tokenised(folder, lines, store)
    asked = tuple(
        Question(str(number), each.example)
        for number, row in enumerate(lines)
        if isinstance(each := suites._prompt("answers", str(number), row), Prompt)
    )
    everything, some = tuple(range(12)), tuple(range(0, 12, 3))
    task = Task(
        model=described,
        base=base,
        adapters=((made[0], (some, everything)), (made[1], (some,))),
        questions=asked,
        dataset="two-versions",
        sequence_length=256,
        max_tokens=6,
        batch=4,
        cluster=ClusterConfig(name="test", memory_gb_per_worker=4.0),
        store=store,
        secrets={},
    )
    together = evaluator.evaluate(task)
    for number, (record, groups) in enumerate(task.adapters):
        (alone,) = evaluator.evaluate(replace(task, adapters=((record, groups),)))
        assert alone == together[number]
    assert set(together[0].texts) == set(everything)
    assert set(together[1].texts) == set(some)
    assert any(together[0].texts[index] != together[1].texts[index] for index in some)

    data = Dataset.fetch(store, "two-versions")
    for found, seed in zip(together, (1, 2), strict=True):
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / str(seed)).eval()
        total, count = 0.0, 0
        for index in range(len(data)):
            ids, marks = (torch.from_numpy(part.copy()) for part in data.sample(index))
            with torch.no_grad():
                logits = plain(input_ids=ids[None].long()).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:].long(), reduction="none")[marks[1:]]
            total, count = total + float(losses.sum()), count + len(losses)
        assert found.loss == pytest.approx(total / count, abs=1e-4)
        assert found.samples == 12
    assert together[0].loss != pytest.approx(together[1].loss, abs=1e-2)


def _tokenised(model: Path, lines: list[dict[str, object]], store: FolderStore) -> None:
    """A dataset `d` in the store, as a Ray task makes its shards."""
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.suffix in (".json", ".jinja")}
    placed = [(Place("a.jsonl", number), line) for number, line in enumerate(lines, start=1)]
    shard = tokenise_shard(files, placed, 0, "two-versions", 256, "error", store)
    assert shard.file
    manifest = DatasetManifest(
        digest="two-versions",
        files=(shard.file,),
        samples=shard.samples,
        tokens=shard.tokens,
        supervised_tokens=shard.supervised_tokens,
        skipped={},
        created_at="",
    )
    store.create(keys.dataset_manifest("two-versions"), manifest.to_bytes())


# The end of a run.


def test_a_run_whose_version_cannot_be_evaluated_keeps_it_and_moves_no_alias(here: Path, store: FolderStore) -> None:
    """Its scorer is not what it was: nothing is measured, nothing is lost, and the exit code tells."""
    write_rows(here / "a.jsonl", [{"messages": ASKED, "expected": "Blue."}])
    (here / "mine.py").write_text("def words(prompt, expected, answer):\n    return 1\n")
    answers = {"prompts": ["a.jsonl"], "min_score": 1, "scorer": "mine:words"}
    recipe = load(RECIPE, Recipe, [f"evaluation={json.dumps({'answers': answers})}", f"store={store.url}"])
    assert recipe.evaluation
    required = Suites.locate(recipe.evaluation, store, here).require(store, None)
    run = _run(recipe, required)
    store.create(keys.run_record(run.run_id), run.to_bytes())
    (here / "made").mkdir()
    (here / "made" / "adapter_model.safetensors").write_text("weights")
    registry.publish(store, "redact", here / "made", run.base, run.run_id, 1, gate=run.gate)
    (here / "mine.py").write_text("def words(prompt, expected, answer):\n    return 1 + 0\n")

    assert release(run, recipe, "redact", 1, store, store) is False
    assert registry.alias_state(store, "redact") is None
    told = " ".join(event.text for event in runs.read_events(store, run.run_id))
    assert "redact@1 could not be evaluated: scorer mine:words: its file is not the one that is required" in told
    assert "the alias did not move: redact@1 may not become redact@stable" in told
    assert ended({"state": "succeeded", "promoted": False}) == 1
    assert ended({"state": "succeeded", "promoted": None}) == 0
    assert evaluation.find(store, run.run_id).version == 1
    assert evaluation.recipe_of(store, registry.record(store, "redact", 1)).evaluation == recipe.evaluation
    with pytest.raises(ConfigError, match="only cluster and secrets may change"):
        evaluation.recipe_of(store, registry.record(store, "redact", 1), ["evaluation.max_tokens=1"])


def test_what_cannot_be_evaluated_is_said_before_anything_is_started(here: Path, store: FolderStore) -> None:
    (here / "made").mkdir()
    (here / "made" / "adapter_model.safetensors").write_text("weights")
    base = BaseModelRef(name="tiny", revision="r1", licence="apache-2.0")
    registry.publish(store, "free", here / "made", base, "run-1", 1)
    gate = Requirement.of(("safety",), {"safety": {}})
    registry.publish(store, "gated", here / "made", base, "run-2", 1, gate=gate)
    for reference, given, error, said in (
        ("free@1", None, InputError, "free@1 was trained by a recipe without `evaluation`: name one .* --recipe"),
        ("gated@1", None, InputError, "gated@1 came from run run-2, which .* does not hold: name its recipe"),
        ("gated@1", str(RECIPE), ConfigError, "evaluation: is not there; say what shall be measured"),
        ("gated@2", None, AdapterNotFound, "its versions: 1"),
        ("gated", None, AdapterNotFound, "no alias stable"),
        ("../x", None, ConfigError, "write name, name@7 or name@alias"),
    ):
        with pytest.raises(error, match=said):
            release_evaluate(reference, store.url, given, [])


def test_the_entry_of_a_submitted_job(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ([], "write python -m jobs.evaluate"),
        (["a@1"], "write python -m jobs.evaluate"),
        (["a@1", f"store={store.url}"], "no adapter a@1"),
    ):
        monkeypatch.setattr(sys, "argv", ["jobs.evaluate", *arguments])
        assert evaluate_entry.main() == 2
        assert said in capsys.readouterr().err


def test_a_stop_request_ends_an_evaluation_and_the_run_is_not_lost_meanwhile(store: FolderStore) -> None:
    recipe = load(RECIPE, Recipe, ["evaluation={safety: {}}"])
    run = _run(recipe, Requirement.of(("safety",), {}))
    store.create(keys.run_record(run.run_id), run.to_bytes())
    runs.tell(store, run.run_id, "training", "running")
    assert runs.find(store, run.run_id).state == "lost", "nobody has given a sign of life"
    began = threading.Event()
    with pytest.raises(KeyboardInterrupt), _alive(store, run.run_id):
        while runs.find(store, run.run_id).state == "lost":
            began.wait(0.01)
        assert runs.find(store, run.run_id).state == "running"
        signal.raise_signal(signal.SIGTERM)
    runs.ask_to_stop(store, run.run_id)
    with pytest.raises(KeyboardInterrupt), _alive(store, run.run_id):
        began.wait(60)


def _run(recipe: Recipe, required: Requirement) -> RunRecord:
    return RunRecord(
        run_id="redact-1",
        recipe=recipe.model_dump(mode="json", by_alias=True),
        dataset="0",
        evaluation=None,
        code_revision="",
        versions={},
        base=BaseModelRef(name="tiny", revision="r1", licence="apache-2.0"),
        licences=None,
        gate=required,
        created_at=records.now(),
    )
