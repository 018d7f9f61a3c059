"""Serving: mixed adapters beside the base alone, beside vLLM, and beside peft.

    scripts/bench serve [--json] [--rounds 3] [--quick] [--only engine|live|cold]

One random 19-million-parameter Qwen3 shape (workload.py), fp32, one process with one thread, greedy. Adapters adapt all
linear layers, at ranks of 4, 8 and 16 in turn. A request has 64 tokens of prompt and gets 64; 32 requests are sent at
once, 128 where 128 adapters take part. Counted are tokens generated per processor second, prompts read included; but
for the last:

    mixed_N_over_base    N adapters in turn against the base alone, the same requests, on our engine
    prefill_N, decode_N  the same by part: prompts of 512 tokens with one token each, and 64 tokens after 8
    base_over_vllm       the base alone, ours against vLLM
    mixed_8_over_vllm    8 adapters in turn, ours against vLLM
    mixed_32_over_peft   32 adapters in turn, ours against peft with one adapter at a time (set_adapter, generate)
    mixed_8_over_names   8 adapters in turn, ours against peft's own mixed batches (adapter_names)
    load_gap_over_median longest time between two tokens of 8 running streams while 16 adapters are read and loaded,
                         against the median; in milliseconds of the clock, with the thread and the loop of a replica

And with Ray Serve around the engine (serve_live.py), a tiny model, in milliseconds or counts:

    ingress_p50_ms       a request for one token over HTTP, against the same on an engine in the process; and p99
    haproxy_p50_ms       the same request in Serve's HAProxy mode, against behind Serve's own proxy; and p99
    alias_live_s         from a moved alias to the last request that the old version answers, under 50 requests/s; and
                         (as the peer) from the way back
    zipf_…               four replicas, 64 requests at once of 64 + 128 tokens, one adapter with half of them and 99 by
                         Zipf's law, 800 requests and then 800 more; against Serve's own router with the eviction of
                         @serve.multiplexed: tokens of the busiest replica over the mean, and a request's time
    zipf_cold_loads_…    adapters that were loaded while a request waited: _over_serve with 16 places a replica, which
                         is for two thirds of the adapters, and by half, _first and _later; _all_fit with 32 places;
                         _by_router against Serve's router over our cache. The notes (--json) have what one cache that
                         knows the future, and begins empty, would have loaded of 64 places

And of the first model, the cold start of an adapter by part (serve_cold.py), in milliseconds, medians of 12 adapters:

    cold_start_resolve_ms      its alias and record are read in the store; peer: one small read
    cold_start_fetch_ms        it comes to the node's disk; peer: one read of its weights into memory
    cold_start_verify_ms       SHA-256 of its files, which the download above includes and this line leaves out of it;
                               peer: that of the weights in memory
    cold_start_place_ms        it is parsed, checked and taken into use; peer: parsed alone
    cold_start_first_token_ms  a prompt of 64 tokens; peer: the same when the adapter has answered before
    cold_start_whole_ms        all of these; peer: the same when the adapter is there

vLLM runs in .venv-vllm, which scripts/setup-vllm makes; without that, and with --quick, whose heads are too narrow for
it, it is left out. It is compiled and warmed up. Prefix caches are off, since rounds repeat their prompts.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import IO, Any, Literal

import torch
from safetensors.torch import save_file

from cluster import env, logs
from cluster.errors import LuthierError, RunFailed
from scripts.benchmarks import serve_cold, serve_live, workload
from scripts.benchmarks.report import REPOSITORY, Measure, show
from serving.engine.adapter import read_adapter
from serving.engine.core import EngineCore
from serving.engine.native import NativeEngine, NativeOptions, load_core
from serving.engine.protocol import GenerationRequest, Quantization, SamplingParams

UNIT = "tokens per CPU-second"
VLLM = REPOSITORY / ".venv-vllm" / "bin" / "python"
PEER = REPOSITORY / "scripts" / "benchmarks" / "peers" / "vllm_serve.py"
RANKS = (4, 8, 16)
PROMPT, NEW = 64, 64
FEW, MANY = 32, 128
COLD = 12

Part = Literal["whole", "prefill", "decode"]
LENGTHS: dict[Part, tuple[int, int]] = {"whole": (PROMPT, NEW), "prefill": (512, 1), "decode": (8, NEW)}


class Requests:
    """Prompts of random words, the same in every round, and how many adapters take part in turn."""

    def __init__(self, count: int, adapters: int, part: Part = "whole") -> None:
        prompt, self.new = LENGTHS[part]
        draw = random.Random(count)
        self.prompts = [[draw.randrange(300, 6_000) for _ in range(prompt)] for _ in range(count)]
        self.adapters = [index % adapters if adapters else None for index in range(count)]


def write_adapter(folder: Path, index: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """A peft folder with small random matrices."""
    rank = RANKS[index % len(RANKS)]
    draw = torch.Generator().manual_seed(index)
    tensors = {}
    for module, (outputs, inputs) in shapes.items():
        for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = 0.02 * torch.randn(shape, generator=draw)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


Run = Callable[[Requests], float]


class Ours:
    """The native engine's core, stepped here: no thread, no loop, nothing but the engine."""

    def __init__(self, model: Path, dtype: str = "float32", quantization: Quantization | None = None) -> None:
        self.core: EngineCore = load_core(
            model,
            NativeOptions(
                dtype=dtype,
                quantization=quantization,
                kv_tokens=64 * 1024,
                max_running=MANY,
                max_waiting=2 * MANY,  # one alone gets two thirds
                max_adapters=MANY,
                prefix_cache=False,
                num_threads=1,
            ),
        )

    def load(self, folders: Sequence[Path]) -> None:
        for index, folder in enumerate(folders):
            self.core.load(read_adapter(str(index), folder, self.core.target))

    def run(self, requests: Requests) -> float:
        """Tokens per CPU-second."""
        params = SamplingParams(max_tokens=requests.new, temperature=0)
        began = time.process_time()
        for index, (prompt, adapter) in enumerate(zip(requests.prompts, requests.adapters, strict=True)):
            name = None if adapter is None else str(adapter)
            self.core.add(GenerationRequest(str(index), prompt, name, params))
        tokens = 0
        while self.core.has_work:
            tokens += sum(event.token_id is not None for _, event in self.core.step())
        return tokens / (time.process_time() - began)


