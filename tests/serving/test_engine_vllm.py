"""vLLM as the engine, for real: judged as the native engine is, by peft and transformers, and then killed.

`scripts/test --vllm` makes its environment and runs this; where that is missing, the tests are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from peft import PeftModel

from cluster.errors import AdapterRefused, ModelError, Overloaded, RequestError, UnknownModel
from serving.engine.protocol import Engine, GenerationRequest, SamplingParams, TokenEvent, TokenStream
from serving.engine.vllm import VllmEngine
from serving.engine.vllm_command import VllmOptions, find_python
from tests.serving.conftest import RECIPES, LoraRecipe, TinyModel, make_tokenizer

if TYPE_CHECKING:
    Recipes = tuple[LoraRecipe, ...]

try:
    PYTHON = find_python(None)
except ModelError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

MAX_TOKENS = 12
LONG = 400  # tokens of an answer that runs while something else happens
VERY_LONG = 3500  # tokens of an answer that is left: vLLM needs some milliseconds for a token, and some to notice
CONTEXT = 3600
DEADLINE_S = 300.0  # of what must happen; only a failure takes it
LIMITS: dict[str, Any] = {"kv_bytes": 2**26, "max_context": CONTEXT, "max_running": 8, "max_waiting": 40}
LIMITS |= {"max_batch_tokens": 64, "max_adapters": 6, "max_rank": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """vLLM's attention on CPUs takes heads of 32 and more."""
    return TinyModel(tmp_path_factory.mktemp("vllm"), "qwen3", head_dim=32, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def engine(model: TinyModel) -> Iterator[VllmEngine]:
    """One engine for all tests of this file, with all adapters.."""
    engine = VllmEngine(model.folder, VllmOptions(python=PYTHON, **LIMITS))
    engine.start()
    for recipe in RECIPES:
        asyncio.run(engine.load_adapter(digest_of(model, recipe), model.adapter(recipe)))
    yield engine
    engine.stop()


def digest_of(model: TinyModel, recipe: LoraRecipe) -> str:
    digest = model.digest(recipe)
    assert digest is not None
    return digest


def greedy(id_: str, prompt: list[int], adapter: str | None = None, max_tokens: int = MAX_TOKENS) -> GenerationRequest:
    return GenerationRequest(id_, prompt, adapter, SamplingParams(max_tokens=max_tokens, temperature=0))


async def collect(stream: TokenStream) -> list[TokenEvent]:
    return [event async for event in stream]


async def tokens_of(engine: Engine, request: GenerationRequest) -> list[int]:
    return [event.token_id for event in await collect(engine.submit(request)) if event.token_id is not None]


def endless_prompt(model: TinyModel, recipe: LoraRecipe | None, max_tokens: int) -> list[int]:
    """A prompt whose greedy answer does not end before `max_tokens`."""
    prompts = (model.prompt(seed, 6) for seed in range(100))
    return next(each for each in prompts if len(model.expected(recipe, each, max_tokens).tokens) == max_tokens)


async def check_answers(engine: Engine, model: TinyModel, count: int) -> list[list[int]]:
    """`count` requests at once, over the base and all adapters, are answered as peft answers each alone."""
    choices = (None, *RECIPES)
    jobs = [(choices[index % 6], model.prompt(index % 7, 3 + 9 * (index % 7))) for index in range(count)]
    requests = [greedy(f"c{index}", prompt, model.digest(recipe)) for index, (recipe, prompt) in enumerate(jobs)]
    answers = await asyncio.gather(*(tokens_of(engine, request) for request in requests))
    for (recipe, prompt), answer in zip(jobs, answers, strict=True):
        model.expected(recipe, prompt, MAX_TOKENS).check(answer)
    return list(answers)


def counted(engine: VllmEngine, name: str) -> float:
    """One of vLLM's own metrics."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(engine._life.server.socket))) as client:
        lines = client.get("http://vllm/metrics").text.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)]
    assert values, f"{name} is not among vLLM's metrics"
    return sum(values)


def wait_until_idle(engine: VllmEngine) -> None:
    """Until vLLM computes nothing any more. It counts when it computes, so it is asked for a token each time."""
    asyncio.run(tokens_of(engine, greedy("idle", [5], None, 1)))
    while counted(engine, "vllm:num_requests_running"):
        asyncio.run(tokens_of(engine, greedy("idle", [5], None, 1)))


def descendants(pid: int) -> dict[int, str]:
    """Processes below `pid`, each with its command line."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {each: Path(f"/proc/{each}/cmdline").read_text().replace("\0", " ") for each in found - {pid}}


def wait_until_gone(handles: list[int]) -> None:
    """`handles` are pidfds: readable when their process has ended."""
    for handle in handles:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000), "a process is still there"
        os.close(handle)


