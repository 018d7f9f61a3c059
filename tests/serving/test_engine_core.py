"""The core under any order of arrivals, cancels, loads and unloads; and neighbours that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cluster.errors import Overloaded, RequestError, UnknownModel
from serving.engine import kernels
from serving.engine.protocol import SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serving.conftest import CoreDriver, LoraRecipe, TinyModel

    Tiny = Callable[[str], TinyModel]
    Drive = Callable[..., CoreDriver]

LONGEST = 10
ADAPTERS = 7
PROMPT_LENGTHS = (1, 4, 9, 30, 70)


def greedy(max_tokens: int = LONGEST) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> TinyModel:
    """Gemma 3: sliding and full layers, both kinds of rotary table."""
    return tiny("gemma3")


@pytest.fixture(scope="module")
def recipes(every_recipe: tuple[LoraRecipe, ...]) -> tuple[LoraRecipe, ...]:
    """DoRA takes part in everything here."""
    return every_recipe


@pytest.fixture(scope="module", params=["compiler", "no compiler"])
def compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """With our kernels, and without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "no compiler":
            patch.setenv("CC", "no-such-compiler")
        kernels.library.cache_clear()
        assert kernels.are_usable(torch.device("cpu"), torch.float32) == (request.param == "compiler")
        yield
    kernels.library.cache_clear()


@pytest.fixture(scope="module")
def driver(compiler: None, model: TinyModel, drive: Drive) -> CoreDriver:
    """Room for about two long requests at once, three slots for seven adapters, and a queue of four."""
    return drive(model, kv_tokens=160, max_batch_tokens=24, max_running=6, max_waiting=4, max_adapters=3)


def test_what_is_still_to_do_is_told_at_every_step(model: TinyModel, drive: Drive) -> None:
    driver = drive(model, kv_tokens=160, max_batch_tokens=24, max_running=6)
    prompts = {f"r{length}": model.prompt(length, length) for length in PROMPT_LENGTHS}
    for id_, prompt in prompts.items():
        driver.add(id_, prompt, None, greedy())
    stats, waited = driver.core.stats(), 0
    assert (stats.queued_prompt_tokens, stats.running_answer_tokens) == (sum(PROMPT_LENGTHS), 0)
    while driver.core.has_work:
        driver.step()
        stats = driver.core.stats()
        assert stats.queued_prompt_tokens == sum(PROMPT_LENGTHS) - stats.prompt_tokens
        unended = [events for events in driver.events.values() if not events or not events[-1].finish_reason]
        assert stats.waiting_answer_tokens == LONGEST * stats.waiting
        assert stats.waiting_answer_tokens + stats.running_answer_tokens == sum(LONGEST - len(each) for each in unended)
        waited += stats.waiting
    assert waited, "none had to wait: this says nothing of those that do"


def test_prompts_that_wait_count_as_far_as_others_like_them_had_to_be_computed(model: TinyModel, drive: Drive) -> None:
    driver = drive(model, kv_tokens=160, max_batch_tokens=24, max_running=1)
    for number in range(12):
        driver.add(f"before{number}", model.prompt(1, 81), None, greedy(1))
        driver.run()
    before = driver.core.stats().prompt_tokens
    for number in range(5):
        driver.add(f"after{number}", model.prompt(1, 81), None, greedy(1))
    queued = driver.core.stats().queued_prompt_tokens
    driver.run()
    computed = driver.core.stats().prompt_tokens - before
    assert computed <= queued < 5 * 81 / 4


def prompt_of(model: TinyModel, index: int) -> list[int]:
    """The longest begins as the one before it, so that they share blocks."""
    if index == len(PROMPT_LENGTHS) - 1:
        before = prompt_of(model, index - 1)
        return before + model.prompt(index, PROMPT_LENGTHS[index] - len(before))
    return model.prompt(index, PROMPT_LENGTHS[index])


adapters = st.integers(0, ADAPTERS - 1)
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.just(-1) | adapters, st.sampled_from(range(len(PROMPT_LENGTHS))), st.integers(1, LONGEST)
        ),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("load"), adapters),
        st.tuples(st.just("unload"), adapters),
    ),
    min_size=5,
    max_size=40,
)


