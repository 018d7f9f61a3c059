"""The engine as the replica sees it: asyncio streams over a real thread, adapters coming and going under load."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.errors import AdapterRefused, Overloaded, RequestError, UnknownModel
from serving.engine.native import NativeEngine, NativeOptions
from serving.engine.protocol import Engine, GenerationRequest, SamplingParams, TokenEvent, TokenStream

if TYPE_CHECKING:
    from tests.serving.conftest import LoraRecipe, TinyModel

    Tiny = Callable[[str], TinyModel]
    Recipes = tuple[LoraRecipe, ...]

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> TinyModel:
    return tiny("qwen3")


@contextmanager
def serving(model: TinyModel, **changes: Any) -> Iterator[NativeEngine]:
    limits = {"kv_tokens": 2048, "block_tokens": 8, "max_batch_tokens": 64, "max_running": 16}
    engine = NativeEngine(model.folder, NativeOptions(**{**limits, **changes}))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def greedy(id_: str, prompt: list[int], adapter: str | None = None, max_tokens: int = MAX_TOKENS) -> GenerationRequest:
    return GenerationRequest(id_, prompt, adapter, SamplingParams(max_tokens=max_tokens, temperature=0))


async def collect(stream: TokenStream) -> list[TokenEvent]:
    return [event async for event in stream]


async def tokens_of(engine: Engine, request: GenerationRequest) -> list[int]:
    return [event.token_id for event in await collect(engine.submit(request)) if event.token_id is not None]


async def load(engine: Engine, model: TinyModel, recipe: LoraRecipe) -> str:
    digest = model.digest(recipe)
    assert digest is not None
    await engine.load_adapter(digest, model.adapter(recipe))
    return digest


def endless_prompt(model: TinyModel, recipe: LoraRecipe | None, max_tokens: int) -> list[int]:
    """A prompt whose greedy answer does not end before `max_tokens`."""
    prompts = (model.prompt(seed, 6) for seed in range(100))
    return next(each for each in prompts if len(model.expected(recipe, each, max_tokens).tokens) == max_tokens)


def test_32_requests_over_all_adapters_and_the_base(model: TinyModel, every_recipe: Recipes) -> None:
    choices = (None, *every_recipe)
    jobs = [(choices[index % 8], model.prompt(index % 7, 3 + 9 * (index % 7))) for index in range(32)]

    async def client(engine: Engine, index: int, turns: int) -> list[int]:
        for _ in range(turns):
            await asyncio.sleep(0)
        recipe, prompt = jobs[index]
        return await tokens_of(engine, greedy(str(index), prompt, model.digest(recipe)))

    async def main(engine: Engine) -> list[list[int]]:
        for recipe in every_recipe:
            await load(engine, model, recipe)
        turns = random.Random(3)
        return await asyncio.gather(*(client(engine, index, turns.randrange(50)) for index in range(32)))

    with serving(model) as engine:
        answers = asyncio.run(main(engine))
        stats = engine.stats()
    for (recipe, prompt), answer in zip(jobs, answers, strict=True):
        model.expected(recipe, prompt, MAX_TOKENS).check(answer)
    assert stats.requests == 32
    assert stats.prompt_tokens == sum(len(prompt) for _, prompt in jobs)
    assert stats.generated_tokens == sum(map(len, answers))
    assert stats.mixed_steps > 0
    assert stats.max_adapters_in_step >= 3
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert stats.alive


def test_adapters_come_and_go_under_a_running_stream(model: TinyModel, recipes: Recipes) -> None:
    prompt = endless_prompt(model, recipes[0], 150)

    async def main(engine: Engine) -> None:
        first = await load(engine, model, recipes[0])
        stream = engine.submit(greedy("long", prompt, first, 150))
        events = [await anext(stream)]
        for recipe in recipes[1:]:
            digest = await load(engine, model, recipe)
            model.expected(recipe, prompt, 3).check(await tokens_of(engine, greedy("short", prompt, digest, 3)))
            await engine.unload_adapter(digest)
            with pytest.raises(UnknownModel, match=digest):
                engine.submit(greedy("gone", prompt, digest))
        events += await collect(stream)
        model.expected(recipes[0], prompt, 150).check([event.token_id or 0 for event in events])
        assert events[-1].finish_reason == "length"

    with serving(model, max_adapters=2) as engine:
        asyncio.run(main(engine))
        assert engine.stats().max_adapters_in_step == 2


def test_unload_refuses_new_requests_at_once_and_waits_for_running_ones(model: TinyModel, recipes: Recipes) -> None:
    prompt = endless_prompt(model, recipes[0], 150)

    async def main(engine: Engine) -> None:
        digest = await load(engine, model, recipes[0])
        stream = engine.submit(greedy("running", prompt, digest, 150))
        events = [await anext(stream)]
        unloading = asyncio.create_task(engine.unload_adapter(digest))
        while True:  # the refusal begins within a step
            events.append(await anext(stream))
            try:
                events += await collect(engine.submit(greedy(f"late{len(events)}", prompt, digest, 1)))
            except UnknownModel:
                break
        assert not unloading.done()
        reloading = asyncio.create_task(load(engine, model, recipes[0]))
        rest = await collect(stream)
        assert rest[-1].finish_reason == "length"
        await unloading
        await reloading
        assert engine.stats().adapters == (digest,)
        model.expected(recipes[0], prompt, 4).check(await tokens_of(engine, greedy("again", prompt, digest, 4)))
        await engine.unload_adapter("sha256:never-loaded")

    with serving(model) as engine:
        asyncio.run(main(engine))


@pytest.mark.parametrize("how", ["cancel", "aclose", "task", "break"])
def test_a_client_that_goes_away_frees_its_blocks(how: str, model: TinyModel) -> None:
    prompt = endless_prompt(model, None, 400)

    async def leave(engine: Engine) -> None:
        stream = engine.submit(greedy("gone", prompt, None, 400))
        await anext(stream)
        if how == "cancel":
            engine.cancel("gone")
            assert (await collect(stream))[-1].finish_reason == "cancelled"
        elif how == "aclose":
            await stream.aclose()
            assert await collect(stream) == []
        elif how == "task":
            task = asyncio.create_task(collect(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async with aclosing(stream) as events:
                async for _ in events:
                    break

    async def main(engine: Engine) -> None:
        await leave(engine)
        await tokens_of(engine, greedy("next", [7], None, 2))  # two steps later
        assert engine.stats().kv_blocks_used == 0
        assert engine.stats().generated_tokens < 400

    with serving(model) as engine:
        asyncio.run(main(engine))


def test_a_closed_asyncio_loop_does_not_hurt_the_engine(model: TinyModel) -> None:
    prompt = endless_prompt(model, None, 400)

    async def abandon(engine: Engine) -> None:
        engine.submit(greedy("abandoned", prompt, None, 400))

    with serving(model) as engine:
        asyncio.run(abandon(engine))
        answers: dict[int, list[int]] = {}

        def client(index: int) -> None:
            answers[index] = asyncio.run(tokens_of(engine, greedy(f"c{index}", prompt, None, 30)))

        threads = [threading.Thread(target=client, args=(index,)) for index in range(3)]  # three loops at once
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in range(3):
            model.expected(None, prompt, 30).check(answers[index])
        assert engine.stats().kv_blocks_used == 0
        assert engine.stats().alive


def test_errors_come_at_submit_before_any_token(model: TinyModel, recipes: Recipes, tmp_path: Path) -> None:
    prompt = endless_prompt(model, None, 400)

    async def main(engine: Engine) -> None:
        with pytest.raises(UnknownModel, match="sha256:none is not loaded"):
            engine.submit(greedy("a", prompt, "sha256:none"))
        with pytest.raises(RequestError, match="kv_tokens"):
            engine.submit(greedy("a", prompt, None, 500))
        with pytest.raises(AdapterRefused, match=r"adapter_config\.json is missing"):
            await engine.load_adapter("sha256:empty", tmp_path)
        await load(engine, model, recipes[0])
        await load(engine, model, recipes[0])
        with pytest.raises(Overloaded, match="all 1 adapter slots"):
            await load(engine, model, recipes[1])
        running = engine.submit(greedy("running", prompt, None, 400))
        await anext(running)
        waiting = [engine.submit(greedy(f"w{index}", prompt, None, 1)) for index in range(2)]
        with pytest.raises(Overloaded, match="max_waiting"):
            engine.submit(greedy("w2", prompt, None, 1))
        assert engine.stats().waiting == 2
        await running.aclose()
        for stream in waiting:
            assert (await collect(stream))[-1].finish_reason in {"length", "stop"}

    with serving(model, kv_tokens=440, max_running=1, max_waiting=2, max_adapters=1) as engine:
        asyncio.run(main(engine))


def test_a_step_that_breaks_ends_its_requests_and_not_the_engine(
    model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault is put into a real layer: the third forward pass raises."""
    prompt = endless_prompt(model, None, 400)
    passes = 0

    def fault(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise torch.OutOfMemoryError("no memory left (injected)")

    async def main(engine: Engine) -> None:
        events = await collect(engine.submit(greedy("struck", prompt, None, 400)))
        assert events[-1].finish_reason == "error"
        assert "no memory left (injected)" in str(events[-1].error)
        assert [event.token_id for event in events[:-1]] == model.expected(None, prompt, 2).tokens
        model.expected(None, prompt, 5).check(await tokens_of(engine, greedy("next", prompt, None, 5)))

    with serving(model) as engine:
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: fault() if type(module).__name__ == "Qwen3Model" else None
        )
        try:
            asyncio.run(main(engine))
        finally:
            hook.remove()
        assert engine.stats().kv_blocks_used == 0
    assert "a step of 1 requests broke" in caplog.text


