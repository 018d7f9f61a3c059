"""`python -m serving` as a person meets it: the real process, its messages and its exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import load
from serving.config import ServingConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "serving").glob("*.yaml"))
TINY = str(ROOT / "configs" / "serving" / "tiny.yaml")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "serving", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load(path, ServingConfig)
    assert path.read_text().startswith(f"# luthier serving deploy configs/serving/{path.name}")
    assert config.name == path.stem


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["deploy", "nowhere.yaml"], "no such file"),
        (["deploy", TINY, "engine.max_adaptors=4"], "did you mean 'max_adapters'?"),
        (["deploy", TINY, "replicas.min=3"], "min 3 is more than max 1"),
        (["deploy", TINY, "replicas.max=many", "http.port=0"], "2 faults"),
        (["deploy", TINY, "model.revision=5"], "model.revision"),
        (["deploy", TINY], "give --address host:port, or set RAY_ADDRESS"),
        (["deploy", TINY, "adapters.pinned=redact"], "write a list: [redact]"),
        (["deploy", TINY, "adapters.weights={redact: 0}"], "adapters.weights.redact"),
        (["deploy", TINY, "adapters.weights={redact@2: 3}"], "'redact@2' is no adapter's name"),
        (["deploy", TINY, "engine=vllm", "adapters.weights={redact: 2}"], "the native engine's"),
        (["deploy", TINY, "engine.kv_tokens=3"], "engine.kv_tokens"),
        (["chat", "hello", "--model", "tiny", "--url", "banana"], "--url"),
        (["status"], "give --address host:port, or set RAY_ADDRESS"),
        (["shutdown"], "give --address host:port, or set RAY_ADDRESS"),
    ],
)
def test_what_the_person_got_wrong_is_one_message_and_exit_2(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_endpoint_that_is_not_there_is_one_message_and_exit_1() -> None:
    done = run("chat", "hello", "--model", "tiny", "--url", "http://127.0.0.1:9/v1")
    assert done.returncode == 1
    assert "http://127.0.0.1:9/v1 does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_config_errors_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from serving.cli import app\n"
        "assert CliRunner().invoke(app, ['deploy', '--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['deploy', 'nowhere.yaml']).exit_code != 0\n"
        "heavy = {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
