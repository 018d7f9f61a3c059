"""A run as one HTML file: curves, events, recipe, lineage, totals. Opened from a disk, without a server or a network.

There is no script in it, and its policy allows none: whatever a run's name, recipe or events hold stays text.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

import yaml

from cluster import ledger
from cluster.records import RunRecord, now
from jobs.chart import MARKS, Chart, Curve, draw
from jobs.history import History, evaluations, lost, marks, totals
from jobs.markup import tag, write
from jobs.memory import GIB

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = Path(__file__).with_name("report.css")


def page(history: History) -> str:
    """The report's HTML."""
    run = history.run
    head = tag(
        "head",
        {},
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("meta", {"name": "color-scheme", "content": "light dark"}),
        tag("title", {}, f"{run.record.run_id}: {run.state}"),
        tag("style", {}, _STYLE.read_text()),
    )
    method = run.record.recipe["method"]["kind"]
    top = tag(
        "header",
        {},
        tag("h1", {}, run.record.run_id),
        tag("p", {}, tag("strong", {"class": f"state {run.state}"}, run.state), f" · {run.record.base.name}, {method}"),
        tag("p", {"class": "small"}, f"{history.store_url}, read {now()}"),
    )
    parts = (_figures, _curves, _events, _attempts, _costs, _lineage)
    body = tag("body", {}, top, tag("main", {}, *(part(history) for part in (*parts, _recipe))))
    return write(tag("html", {"lang": "en"}, head, body))


def charts(history: History) -> list[Chart]:
    """What is drawn, in order."""

    def curve(name: str, key: str, factor: float = 1.0) -> Curve:
        values = ((step["step"] + 1, step.get(key)) for step in history.steps)
        return Curve(name, [(done, None if value is None else value * factor) for done, value in values])

    measured = evaluations(history)
    evaluation = [Curve("evaluation", measured)] if measured else []
    times = [curve("step", "step_s"), curve("waiting for data", "data_wait_s")]
    return [
        Chart("Loss", "nats per supervised token", [curve("training", "loss"), *evaluation], from_zero=False),
        Chart("Learning rate", "AdamW step size", [curve("learning rate", "lr")]),
        Chart("Gradient norm", "L2, before clipping", [curve("gradient norm", "grad_norm")]),
        Chart("Throughput", "tokens/s", [curve("throughput", "tokens_per_s")]),
        Chart("Time of a step", "s", [*times, curve("standing still for a checkpoint", "checkpoint_stall_s")]),
        Chart("Padding", "% of computed tokens", [curve("padding", "padding_fraction", 100.0)]),
        Chart("Workers", "ranks", [curve("workers", "world_size")]),
        Chart("Memory of the fullest worker", "GiB", [curve("memory", "memory_bytes", 1 / GIB)]),
    ]


def _figures(history: History) -> Element:
    rows = [tag("div", {}, tag("dt", {}, name), tag("dd", {}, value)) for name, value in totals(history).items()]
    return tag("section", {}, tag("h2", {}, "In figures"), tag("dl", {"class": "figures"}, *rows))


def _curves(history: History) -> Element:
    if not history.steps:
        return tag("section", {}, tag("h2", {}, "Curves"), tag("p", {}, "No step was done yet."))
    happened, again = marks(history), lost(history.run.events)
    kinds = {mark.kind for mark in happened}
    legend = [
        tag("li", {}, tag("b", {"class": kind}, letter), f" {meaning}")
        for kind, (letter, meaning) in MARKS.items()
        if kind in kinds
    ]
    if again:
        legend.append(tag("li", {}, tag("span", {"class": "swatch"}), " steps that were lost and done again"))
    drawn = [draw(chart, history.done, happened, again) for chart in charts(history)]
    return tag(
        "section",
        {},
        tag("h2", {}, "Curves"),
        tag("ul", {"class": "legend"}, *legend),
        tag("div", {"class": "charts"}, *drawn),
    )


def _events(history: History) -> Element:
    rows = [
        (
            event.at,
            event.state or "",
            "" if event.step is None else f"{event.step:,}",
            f"{event.steps_lost:,} steps, {event.seconds_lost:.1f} s" if event.steps_lost else "",
            event.text,
        )
        for event in history.run.events
    ]
    return _table("Events", ("at (UTC)", "state", "after step", "lost", "what happened"), rows)


def _attempts(history: History) -> Element:
    rows = [
        (each.at, str(each.number), f"{each.first_step:,}", str(each.world_size), str(each.micro_batch))
        for each in history.attempts
    ]
    return _table("Attempts", ("at (UTC)", "attempt", "from step", "workers", "micro-batch"), rows)


def _costs(history: History) -> Element:
    """What was held, by market and price."""
    rows = []
    for line, spent in ledger.by_line(history.entries):
        hours = spent.gpu_ms if line.resource == "GPU" else spent.cpu_ms
        rows.append(
            (
                line.holder,
                f"{line.type or ''} {line.resource}".strip(),
                line.market or ledger.UNLABELLED,
                f"{float(hours / ledger.MS_PER_HOUR):,.4f}",
                "not known" if spent.usd is None else f"{spent.usd:,.4f}",
                f"{line.price.usd_per_hour}, {line.price.basis}" if line.price else "not known",
            )
        )
    return _table("Cost", ("held by", "what", "market", "GPU- or CPU-hours", "USD", "USD an hour, and why"), rows)


def _lineage(history: History) -> Element:
    record = history.run.record
    parent = f"{record.parent.run_id}@{record.parent.step}" if record.parent else "none: the base model"
    kept = ", ".join(f"{each.step:,}" for each in history.checkpoints) or "none"
    rows = [
        ("base model", f"{record.base.name} at {record.base.revision}, licence {record.base.licence}"),
        ("weights from", parent),
        ("training data", f"dataset {record.dataset}"),
        ("evaluation data", f"dataset {record.evaluation}" if record.evaluation else "none"),
        *((f"file to {each.use} on", f"{each.name}, SHA-256 {each.sha256}") for each in record.sources),
        ("code", record.code_revision),
        *(("digests", f"{name} {value}") for name, value in _digests(record)),
        *((("reproduces", record.reproduces),) if record.reproduces else ()),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("checkpoints that are kept", kept),
        *(("published", f"{each.name}@{each.version}, SHA-256 {each.digest}") for each in history.published),
    ]
    return _table("Lineage", ("what", "which"), rows)


def _digests(record: RunRecord) -> list[tuple[str, str]]:
    shown = {"config", "code", "base", "licences", "checks"}
    found = record.digests.model_dump(include=shown) if record.digests else {}
    return [(name, value) for name, value in found.items() if value]


def _recipe(history: History) -> Element:
    text = yaml.safe_dump(history.run.record.recipe, sort_keys=False, allow_unicode=True)
    return tag("section", {}, tag("h2", {}, "Recipe"), tag("pre", {"tabindex": "0"}, text))


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Element:
    head = tag("thead", {}, tag("tr", {}, *(tag("th", {"scope": "col"}, column) for column in columns)))
    lines = [tag("tr", {}, *(tag("td", {}, cell) for cell in row)) for row in rows]
    table = tag("table", {}, head, tag("tbody", {}, *lines))
    return tag("section", {}, tag("h2", {}, title), tag("div", {"class": "wide", "tabindex": "0"}, table))
