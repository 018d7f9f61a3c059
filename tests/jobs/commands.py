"""Our commands, run in this process, which takes a tenth of the time."""

import importlib
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from cluster.errors import LuthierError, exit_code

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """What a command said."""

    stdout: str
    stderr: str


def luthier(*arguments: str, cwd: Path = ROOT, code: int = 0) -> Done:
    """A command; its errors as `cluster.cli.run` tells them."""
    group, *rest = ["cluster", *arguments] if arguments[0] == "licences" else arguments
    with chdir(cwd):
        result = CliRunner().invoke(importlib.import_module(f"{group}.cli").app, rest)
    if result.exception and not isinstance(result.exception, SystemExit | LuthierError):
        raise result.exception
    error = result.exception if isinstance(result.exception, LuthierError) else None
    assert (exit_code(error) if error else result.exit_code) == code, f"{result.output}{error}"
    return Done(result.stdout, f"{result.stderr}{error or ''}")
