"""What the README says is so: its tree, its commands, its recipe."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster import cli
from cluster.config import load
from jobs.config import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TOP = ("configs", "cluster", "jobs", "serving", "scripts", "tests")


def block(after: str) -> str:
    """The first code block behind a heading."""
    return README.split(after, 1)[1].split("```")[1].partition("\n")[2]


def tree() -> str:
    """Each folder of the checkout on a line with its files, by name."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders: dict[str, list[str]] = {}
    for file in sorted(tracked):
        path = Path(file)
        if path.parts[0] in TOP and path.name not in ("__init__.py", "__main__.py", "README.md", "conftest.py"):
            folders.setdefault(str(path.parent), []).append(path.stem if path.suffix == ".py" else path.name)
    return "".join(f"{folder + '/':<26}{'  '.join(names)}\n" for folder, names in folders.items())


def test_the_tree_is_the_one_that_is_there() -> None:
    assert block("## Layout") == tree(), f"the README's layout should be:\n{tree()}"


def test_the_recipe_is_the_file_that_ships() -> None:
    assert block("## A recipe") == (ROOT / "configs" / "recipes" / "support.yaml").read_text()


def test_the_evaluation_is_one_that_a_recipe_can_have() -> None:
    section = json.dumps(yaml.safe_load(block("## Releases"))["evaluation"])
    asked = load(ROOT / "configs" / "recipes" / "support.yaml", Recipe, [f"evaluation={section}"]).evaluation
    assert asked
    assert asked.suites == ("loss", "answers", "regression", "safety")


COMMANDS = sorted(set(re.findall(r"^    luthier (.+)$", README, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_with_its_options(command: str) -> None:
    words = shlex.split(command, comments=True)
    group, name, *arguments = ["cluster", *words] if words[0] in cli.COMMANDS else words
    inner = arguments[:1] if name in ("licences", "models", "data") else []  # a group within the group
    command = [sys.executable, "-m", group, name, *inner, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert option in shown.stdout


PLANS = re.findall(r"^```\n\$ (luthier jobs plan .+)\n((?s:.+?))^```$", README, re.MULTILINE)


def test_the_readme_prints_plans() -> None:
    assert len(PLANS) == 3


@pytest.mark.parametrize(("command", "printed"), PLANS, ids=[command for command, _ in PLANS])
def test_a_printed_plan_is_what_the_command_prints(command: str, printed: str) -> None:
    _, group, *arguments = shlex.split(command)
    done = subprocess.run([sys.executable, "-m", group, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == printed, done.stderr
    assert done.returncode == (0 if printed.rstrip().endswith("yes") else 2)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_link_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("script", sorted(set(re.findall(r"^    (scripts/\w+)", README, re.MULTILINE))))
def test_every_script_exists(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111


NAMED_TESTS = sorted(set(re.findall(r"`(test_\w+)`", (ROOT / "serving" / "README.md").read_text())))


@pytest.mark.parametrize("name", NAMED_TESTS)
def test_every_test_that_is_named_exists(name: str) -> None:
    assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests" / "serving").glob("test_*.py"))