class Peft:
    """peft on transformers' generate: one adapter at a time, or its own mixed batches."""

    def __init__(self, model: Path, folders: Sequence[Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model: Any = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
        for index, folder in enumerate(folders[1:], start=1):
            self._model.load_adapter(folder, adapter_name=str(index))
        self._model.eval()

    def one_at_a_time(self, requests: Requests) -> float:
        """Tokens per CPU-second; the requests of an adapter go as one batch."""
        began, tokens = time.process_time(), 0
        for adapter in sorted({each for each in requests.adapters if each is not None}):
            self._model.set_adapter(str(adapter))
            mine = [index for index, each in enumerate(requests.adapters) if each == adapter]
            tokens += self._generate([requests.prompts[index] for index in mine], requests.new)
        return tokens / (time.process_time() - began)

    def mixed(self, requests: Requests) -> float:
        """Tokens per CPU-second, by adapter_names."""
        began = time.process_time()
        names = [str(each) for each in requests.adapters]
        return self._generate(requests.prompts, requests.new, adapter_names=names) / (time.process_time() - began)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], new: int, **more: Any) -> int:
        ids = torch.tensor(prompts)
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        made = self._model.generate(input_ids=ids, eos_token_id=None, **given, **more)
        return int((made.shape[1] - ids.shape[1]) * len(prompts))