def test_48_requests_over_five_adapters_and_the_base(engine: VllmEngine, model: TinyModel) -> None:
    before = engine.stats()
    answers = asyncio.run(check_answers(engine, model, 48))
    after = engine.stats()
    assert after.requests - before.requests == 48
    assert after.generated_tokens - before.generated_tokens == sum(map(len, answers))
    assert after.prompt_tokens - before.prompt_tokens == sum(3 + 9 * (index % 7) for index in range(48))
    assert (after.running, after.waiting, after.alive) == (0, 0, True)
    assert set(after.adapters) == {model.digest(recipe) for recipe in RECIPES}


@pytest.mark.parametrize("recipe", [None, RECIPES[4]], ids=["base", "adapter"])
def test_logprobs_are_those_of_the_raw_distribution(
    recipe: LoraRecipe | None, engine: VllmEngine, model: TinyModel
) -> None:
    prompt = model.prompt(5, 20)
    params = SamplingParams(max_tokens=8, temperature=1.7, top_k=9, seed=4, logprobs=3)
    request = GenerationRequest("a", prompt, model.digest(recipe), params)

    async def main() -> list[TokenEvent]:
        return await collect(engine.submit(request))

    events = asyncio.run(main())
    tokens = [event.token_id for event in events]
    judge = model.load() if recipe is None else PeftModel.from_pretrained(model.load(), model.adapter(recipe)).eval()
    with torch.inference_mode():
        logits = judge(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.float().log_softmax(-1)
    assert len(events) == 8 or tokens[-1] == 1
    for event, row in zip(events, expected, strict=True):
        assert event.logprob is not None
        assert event.logprob.token_id == event.token_id
        assert event.logprob.logprob == pytest.approx(float(row[event.token_id]), abs=1e-3)
        best = row.topk(3).values.tolist()
        assert [each.logprob for each in event.top_logprobs] == pytest.approx(best, abs=1e-3)


def test_a_seed_repeats_its_draws_whatever_else_runs(engine: VllmEngine, model: TinyModel) -> None:
    prompt = model.prompt(3, 9)

    def drawn(id_: str, seed: int | None) -> GenerationRequest:
        return GenerationRequest(id_, prompt, None, SamplingParams(max_tokens=16, temperature=1.5, seed=seed))

    async def main() -> None:
        alone = await tokens_of(engine, drawn("alone", 11))
        others = [drawn(f"o{index}", None) for index in range(6)]
        crowd = await asyncio.gather(*(tokens_of(engine, each) for each in [*others, drawn("again", 11)]))
        assert crowd[-1] == alone
        assert await tokens_of(engine, drawn("modulo", 11 + 2**63)) == alone
        assert await tokens_of(engine, drawn("another", 12)) != alone
        assert len({tuple(each) for each in crowd}) == 7, "without a seed, draws are fresh"

    asyncio.run(main())


@pytest.fixture(scope="module")
def very_long(engine: VllmEngine, model: TinyModel) -> list[int]:
    """A prompt whose greedy answer goes on for VERY_LONG tokens, as found by asking."""

    async def find() -> list[int]:
        for seed in range(100):
            prompt = model.prompt(seed, 6)
            if len(await tokens_of(engine, greedy("a", prompt, None, VERY_LONG))) == VERY_LONG:
                return prompt
        raise AssertionError("no prompt is answered for that long")

    return asyncio.run(find())


def test_a_stop_string_ends_the_text_and_the_request(
    engine: VllmEngine, model: TinyModel, very_long: list[int]
) -> None:
    whole = make_tokenizer().decode(model.expected(None, very_long, 100).tokens, skip_special_tokens=True)
    stop = next(whole[at : at + 3] for at in range(40, 90) if "\ufffd" not in whole[at : at + 3])
    params = SamplingParams(max_tokens=VERY_LONG, temperature=0, stop=(stop, "never said"))

    async def main() -> None:
        events = await collect(engine.submit(GenerationRequest("a", very_long, None, params)))
        assert "".join(event.text for event in events) == whole[: whole.index(stop)]
        assert events[-1].finish_reason == "stop"
        assert len(events) <= 100

    generated = counted(engine, "vllm:generation_tokens_total")
    asyncio.run(main())
    wait_until_idle(engine)
    assert counted(engine, "vllm:generation_tokens_total") - generated < VERY_LONG


@pytest.mark.parametrize("how", ["cancel", "aclose", "task", "break", "loop"])
def test_a_client_that_goes_away_stops_the_work(how: str, engine: VllmEngine, very_long: list[int]) -> None:
    async def main() -> None:
        stream = engine.submit(greedy("gone", very_long, None, VERY_LONG))
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
        elif how == "break":
            async with aclosing(stream) as events:
                async for _ in events:
                    break
        # else the loop closes with the stream in its middle

    generated = counted(engine, "vllm:generation_tokens_total")
    asyncio.run(main())
    wait_until_idle(engine)
    assert counted(engine, "vllm:generation_tokens_total") - generated < VERY_LONG
    assert engine.stats().running == 0


def test_unload_refuses_new_requests_at_once_and_waits_for_running_ones(engine: VllmEngine, model: TinyModel) -> None:
    prompt = endless_prompt(model, RECIPES[0], LONG)
    digest = digest_of(model, RECIPES[0])

    async def main() -> None:
        stream = engine.submit(greedy("running", prompt, digest, LONG))
        events = [await anext(stream)]
        unloading = asyncio.create_task(engine.unload_adapter(digest))
        while True:
            events.append(await anext(stream))
            try:
                await collect(engine.submit(greedy(f"late{len(events)}", prompt, digest, 1)))
            except UnknownModel:
                break
        assert not unloading.done()
        reloading = asyncio.create_task(engine.load_adapter(digest, model.adapter(RECIPES[0])))
        events += await collect(stream)
        assert events[-1].finish_reason == "length"
        model.expected(RECIPES[0], prompt, LONG).check([event.token_id or 0 for event in events])
        await unloading
        await reloading
        assert digest in engine.stats().adapters
        await engine.unload_adapter("sha256:never-loaded")
        await check_answers(engine, model, 12)

    asyncio.run(main())


def test_the_base_stays_the_base_however_many_adapters_have_come_and_gone(engine: VllmEngine, model: TinyModel) -> None:
    """On a CPU vLLM 0.32 gives rows without an adapter the last slot's, once all are filled (vllm_zero.py)."""

    async def main() -> None:
        for recipe in RECIPES * 2:
            await engine.unload_adapter(digest_of(model, recipe))
            await engine.load_adapter(digest_of(model, recipe), model.adapter(recipe))
        await check_answers(engine, model, 24)

    asyncio.run(main())


def test_errors_come_at_submit_before_any_token(engine: VllmEngine, model: TinyModel) -> None:
    prompt = endless_prompt(model, None, LONG)

    async def main() -> None:
        for request, said in (
            (greedy("a", prompt, "sha256:none"), "sha256:none is not loaded"),
            (greedy("a", []), "empty"),
            (greedy("a", [5, 384]), "token 384 is not in the model's vocabulary of 384"),
            (greedy("a", prompt, None, CONTEXT - 5), "more than the context of 3600"),
        ):
            with pytest.raises(RequestError, match=said):
                engine.submit(request)
        streams = [engine.submit(greedy(str(index), prompt, None, LONG)) for index in range(48)]
        with pytest.raises(RequestError, match="request id 0 is in use"):
            engine.submit(greedy("0", prompt))
        with pytest.raises(Overloaded, match="40 requests wait already"):
            engine.submit(greedy("a", prompt))
        assert (engine.stats().running, engine.stats().waiting) == (8, 40)
        for stream in streams:
            await stream.aclose()
        # Another id: one that was cancelled is free once vLLM has let go of it.
        model.expected(None, prompt, 5).check(await tokens_of(engine, greedy("after", prompt, None, 5)))

    asyncio.run(main())


def test_an_adapter_that_vllm_cannot_use_is_refused_with_its_reason(
    engine: VllmEngine, model: TinyModel, tmp_path: Path
) -> None:
    def changed(name: str, **changes: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(model.adapter(RECIPES[0]), folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return folder

    async def main() -> None:
        for folder, said in (
            (changed("dora", use_dora=True), "DoRA"),
            (changed("high", r=16), "rank 16 is greater than max_lora_rank 8"),
            (tmp_path, "refuses adapter sha256:bad"),
        ):
            with pytest.raises(AdapterRefused, match=said):
                await engine.load_adapter("sha256:bad", folder)
        assert "sha256:bad" not in engine.stats().adapters
        good = changed("good")
        await engine.load_adapter("sha256:sixth", good)
        shutil.rmtree(good)  # the engine's own links stay
        with pytest.raises(Overloaded, match="all 6 adapter slots"):
            await engine.load_adapter("sha256:seventh", model.adapter(RECIPES[1]))
        prompt = model.prompt(2, 12)
        model.expected(RECIPES[0], prompt, 8).check(await tokens_of(engine, greedy("a", prompt, "sha256:sixth", 8)))

    asyncio.run(main())


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "vllm.entrypoints.openai.api_server"])
def test_vllm_comes_back_after_it_was_killed(
    victim: str, engine: VllmEngine, model: TinyModel, very_long: list[int]
) -> None:
    """Its core, which its API server must notice, and the API server itself."""

    async def main() -> None:
        streams = [engine.submit(greedy(f"r{index}", very_long, None, VERY_LONG)) for index in range(3)]
        for stream in streams:
            await anext(stream)
        family = descendants(os.getpid())
        (target,) = (pid for pid, line in family.items() if victim in line and "guard.py" not in line)
        os.kill(target, signal.SIGKILL)
        for stream in streams:
            last = (await collect(stream))[-1]
            assert last.finish_reason == "error"
            assert "vLLM" in str(last.error)
        assert engine.stats().running == 0
        refusals = await until_served(engine)
        assert {error.retry_after_s for error in refusals} == {10}
        assert all("is being restarted" in str(error) for error in refusals)
        await check_answers(engine, model, 24)
        prompt = model.prompt(2, 12)
        model.expected(RECIPES[0], prompt, 8).check(await tokens_of(engine, greedy("again", prompt, "sha256:sixth", 8)))

    asyncio.run(main())
    assert engine.stats().alive


async def until_served(engine: Engine) -> list[Overloaded]:
    """Ask until it answers; gives the refusals on the way."""
    refusals: list[Overloaded] = []
    while True:
        try:
            events = await collect(engine.submit(greedy("ask", [5], None, 1)))
        except Overloaded as error:
            refusals.append(error)
            assert engine.stats().alive, "it is given up"
            await asyncio.sleep(0.05)
        else:
            if events[-1].finish_reason == "length":
                return refusals


def test_stop_ends_every_stream_and_every_process(engine: VllmEngine, model: TinyModel, very_long: list[int]) -> None:
    prompt = endless_prompt(model, RECIPES[0], LONG)
    handles = [os.pidfd_open(pid) for pid, line in descendants(os.getpid()).items() if "vllm" in line.lower()]
    assert len(handles) >= 4, "the guard, the API server, the core and a worker"

    async def main() -> None:
        digest = digest_of(model, RECIPES[0])
        streams = [engine.submit(greedy(str(index), prompt, digest, LONG)) for index in range(3)]
        unloading = asyncio.create_task(engine.unload_adapter(digest))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.stop)
        for stream in streams:
            last = (await collect(stream))[-1]
            assert last.finish_reason == "error"
            assert "it was stopped" in str(last.error)
        with pytest.raises(Overloaded, match="stopped"):
            await unloading
        with pytest.raises(Overloaded, match="stopped"):
            engine.submit(greedy("late", prompt))
        with pytest.raises(Overloaded, match="stopped"):
            await engine.load_adapter("sha256:late", model.adapter(RECIPES[0]))

    asyncio.run(main())
    engine.stop()
    stats = engine.stats()
    assert (stats.alive, stats.running, stats.waiting) == (False, 0, 0)
    wait_until_gone(handles)


ASKER = """
import sys, threading
from pathlib import Path
from serving.engine.vllm import VllmEngine
from serving.engine.vllm_command import VllmOptions
engine = VllmEngine(Path(sys.argv[1]), VllmOptions(Path(sys.argv[2]), kv_bytes=2**26, max_adapters=1))
engine.start()
print("ready", flush=True)
threading.Event().wait()
"""


def test_nothing_is_left_when_the_replicas_process_is_killed(model: TinyModel) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", ASKER, str(model.folder), str(PYTHON)], cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        family = descendants(process.pid)
        handles = [os.pidfd_open(pid) for pid in family]
        assert any("VLLM::EngineCore" in line for line in family.values())
        process.kill()
        wait_until_gone(handles)


def test_a_start_that_fails_says_why(model: TinyModel) -> None:
    options = VllmOptions(python=PYTHON, **{**LIMITS, "max_context": 8192})
    engine = VllmEngine(model.folder, options)
    with pytest.raises(ModelError, match="max_model_len"):
        engine.start()
    engine.stop()
    assert not engine.stats().alive
