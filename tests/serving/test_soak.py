"""Thousands of requests while clients leave and replicas are killed −9: an answer or a clean error for each, no leak.

Every whole answer is compared with peft's for its own adapter, so that a mix-up of weights, of blocks or of streams
shows, however rare. After the storm the counters of what was answered must add up to the last token.
"""

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import psutil
import pytest

from cluster import models, registry
from cluster.folder import FolderStore
from cluster.models import ModelConfig
from serving import deploy
from tests.serving.conftest import NEAR_TIE, LoraRecipe, TinyModel, make_tokenizer
from tests.serving.endpoint import APPLICATION, BASE, DEADLINE_S, Served, free_port, poll, serving_config

REPLICAS = 2
ADAPTERS = 12  # for 8 places in a replica
AT_ONCE = 48
LEAVES = 0.2
MOST_TOKENS = 12
MAX_GROWTH = 80 << 20  # bytes of a process, between the half of a storm and its end


@dataclass
class Soak:
    """The endpoint, what must be answered, and what was."""

    served: Served
    expected: dict[tuple[str, int], list[str]]  # by model and prompt: the text of each token of the answer
    prompts: list[list[int]]
    outcomes: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    generated: int = 0
    prompted: int = 0

    async def ask(self, client: httpx.AsyncClient, chance: random.Random, may_leave: bool) -> None:
        """One request of a random kind, to its end or left at a random moment."""
        model, number = chance.choice([*self.expected, ("nobody", 0)])
        max_tokens = chance.randint(1, MOST_TOKENS)
        body = {"model": model, "prompt": self.prompts[number], "max_tokens": max_tokens, "temperature": 0}
        leaves = may_leave and chance.random() < LEAVES
        if chance.random() < 0.5:
            await self._stream(client, body, number, chance.randint(0, 3) if leaves else None)
        elif leaves:
            try:
                async with asyncio.timeout(chance.uniform(0, 0.3)):
                    await client.post(f"{self.served.url}/completions", json=body)
            except TimeoutError:
                pass
            self.outcomes["left"] += 1
        else:
            answer = await client.post(f"{self.served.url}/completions", json=body)
            self._judge(answer, body, number)

    def _judge(self, answer: httpx.Response, body: dict[str, Any], number: int) -> None:
        self.codes[answer.status_code] += 1
        if answer.status_code != 200:
            self._refused(answer.status_code, answer.json(), answer.headers, body)
            return
        usage = answer.json()["usage"]
        self._answered(answer.json()["choices"][0]["text"], answer.headers, body, number, usage)

    async def _stream(
        self, client: httpx.AsyncClient, body: dict[str, Any], number: int, leave_after: int | None
    ) -> None:
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", f"{self.served.url}/completions", json=asked) as answer:
            if answer.status_code != 200:
                self.codes[answer.status_code] += 1
                self._refused(answer.status_code, json.loads(await answer.aread()), answer.headers, body)
                return
            text, usage, chunks, error, is_whole = "", None, 0, None, False
            async for line in answer.aiter_lines():
                if not line:
                    continue
                if leave_after is not None and chunks >= leave_after:
                    self.outcomes["left"] += 1
                    return
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    is_whole = True
                    continue
                chunk = json.loads(data)
                error, usage = chunk.get("error"), chunk.get("usage")
                text += "".join(choice["text"] for choice in chunk.get("choices", ()))
                chunks += 1
        self.codes[200] += 1
        if error is not None:
            assert not is_whole
            self._refused(503, {"error": error}, {"retry-after": "1"}, body)
        else:
            assert is_whole, "a stream ended without [DONE] and without an error"
            self._answered(text, answer.headers, body, number, usage)

    def _answered(self, text: str, headers: Any, body: dict[str, Any], number: int, usage: Any) -> None:
        model = body["model"]
        tokens = self.expected[model, number][: body["max_tokens"]]
        assert text == "".join(tokens), f"{model} answers {text!r} to prompt {number}, and peft {tokens}"
        assert headers["x-luthier-adapter"] == (BASE if model == BASE else f"{model}@1")
        assert usage["completion_tokens"] == len(tokens)
        self.generated += len(tokens)
        self.prompted += usage["prompt_tokens"]
        self.outcomes["answered"] += 1

    def _refused(self, code: int, said: Any, headers: Any, body: dict[str, Any]) -> None:
        assert set(said["error"]) == {"message", "type", "param", "code"}, said
        if body["model"] == "nobody":
            assert code == 404
            self.outcomes["unknown"] += 1
            return
        assert code in (429, 503), said
        assert int(headers["retry-after"]) >= 1
        self.outcomes["refused"] += 1


