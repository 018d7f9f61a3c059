"""Serving on a quantised base: bfloat16, int8 and nf4 beside float32, in speed and in the bytes of the weights.

    scripts/bench quantized [--json] [--rounds 3] [--quick]

One process with one thread, greedy, the native engine alone. Two random Qwen3 shapes: `small`, of 19 million parameters
(workload.py), and `large`, whose layers have 2,048 channels and are read from memory and not from a cache. Counted are
tokens generated per processor second, prompts of 64 read included, 64 generated for each of 32 requests (small), and 16
for each of 8 (large); the peer is the same model in float32.

    KIND_SHAPE           the base alone; KIND is bf16, int8 (in float32 otherwise), nf4 (the same), and int8_bf16,
                         nf4_bf16 (in bfloat16 otherwise)
    KIND_SHAPE_mixed     small alone: 8 adapters in turn, on all linear layers
    KIND_SHAPE_bytes     of the base's weights: embeddings, which are never quantised, are a third of `small`
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from cluster import env, logs
from cluster.errors import LuthierError
from scripts.benchmarks import workload
from scripts.benchmarks.report import Measure, show
from scripts.benchmarks.serve import FEW, UNIT, Ours, Requests, write_adapter
from scripts.benchmarks.workload import Shape
from serving.engine.protocol import Quantization

LARGE = Shape(hidden_size=2048, layers=3, heads=16)
"""182 million parameters, 34 of them in the embedding."""

KINDS: dict[str, tuple[str, Quantization | None]] = {
    "bf16": ("bfloat16", None),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
    "int8_bf16": ("bfloat16", "int8"),
    "nf4_bf16": ("bfloat16", "nf4"),
}


def few_requests() -> Requests:
    """Those of the large shape."""
    requests = Requests(8, 0)
    requests.new = 16
    return requests


def measure(folder: Path, name: str, shape: Shape, rounds: int) -> list[Measure]:
    """One shape, contestants taking turns."""
    model = folder / name
    workload.write_model(model, shape)
    contestants = {"fp32": Ours(model)} | {kind: Ours(model, *how) for kind, how in KINDS.items()}
    runs = {name: few_requests()} if name == "large" else {name: Requests(FEW, 0), f"{name}_mixed": Requests(FEW, 8)}
    if name != "large":
        folders = [folder / f"{name}-adapter-{index}" for index in range(8)]
        for index, each in enumerate(folders):
            write_adapter(each, index, contestants["fp32"].core.target.shapes)
        for contestant in contestants.values():
            contestant.load(folders)
    figures: dict[tuple[str, str], list[float]] = {(kind, run): [] for kind in contestants for run in runs}
    for contestant in contestants.values():
        contestant.run(runs[name])  # the first run of anything is slower
    for _ in range(rounds):
        for (kind, run), told in figures.items():
            told.append(contestants[kind].run(runs[run]))
    held = {kind: contestant.core.stats().weight_bytes for kind, contestant in contestants.items()}
    return [
        *(Measure(f"{kind}_{run}", UNIT, figures[kind, run], figures["fp32", run]) for kind in KINDS for run in runs),
        *(Measure(f"{kind}_{name}_bytes", "MiB", [held[kind] / 2**20], [held["fp32"] / 2**20]) for kind in KINDS),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench quantized", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one round of a tiny model: does it work at all?")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("at least 1 round")
    shapes = {"quick": workload.QUICK} if given.quick else {"small": workload.FULL, "large": LARGE}
    try:
        with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
            os.environ[env.LUTHIER_CACHE] = f"{name}/cache"
            rounds = 1 if given.quick else given.rounds
            measures = [each for shape in shapes.items() for each in measure(Path(name), *shape, rounds)]
    except LuthierError as error:
        return logs.fail(error)
    show("A quantised base beside float32, one thread", measures, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
