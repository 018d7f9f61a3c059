"""What a benchmark prints: a table for people, or one JSON object for scripts.

    {"trl": {"ours": …, "peer": …, "ratio": …, "unit": …, …}, …, "machine": …, "commit": …, "date": …}

Contestants take turns, so a round is a pair: what else the machine does meets both. A ratio is that of the medians;
beside it stand the smallest and largest ratio of any round, which say how far to trust it.
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from cluster.logs import console

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Measure:
    """One comparison. `ours` and `peer` hold a figure per round, paired; more is better unless `unit` says otherwise. A
    measure without a peer has none.

    `notes` are further figures for the JSON object alone.
    """

    name: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float] = ()
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return median(self.ours) / median(self.peer) if self.peer else math.nan

    @property
    def ratios(self) -> list[float]:
        """The ratio of each round."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)] if self.peer else []

    def to_dict(self) -> dict[str, Any]:
        return {
            "ours": _rounded(median(self.ours)),
            "peer": _rounded(median(self.peer)) if self.peer else None,
            "ratio": _rounded(self.ratio) if self.peer else None,
            "unit": self.unit,
            **({"ratio_min": _rounded(min(self.ratios)), "ratio_max": _rounded(max(self.ratios))} if self.peer else {}),
            "rounds": len(self.ours),
            **{name: float(f"{value:.4g}") for name, value in self.notes.items()},
        }


def _rounded(figure: float) -> float:
    """To three decimals, a small figure to three digits."""
    return round(figure, 3) if figure >= 0.1 else float(f"{figure:.3g}")


def show(title: str, measures: Sequence[Measure], as_json: bool, **more: str) -> None:
    """Print the measures with machine, commit and date, and what `more` says of the circumstances."""
    where = {"machine": machine(), "commit": commit(), "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"} | more
    if as_json:
        print(json.dumps({measure.name: measure.to_dict() for measure in measures} | where))
        return
    units = {measure.unit for measure in measures}
    if len(units) == 1:
        title = f"{title}: {units.pop()}"
    table = Table(title=title, caption=" · ".join(where.values()), title_justify="left", caption_justify="left")
    table.add_column("beside", no_wrap=True)
    for heading in ("ours", "peer", "ratio", "lowest", "highest", "rounds"):
        table.add_column(heading, justify="right")
    if units:
        table.add_column("unit")
    for measure in measures:
        figures = [median(side) if side else None for side in (measure.ours, measure.peer)]
        ratios = [measure.ratio, min(measure.ratios), max(measure.ratios)] if measure.peer else [None] * 3
        table.add_row(
            measure.name,
            *("" if figure is None else f"{figure:,.1f}" if figure >= 10 else f"{figure:.3g}" for figure in figures),
            *("" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}" for ratio in ratios),
            str(len(measure.ours)),
            *([measure.unit] if units else []),
        )
    console().print(table)


def machine() -> str:
    """The processor's name and the cores that this process may use."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = (line for line in information.read_text().splitlines() if line.startswith("model name"))
        name = next(models, f": {name}").partition(":")[2].strip()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The checkout's commit, marked when files differ from it."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