class Vllm:
    """vLLM in its own environment, which answers a line of JSON for a line."""

    def __init__(self, model: Path, folders: Sequence[Path], log: IO[str]) -> None:
        variables = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else its engine's CPU time is another process's
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._log = log
        self._process = subprocess.Popen(
            [VLLM, PEER, model, *folders],
            env=variables,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        self._read()

    def run(self, requests: Requests) -> float:
        """Tokens per CPU-second."""
        assert self._process.stdin is not None
        said = {"prompts": requests.prompts, "adapters": requests.adapters, "new": requests.new}
        self._process.stdin.write(json.dumps(said) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return float(answer["tokens"]) / float(answer["cpu_s"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self._log.seek(0)
        raise RunFailed(f"vLLM ended: {self._log.read()[-2_000:]}")


async def load_gap(model: Path, folders: Sequence[Path]) -> tuple[float, float]:
    """The longest and the median time between two tokens of a stream, in milliseconds, while adapters are loaded."""
    engine = NativeEngine(model, NativeOptions(max_adapters=len(folders), num_threads=1))
    engine.start()
    gaps: list[float] = []

    async def listen(index: int) -> None:
        last = None
        params = SamplingParams(max_tokens=300, temperature=0)
        async for _ in engine.submit(GenerationRequest(str(index), [300 + index] * 16, "0", params)):
            now = time.perf_counter()
            if last is not None:
                gaps.append(1e3 * (now - last))
            last = now

    try:
        await engine.load_adapter("0", folders[0])
        streams = [asyncio.create_task(listen(index)) for index in range(8)]
        await asyncio.sleep(0.5)
        for index, folder in enumerate(folders[1:], start=1):
            await engine.load_adapter(str(index), folder)
        await asyncio.gather(*streams)
    finally:
        engine.stop()
    return max(gaps), median(gaps)


def measure(folder: Path, rounds: int, quick: bool) -> list[Measure]:
    """All comparisons, contestants taking turns."""
    model = folder / "model"
    workload.write_model(model, workload.QUICK if quick else workload.FULL)
    ours = Ours(model)
    folders = [folder / f"adapter-{index}" for index in range(MANY)]
    for index, each in enumerate(folders):
        write_adapter(each, index, ours.core.target.shapes)
    ours.load(folders)
    peft = Peft(model, folders[:FEW])
    with ExitStack() as stack:
        vllm = None
        if VLLM.exists() and not quick:
            log = stack.enter_context((folder / "vllm.log").open("w+"))
            vllm = Vllm(model, folders[:8], log)
            stack.callback(vllm.close)
        torch.set_num_threads(1)
        measures = _measure(ours, peft, vllm, rounds)
    gaps = [asyncio.run(load_gap(model, folders[:17])) for _ in range(rounds)]
    longest, middle = zip(*gaps, strict=True)
    return [*measures, Measure("load_gap_over_median", "ms", longest, middle)]


def measure_live(folder: Path, rounds: int, quick: bool) -> list[Measure]:
    """What stands around the engine, on a tiny model."""
    model = folder / "small"
    workload.write_model(model, workload.QUICK)
    shapes = load_core(model, NativeOptions()).target.shapes
    folders = [folder / f"small-{index}" for index in range(1 + serve_live.COLD)]
    for index, each in enumerate(folders):
        write_adapter(each, index, shapes)
    return serve_live.measure(serve_live.Live(model, folders, folder), rounds, quick)


def measure_cold(folder: Path, rounds: int, quick: bool) -> tuple[list[Measure], str]:
    """Cold starts, and the store that they are of."""
    model = folder / "cold-model"
    workload.write_model(model, workload.QUICK if quick else workload.FULL)
    shapes = load_core(model, NativeOptions()).target.shapes
    folders = [folder / f"cold-adapter-{index}" for index in range(3 if quick else 1 + COLD)]
    for index, each in enumerate(folders):
        write_adapter(each, index, shapes)
    return serve_cold.measure(model, folders, folder, rounds)


def _measure(ours: Ours, peft: Peft, vllm: Vllm | None, rounds: int) -> list[Measure]:
    pairs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {}

    def pair(
        name: str, first: Callable[[Requests], float], second: Callable[[Requests], float], *two: Requests
    ) -> None:
        pairs[name] = (lambda: first(two[0])), (lambda: second(two[-1]))

    for adapters in (1, 8, 32, MANY):
        count = MANY if adapters == MANY else FEW
        requests = Requests(count, adapters), Requests(count, 0)
        pair(f"mixed_{adapters}_over_base", ours.run, ours.run, *requests)
    for part in ("prefill", "decode"):
        for adapters in (8, MANY):
            count = MANY if adapters == MANY else FEW
            requests = Requests(count, adapters, part), Requests(count, 0, part)
            pair(f"{part}_{adapters}_over_base", ours.run, ours.run, *requests)
    if vllm:
        pair("base_over_vllm", ours.run, vllm.run, Requests(FEW, 0))
        pair("mixed_8_over_vllm", ours.run, vllm.run, Requests(FEW, 8))
    pair("mixed_32_over_peft", ours.run, peft.one_at_a_time, Requests(FEW, 32))
    pair("mixed_8_over_names", ours.run, peft.mixed, Requests(FEW, 8))

    figures: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in pairs}
    ours.run(Requests(FEW, 8))  # the first run of anything is slower
    for _ in range(rounds):
        for name, (first, second) in pairs.items():
            figures[name][0].append(first())
            figures[name][1].append(second())
    return [Measure(name, UNIT, *both) for name, both in figures.items()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one round of a tiny model: does it work at all?")
    parser.add_argument(
        "--only", nargs="+", choices=("engine", "live", "cold"), default=("engine", "live", "cold"), help="a part alone"
    )
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("at least 1 round")
    try:
        with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
            os.environ[env.LUTHIER_CACHE] = f"{name}/cache"
            rounds = 1 if given.quick else given.rounds
            measures = measure(Path(name), rounds, given.quick) if "engine" in given.only else []
            measures += measure_live(Path(name), rounds, given.quick) if "live" in given.only else []
            more = {}
            if "cold" in given.only:
                cold, store = measure_cold(Path(name), rounds, given.quick)
                measures += cold
                more["store"] = store
    except LuthierError as error:
        return logs.fail(error)
    show("Mixed adapters, one thread, fp32", measures, given.json, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