class Workload:
    """Runs operations on the core beside a plain account of what must be loaded, retiring and in use."""

    def __init__(self, driver: CoreDriver, recipes: tuple[LoraRecipe, ...]) -> None:
        self.driver = driver
        self.recipes = recipes
        self.loaded: set[int] = set()
        self.retiring: set[int] = set()
        self.asked: dict[str, tuple[int, int, int]] = {}
        self.cancelled: set[str] = set()

    def add(self, adapter: int, prompt: int, max_tokens: int) -> None:
        id_ = f"r{len(self.asked)}"
        model = self.driver.model
        digest = None if adapter < 0 else model.digest(self.recipes[adapter])
        before = self.driver.core.stats()
        try:
            self.driver.add(id_, prompt_of(model, prompt), digest, greedy(max_tokens))
        except UnknownModel:
            assert adapter not in self.loaded - self.retiring
        except Overloaded:
            assert before.waiting >= 3  # of four: a queue is not one adapter's alone
        else:
            assert adapter < 0 or adapter in self.loaded - self.retiring
            self.asked[id_] = (adapter, prompt, max_tokens)
            return
        assert self.driver.core.stats() == before

    def cancel(self, index: int) -> None:
        id_ = f"r{index}"
        self.driver.core.cancel(id_)
        if id_ in self.asked and not self.has_ended(id_):
            self.cancelled.add(id_)

    def step(self, count: int) -> None:
        for _ in range(count):
            self.driver.step()
            for adapter in sorted(self.retiring):
                self.unload(adapter)

    def load(self, adapter: int) -> None:
        try:
            taken = self.driver.load(self.recipes[adapter])
        except Overloaded:
            assert len(self.loaded) == 3
            assert adapter not in self.loaded
        else:
            assert taken == (adapter not in self.retiring)
            self.loaded.add(adapter)

    def unload(self, adapter: int) -> None:
        digest = self.driver.model.digest(self.recipes[adapter])
        assert digest is not None
        in_use = any(used == adapter and not self.has_ended(id_) for id_, (used, _, _) in self.asked.items())
        assert self.driver.core.unload(digest) == (not in_use)
        if in_use:
            self.retiring.add(adapter)
        else:
            self.loaded.discard(adapter)
            self.retiring.discard(adapter)

    def has_ended(self, id_: str) -> bool:
        events = self.driver.events[id_]
        return bool(events) and events[-1].finish_reason is not None

    def check(self) -> None:
        """Everything ended, every token is peft's, and nothing is left behind."""
        self.driver.run()
        model = self.driver.model
        for id_, (adapter, prompt, max_tokens) in self.asked.items():
            recipe = None if adapter < 0 else self.recipes[adapter]
            expected = model.expected(recipe, prompt_of(model, prompt), LONGEST)
            ours = self.driver.tokens(id_)
            if id_ in self.cancelled:
                assert self.driver.finish(id_) == "cancelled"
                expected.first(len(ours)).check(ours)
            else:
                assert self.driver.finish(id_) in {"stop", "length"}
                expected.first(max_tokens).check(ours)
        for adapter in range(ADAPTERS):
            self.unload(adapter)
        stats = self.driver.core.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.adapters) == (0, 0, 0, ())


def carry_out(operations: list[tuple[str, ...]], driver: CoreDriver, recipes: tuple[LoraRecipe, ...]) -> None:
    driver.events.clear()
    workload = Workload(driver, recipes)
    for name, *arguments in operations:
        getattr(workload, name)(*arguments)
    workload.check()


@settings(max_examples=60)
@given(operations=operations)
def test_any_workload_gives_each_request_its_own_answer(
    operations: list[tuple[str, ...]], driver: CoreDriver, recipes: tuple[LoraRecipe, ...]
) -> None:
    carry_out(operations, driver, recipes)


@pytest.mark.long
@settings(max_examples=500)
@given(operations=operations)
def test_five_hundred_workloads_give_each_request_its_own_answer(
    operations: list[tuple[str, ...]], driver: CoreDriver, recipes: tuple[LoraRecipe, ...]
) -> None:
    carry_out(operations, driver, recipes)


def test_what_begins_alike_is_computed_once_for_each_adapter(
    model: TinyModel, drive: Drive, recipes: tuple[LoraRecipe, ...]
) -> None:
    driver = drive(model)
    driver.load(recipes[0])
    shared = []
    for id_, recipe in (("first", recipes[0]), ("again", recipes[0]), ("base", None)):
        driver.add(id_, prompt_of(model, 4), model.digest(recipe), greedy())
        driver.run()
        model.expected(recipe, prompt_of(model, 4), LONGEST).check(driver.tokens(id_))
        shared.append(driver.core.stats().shared_tokens)
    assert shared == [0, 68, 68], "of 70 tokens, 17 whole blocks of 4"