def pids(name: str) -> list[int]:
    """Of this session's `ray::NAME` processes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue  # it ended meanwhile
        if title.startswith(f"ray::{name}"):
            found.append(process.pid)
    return found


@pytest.fixture(scope="module")
def soak(local_ray: None, tiny: Callable[[str], TinyModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    model = tiny("qwen3")
    store = FolderStore(tmp_path_factory.mktemp("soak") / "store")
    config = ModelConfig(name=BASE, source=str(model.folder), licence="apache-2.0", dtype="fp32")
    base = models.pin(config, store)
    recipes = {f"skill-{number}": LoraRecipe(500 + number, r=2 + number % 3) for number in range(ADAPTERS)}
    with ExitStack() as opened:
        served = Served("", store, base, model, recipes, opened)
        for name, recipe in recipes.items():
            registry.set_alias(store, name, "stable", served.publish(name, recipe), why="test")
        tokenizer = make_tokenizer()
        prompts = [model.prompt(seed, 3 + 7 * seed) for seed in range(8)]
        expected: dict[tuple[str, int], list[str]] = {}
        for name in (BASE, *recipes):
            for number, prompt in enumerate(prompts):
                answer = model.expected(recipes.get(name), prompt, MOST_TOKENS)
                pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in answer.tokens]
                is_plain = tokenizer.decode(answer.tokens, skip_special_tokens=True) == "".join(
                    pieces
                )  # so that its beginnings are known too
                if min(answer.margins) > NEAR_TIE and is_plain and len(pieces) == MOST_TOKENS:
                    expected[name, number] = pieces
        assert {name for name, _ in expected} == {BASE, *recipes}, "choose other prompts: some model has none"
        url = deploy.deploy(
            serving_config(config, store.url, free_port(), num_replicas=REPLICAS), DEADLINE_S * 3, lambda _: None
        )
        yield Soak(replace(served, url=url), expected, prompts)


async def storm(soak: Soak, requests: int, kills: int, seed: int, may_leave: bool = True) -> list[int]:
    """Ask `requests` times, AT_ONCE at once, and kill a replica `kills` times on the way. Returns the ingress's memory
    in bytes at the half and at the end."""
    chance = random.Random(seed)
    asked = 0
    kill_at = sorted(chance.sample(range(requests // 20, requests * 3 // 4), kills))
    memory: list[int] = []

    async def client_loop(client: httpx.AsyncClient, own: random.Random) -> None:
        nonlocal asked
        while asked < requests:
            asked += 1
            if kill_at and asked >= kill_at[0]:
                kill_at.pop(0)
                os.kill(chance.choice(pids(f"ServeReplica:{APPLICATION}:replica")), signal.SIGKILL)
            if asked == requests // 2:
                memory.append(ingress_memory(soak))
            await soak.ask(client, own, may_leave)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=AT_ONCE)
    async with httpx.AsyncClient(timeout=DEADLINE_S * 2, limits=limits) as client, asyncio.TaskGroup() as group:
        for number in range(AT_ONCE):
            group.create_task(client_loop(client, random.Random(f"{seed} {number}")))
    return [*memory, ingress_memory(soak)]


def ingress_memory(soak: Soak) -> int:
    (pid,) = pids(f"ServeReplica:{APPLICATION}:ingress")
    return psutil.Process(pid).memory_info().rss


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("requests", "kills"), [(600, 1), pytest.param(20_000, 12, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_every_request_ends_and_nothing_leaks(soak: Soak, requests: int, kills: int) -> None:
    soak.outcomes.clear()
    half, end = asyncio.run(storm(soak, requests, kills, seed=requests))
    assert soak.outcomes.total() == requests
    assert soak.outcomes["left"] > requests * LEAVES / 4
    assert soak.outcomes["answered"] > requests / 2
    assert end - half < MAX_GROWTH

    def is_idle() -> bool:
        replicas = soak.served.replicas()
        return len(replicas) == REPLICAS and not any(
            each.running or each.waiting or each.kv_blocks_used for each in replicas
        )

    poll(is_idle, "both replicas are back, and hold nothing")

    # No kills and nobody leaves: now the books must balance.
    before = soak.served.replicas()
    soak.generated = soak.prompted = 0
    soak.outcomes.clear()
    asyncio.run(storm(soak, requests // 5, 0, seed=requests + 1, may_leave=False))
    poll(is_idle, "nothing is held")
    after = soak.served.replicas()
    assert {each.replica for each in before} == {each.replica for each in after}

    def grown(name: str) -> int:
        return sum(getattr(each, name) for each in after) - sum(getattr(each, name) for each in before)

    assert grown("requests") == soak.outcomes["answered"]
    assert grown("generated_tokens") == soak.generated
    assert grown("prompt_tokens") + grown("shared_tokens") == soak.prompted
    assert grown("cancelled") == 0
    assert set(soak.outcomes) <= {"answered", "unknown"}
