"""ZeRO stages 0 to 3 on one and three workers are the same mathematics, also across a save and a restore."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.processes import free_ports
from tests.conftest import TinyModels

ROOT = Path(__file__).parents[2]


STAGES = {
    ("fp32", "full"): (0, 1, 2, 3),
    ("fp32", "lora"): (0, 1, 2, 3),
    ("bf16", "lora"): (0, 1, 2, 3),
    ("fp32", "dora"): (0, 1, 2),
}
Found = dict[tuple[str, str, int], dict[str, Any]]


def run(folder: Path, world_size: int, out: Path) -> Found:
    """Everything that zero_rank.py does, on this many processes."""
    (port,) = free_ports(1)
    common = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    wanted = [(*case, stage) for case, stages in STAGES.items() for stage in stages]
    command = [sys.executable, "-m", "tests.jobs.zero_rank", str(folder), str(out), json.dumps(wanted)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    logs = [rank.communicate()[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(logs)
    found: Found = torch.load(out)
    return found


@pytest.fixture(scope="module")
def both(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """On one process, and on three, over which few parameters divide evenly."""
    folder = tmp_path_factory.mktemp("zero")
    return run(tiny_models["qwen3"], 1, folder / "one.pt"), run(tiny_models["qwen3"], 3, folder / "three.pt")


@pytest.mark.parametrize(("dtype", "kind"), STAGES)
def test_every_stage_and_world_size_trains_the_same(both: tuple[Found, Found], dtype: str, kind: str) -> None:
    # AdamW divides small gradients by their own size, so that rounding grows from step to step: 2e-5 after five.
    tolerance = 1e-4 if dtype == "fp32" else 2e-2
    expected = both[0][dtype, kind, 0]
    assert expected["history"][-1][0] != expected["history"][0][0]
    for found in (ran[dtype, kind, stage] for ran in both for stage in STAGES[dtype, kind]):
        torch.testing.assert_close(
            torch.tensor(found["history"]), torch.tensor(expected["history"]), atol=tolerance, rtol=tolerance
        )
        torch.testing.assert_close(
            torch.tensor(found["broken"]), torch.tensor(found["history"]), atol=tolerance / 5, rtol=tolerance / 5
        )
        assert found["weights"].keys() == expected["weights"].keys()
        for name, weight in found["weights"].items():
            assert weight.abs().max() > 0, name
            whole = expected["weights"][name]
            # All together: AdamW moves an element whose gradient is rounding itself by any part of the learning rate.
            assert (weight - whole).norm() <= 10 * tolerance * whole.norm(), name


def test_a_lock_whose_owner_was_killed_while_compiling_keeps_nobody_waiting() -> None:
    """torch's lock is a file that stays when its process is killed."""
    code = (
        "from jobs.attempts import prepare_environment; prepare_environment('cpu'); import os, pathlib; "
        "folder = pathlib.Path(os.environ['TORCH_EXTENSIONS_DIR'], 'deepspeed_shm_comm'); "
        "folder.mkdir(parents=True, exist_ok=True); (folder / 'lock').touch(); "
        "from jobs import zero; zero._load_operation(); print((folder / 'lock').exists())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