def test_adapters_really_change_the_answer(model: TinyModel, recipes: tuple[LoraRecipe, ...]) -> None:
    """Or all of the above would pass with the base alone."""
    for index, length in enumerate(PROMPT_LENGTHS):
        prompt = model.prompt(index, length)
        answers = {tuple(model.expected(recipe, prompt, LONGEST).tokens) for recipe in (None, *recipes)}
        assert len(answers) == 1 + ADAPTERS


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(
    model: TinyModel, drive: Drive, recipes: tuple[LoraRecipe, ...]
) -> None:
    driver = drive(model)
    driver.load(recipes[0])
    params = SamplingParams(max_tokens=20, temperature=1.5, top_p=0.95, top_k=50, seed=-3)
    prompt, digest = model.prompt(2, 30), model.digest(recipes[0])
    driver.add("alone", prompt, digest, params)
    driver.run()
    for index in range(6):
        driver.add(f"noise{index}", model.prompt(index, 12), (None, digest)[index % 2], SamplingParams(max_tokens=25))
    driver.step()
    driver.add("together", prompt, digest, params)
    driver.add("unseeded", prompt, digest, SamplingParams(max_tokens=20, temperature=1.5))
    driver.run()
    assert driver.tokens("together") == driver.tokens("alone")
    assert driver.tokens("unseeded") != driver.tokens("alone")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("broken_one", "part"), [(1, "lora_"), (5, "lora_magnitude_vector")], ids=["lora", "dora"])
