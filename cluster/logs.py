"""What a command prints: plain lines in a job's log, a live line on a terminal, and one JSON line at the end.

Everything goes to stdout in order; errors go to stderr. Nothing is configured at import.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from cluster.errors import LuthierError, exit_code


def console() -> Console:
    """A console that neither wraps nor colours where nobody looks (pipes, job logs)."""
    terminal = sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=not terminal, width=None if terminal else 10_000)


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def ended(line: Mapping[str, Any]) -> int:
    """A job's last line, one JSON object; returns the exit code: 0 when it has done what it was for."""
    sys.stderr.flush()
    print(json.dumps(line), flush=True)
    return 0 if line["state"] == "succeeded" else 1


def fail(error: LuthierError) -> int:
    """Print an error for a person; returns the exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return exit_code(error)
