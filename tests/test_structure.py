"""The one-direction rule, the one door to each heavy library, light commands, and config files that resolve."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.catalogue.table import Table
from cluster.config import Config, load
from cluster.gpus import GpuTable
from cluster.licences.facts import Facts
from cluster.licences.organisation import Organisation
from cluster.models import ModelConfig
from cluster.place import ClusterConfig
from jobs.config import Recipe
from jobs.data.markers import Words
from jobs.data.rules import Rules
from jobs.plan import make_plan, shape_of
from serving.config import ServingConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "jobs", "serving")
ALLOWED = {"cluster": {"cluster"}, "jobs": {"cluster", "jobs"}, "serving": {"cluster", "serving"}}
DOORS = {
    "bitsandbytes": {"serving/engine/quantized.py"},
    "deepspeed": {"jobs/zero.py"},
    "boto3": {"cluster/s3.py"},
    "botocore": {"cluster/s3.py"},
    "llguidance": {"serving/engine/grammar.py"},
}
SCHEMAS: dict[str, type[Config]] = {
    "catalogue": Table,
    "models": ModelConfig,
    "clusters": ClusterConfig,
    "hardware": GpuTable,
    "recipes": Recipe,
    "serving": ServingConfig,
    "licences": Facts,
    "organisation": Organisation,
    "data": Rules,
    "markers": Words,
}


def imports(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found.add((node.module or "").split(".")[0])
    return found


def sources() -> list[tuple[str, Path]]:
    return [(package, path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_packages_depend_in_one_direction() -> None:
    for package, path in sources():
        foreign = imports(path) & set(PACKAGES) - ALLOWED[package]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"
        assert not imports(path) & {"scripts", "tests"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_packages_docstring_is_its_map(package: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())) or ""
    named = {line.split()[0].rstrip("/") for line in text.splitlines() if line[:1].islower()}
    there = {path.stem for path in (ROOT / package).glob("*.py")} | {
        path.parent.name for path in (ROOT / package).glob("*/__init__.py")
    }
    assert there - named - {"__init__", "__main__", "folder", "s3"} == set()
    assert named <= there


def test_the_ground_has_no_torch() -> None:
    for path in (ROOT / "cluster").rglob("*.py"):
        assert not imports(path) & {"torch", "transformers", "peft", "deepspeed"}, path


@pytest.mark.parametrize("library", sorted(DOORS))
def test_each_heavy_library_has_one_door(library: str) -> None:
    users = {str(path.relative_to(ROOT)) for _, path in sources() if library in imports(path)}
    assert users == DOORS[library]


@pytest.mark.parametrize(
    "command",
    [
        ["jobs", "--help"],
        ["serving", "--help"],
        ["cluster", "--help"],
        ["jobs", "plan", "configs/recipes/quickstart-base.yaml"],
    ],
    ids=" ".join,
)
def test_light_commands_import_no_torch(command: list[str]) -> None:
    code = (
        "import sys; from cluster.cli import main\n"
        f"sys.argv = ['luthier', *{command!r}]\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_shipped_config_resolves_and_plans(path: Path) -> None:
    config = load(path, SCHEMAS.get(path.stem) or SCHEMAS[path.parent.name])
    assert path.read_text().startswith("# "), "its first line is the command that runs it"
    if isinstance(config, Recipe):
        shape = shape_of(config.model)
        assert shape
        assert make_plan(config, shape).fits
    if isinstance(config, ModelConfig):
        assert config.shape, "a model file states its shape, so that it can be planned without a network"