def test_an_adapter_whose_logits_are_nan_harms_nobody_else(
    broken_one: int, part: str, model: TinyModel, drive: Drive, recipes: tuple[LoraRecipe, ...], tmp_path: Path
) -> None:
    """Its requests end with an error; neighbours, and later owners of its blocks, answer as ever."""
    driver = drive(model, kv_tokens=160)
    broken = tmp_path / "broken"
    broken.mkdir()
    source = model.adapter(recipes[broken_one])
    (broken / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    # Finite weights, infinite products: every check at loading passes.
    tensors = {
        name: torch.full_like(tensor, 1e30) if part in name else tensor
        for name, tensor in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(tensors, broken / "adapter_model.safetensors")
    driver.load(recipes[0])
    driver.load(recipes[6])
    driver.load_folder("sha256:broken", broken)
    good = {}
    for round_ in range(3):  # short prompts use the stacked product, long ones the product by segment
        for index, length in enumerate((3, 40)):
            driver.add(f"broken{round_}{index}", model.prompt(index, length), "sha256:broken", greedy())
            for recipe in (None, recipes[0], recipes[6]):
                id_ = f"good{round_}{index}{recipe and recipe.seed}"
                good[id_] = (recipe, model.prompt(index, length))
                driver.add(id_, good[id_][1], model.digest(recipe), greedy())
            driver.step()
    driver.run()
    for id_, (recipe, prompt) in good.items():
        model.expected(recipe, prompt, LONGEST).check(driver.tokens(id_))
    for id_ in driver.events.keys() - good.keys():
        assert driver.finish(id_) == "error"
        assert "sha256:broken" in str(driver.events[id_][-1].error)
    assert driver.core.stats().kv_blocks_used == 0


def test_an_adapter_in_use_is_unloaded_last_and_reloaded_after(
    model: TinyModel, drive: Drive, recipes: tuple[LoraRecipe, ...]
) -> None:
    driver = drive(model)
    for recipe in recipes[:2]:
        driver.load(recipe)
    first, second = (str(model.digest(recipe)) for recipe in recipes[:2])
    driver.add("running", model.prompt(1, 4), first, greedy())
    driver.step()
    assert not driver.core.unload(first)
    with pytest.raises(UnknownModel, match=first):
        driver.add("late", model.prompt(1, 4), first, greedy())
    assert not driver.load(recipes[0]), "loaded while it is still being unloaded"
    driver.add("other", model.prompt(1, 4), second, greedy())
    driver.run()
    model.expected(recipes[0], model.prompt(1, 4), LONGEST).check(driver.tokens("running"))
    assert driver.core.unload(first)
    assert driver.core.stats().adapters == (second,)
    assert driver.load(recipes[0])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("length", [4, 40])
def test_another_adapter_under_a_digest_of_before_is_not_the_one_of_before(
    length: int, model: TinyModel, drive: Drive, recipes: tuple[LoraRecipe, ...]
) -> None:
    """Digests should make this impossible; if it happens, nothing of the old one may be left in a stack."""
    driver = drive(model)
    for recipe in (recipes[1], recipes[5], recipes[0], recipes[6], recipes[4]):
        driver.load_folder("sha256:same", model.adapter(recipe))
        driver.add(str(recipe.seed), model.prompt(2, length), "sha256:same", greedy())
        driver.run()
        model.expected(recipe, model.prompt(2, length), LONGEST).check(driver.tokens(str(recipe.seed)))
        assert driver.core.unload("sha256:same")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("first", "second"), [(2, 4), (5, 6)], ids=["lora", "dora"])
def test_who_takes_a_place_on_a_shelf_has_nothing_of_who_left_it(
    first: int, second: int, model: TinyModel, drive: Drive, recipes: tuple[LoraRecipe, ...]
) -> None:
    """Of one rank, the newcomer on other layers; the third keeps the shelf from being cleared."""
    driver = drive(model)
    asked: dict[str, tuple[int, int]] = {}

    def ask(*pairs: tuple[str, int]) -> None:
        for digest, number in pairs:
            driver.load_folder(digest, model.adapter(recipes[number]))
            for seed in range(4):
                id_ = f"r{len(asked)}"
                asked[id_] = number, seed
                driver.add(id_, model.prompt(seed, 5), digest, greedy())
        driver.run()

    ask(("sha256:goes", first), ("sha256:stays", second))
    assert driver.core.unload("sha256:goes")
    ask(("sha256:comes", second), ("sha256:stays", second))
    for id_, (number, seed) in asked.items():
        model.expected(recipes[number], model.prompt(seed, 5), LONGEST).check(driver.tokens(id_))


def test_a_long_prompt_does_not_hold_up_a_running_stream(model: TinyModel, drive: Drive) -> None:
    driver = drive(model, max_batch_tokens=16)
    driver.add("stream", model.prompt(1, 4), None, greedy(30))
    driver.step()
    driver.add("long", model.prompt(4, 200), None, greedy(2))
    for count in range(2, 12):
        driver.step()
        assert len(driver.tokens("stream")) == count
    assert driver.tokens("long") == []
    driver.run()
    model.expected(None, model.prompt(4, 200), 2).check(driver.tokens("long"))


def test_cancel_frees_the_blocks_by_the_next_step(model: TinyModel, drive: Drive) -> None:
    driver = drive(model)
    driver.add("a", model.prompt(1, 30), None, greedy(100))
    driver.step()
    used = driver.core.stats().kv_blocks_used
    driver.core.cancel("a")
    driver.core.cancel("a")
    driver.core.cancel("nobody")
    driver.step()
    assert used == 33  # 30 + 100 - 1 positions in blocks of 4
    assert driver.core.stats().kv_blocks_used == 0
    assert driver.finish("a") == "cancelled"


def test_what_can_never_fit_is_refused_with_the_limit(model: TinyModel, drive: Drive) -> None:
    driver = drive(model, kv_tokens=100, max_batch_tokens=8, max_running=8)
    with pytest.raises(RequestError, match=r"90 tokens and max_tokens 12 are 102, .* memory of 100 tokens"):
        driver.add("a", [5] * 90, None, greedy(12))
    with pytest.raises(RequestError, match="context of 512 tokens"):
        driver.add("a", [5] * 500, None, greedy(13))
    with pytest.raises(RequestError, match="empty"):
        driver.add("a", [], None, greedy())
    with pytest.raises(RequestError, match="384 is not in the model's vocabulary of 384"):
        driver.add("a", [5, 384], None, greedy())
    with pytest.raises(RequestError, match="token -1"):
        driver.add("a", [-1], None, greedy())
    driver.add("a", [5] * 90, None, greedy(11))  # exactly the memory: the last token's keys are never stored
    with pytest.raises(RequestError, match="id a is in use"):
        driver.add("a", [5], None, greedy())
    driver.run()
    assert driver.finish("a") in {"stop", "length"}


def test_stop_string_over_several_tokens_ends_the_text_before_it(model: TinyModel, drive: Drive) -> None:
    driver = drive(model)
    prompt = model.prompt(3, 9)
    driver.add("free", prompt, None, greedy(40))
    driver.run()
    text = driver.text("free")
    stop = text[9:14]
    assert len(stop) == 5
    driver.add("stopped", prompt, None, SamplingParams(max_tokens=40, temperature=0, stop=("never this", stop)))
    driver.run()
    assert driver.text("stopped") == text[: text.index(stop)]
    assert driver.finish("stopped") == "stop"
    assert driver.tokens("stopped") == driver.tokens("free")[: len(driver.tokens("stopped"))]
    assert len(driver.tokens("stopped")) < len(driver.tokens("free"))


def test_logprobs_are_the_models_own(model: TinyModel, drive: Drive) -> None:
    driver = drive(model)
    prompt = model.prompt(3, 9)
    driver.add("a", prompt, None, SamplingParams(max_tokens=5, temperature=2.0, top_k=3, seed=1, logprobs=4))
    driver.add("b", prompt, None, SamplingParams(max_tokens=5, temperature=0, logprobs=0))
    driver.run()
    ids = torch.tensor([prompt + driver.tokens("a")])
    with torch.inference_mode():
        logprobs = model.load()(ids).logits[0].log_softmax(-1)
    for place, event in enumerate(driver.events["a"]):
        row = logprobs[len(prompt) - 1 + place]
        assert event.logprob is not None
        assert event.logprob.logprob == pytest.approx(float(row[event.token_id]), abs=1e-4)
        best = row.topk(4)
        assert [each.token_id for each in event.top_logprobs] == best.indices.tolist()
        assert [each.logprob for each in event.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(event.logprob is not None and event.top_logprobs == () for event in driver.events["b"])