def test_stop_ends_every_stream_and_says_why(model: TinyModel, recipes: Recipes) -> None:
    prompt = endless_prompt(model, recipes[0], 400)

    async def main(engine: Engine) -> None:
        digest = await load(engine, model, recipes[0])
        streams = [engine.submit(greedy(str(index), prompt, digest, 400)) for index in range(3)]
        await anext(streams[0])
        unloading = asyncio.create_task(engine.unload_adapter(digest))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.stop)
        for stream in streams:
            events = await collect(stream)
            assert events[-1].finish_reason == "error"
            assert "it was stopped" in str(events[-1].error)
        with pytest.raises(Overloaded, match="stopped"):
            await unloading
        with pytest.raises(Overloaded, match="stopped"):
            engine.submit(greedy("late", prompt))

    with serving(model) as engine:
        asyncio.run(main(engine))
        engine.stop()
        stats = engine.stats()
        assert not stats.alive
        assert (stats.running, stats.kv_blocks_used) == (0, 0)


def test_an_engine_that_was_not_started_says_so(model: TinyModel) -> None:
    engine = NativeEngine(model.folder, NativeOptions())

    async def main() -> None:
        with pytest.raises(Overloaded, match="not started"):
            engine.submit(greedy("a", [5]))
        with pytest.raises(Overloaded, match="not started"):
            await engine.load_adapter("d", model.folder)

    asyncio.run(main())
    assert not engine.stats().alive
    engine.stop()
