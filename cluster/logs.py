"""What a command prints: plain lines in a job's log, a live line on a terminal, and one JSON line at the end.

Everything goes to stdout in order; errors go to stderr. Nothing is configured at import.
"""

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import LuthierError, exit_code

_PINNED = re.compile(r"the pinned adapter (\S+) is (?:not loaded: (.*)|loaded)$")


def console() -> Console:
    """A console that neither wraps nor colours where nobody looks (pipes, job logs)."""
    terminal = sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=not terminal, width=None if terminal else 10_000)


def show(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool = False) -> None:
    """Print rows as a table of these columns, or all of them as a JSON array."""
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    console().print(table)


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def ended(line: Mapping[str, Any]) -> int:
    """A job's last line, one JSON object; returns the exit code: 0 when it has done what it was for.

    A run that has published what may not be released has not.
    """
    sys.stderr.flush()
    print(json.dumps(line), flush=True)
    return 0 if line["state"] == "succeeded" and line.get("promoted") is not False else 1


def fail(error: LuthierError) -> int:
    """Print an error for a person; returns the exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return exit_code(error)


def pinned_line(adapter: str, problem: str = "") -> str:
    """What a replica logs when an adapter that it shall hold cannot be loaded, and when that is over."""
    return f"the pinned adapter {adapter} is {f'not loaded: {problem}' if problem else 'loaded'}"


def missing_pinned(log: str) -> dict[str, str]:
    """The adapters that a log says cannot be loaded, and why."""
    found: dict[str, str] = {}
    for line in log.splitlines():
        if told := _PINNED.search(line):
            adapter, problem = told.groups()
            if problem:
                found[adapter] = problem
            else:
                found.pop(adapter, None)
    return found


def error_in(traceback: str) -> str:
    """The error at the end of a traceback that Ray gives: the last line that is not indented, and what follows."""
    lines = traceback.strip().splitlines() or [""]
    starts = [index for index, line in enumerate(lines) if re.match(r"[\w.]+: ", line)]
    return "\n".join(lines[starts[-1] if starts else -1 :]).removeprefix("cluster.errors.")
