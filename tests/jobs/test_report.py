"""The report of a run: its charts can be read back, its text stays text, and a real browser shows it."""

import json
import re
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from xml.etree.ElementTree import Element

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster import keys, ledger, records
from cluster.folder import FolderStore
from cluster.ledger import Line, Price
from cluster.meter import Meter
from cluster.records import BaseModelRef, CheckpointManifest, CheckpointRef, FileRecord, RunEvent, RunRecord
from cluster.store import Store
from jobs import chart, history, report, runs
from jobs.chart import Chart, Curve, Mark, Span, draw
from jobs.progress import StepRecord
from tests.jobs import browser

HOSTILE = "</style></title><script>document.title='taken'</script><img src=x onerror=alert(1)>\"'&lt;\x00"


def write_run(store: Store, text: str = "calm") -> str:
    """A run that fails after 30 steps, goes on from 20, moves at 40, skips step 45, and ends at 60; `text` all over."""
    run_id = "told-20261126-101500-abcd"
    record = RunRecord(
        run_id=run_id,
        recipe={"name": text, "method": {"kind": "lora", text: [text]}, "publish": None},
        dataset="d" * 64,
        evaluation="e" * 64,
        code_revision=text,
        versions={text: text},
        base=BaseModelRef(name="tiny", revision=text, licence=text),
        parent=CheckpointRef(run_id="earlier", step=300),
        created_at=records.now(),
    )
    store.create(keys.run_record(run_id), record.to_bytes())
    runs.tell(store, run_id, f"submitted by {text}", "preparing")
    work(store, run_id, 0, 30)
    runs.tell(store, run_id, f"failure 1 of 3 that are allowed: {text}", "resuming", kind="failure")
    work(store, run_id, 20, 40, lost=10)
    runs.tell(store, run_id, f"moved: {text}", "resuming", kind="move")
    work(store, run_id, 40, 60, skipped=45)
    runs.tell(store, run_id, "succeeded after 60 steps", "succeeded", step=60)
    manifest = CheckpointManifest(
        run_id=run_id,
        step=60,
        attempt=3,
        updates=59,
        samples_seen=480,
        world_size=2,
        metric=0.5,
        files=(FileRecord(file="state", size=4096, sha256="0" * 64),),
        created_at=records.now(),
    )
    store.put(keys.checkpoint_manifest(run_id, 60), manifest.to_bytes())
    pay(store, record, text)
    return run_id


def pay(store: Store, record: RunRecord, text: str) -> None:
    """Half an hour of two GPUs on spot nodes at a price, and of one on a node whose market is `text`, without any."""
    clock = iter([0.0, 0.0, 1800.0])
    meter = Meter(record.run_id, text, None, "d", clock=lambda: next(clock), started_ms=ledger.to_ms(record.created_at))
    price = Price(usd_per_hour=Decimal(3), basis=text)
    spot = Line(holder="worker", resource="GPU", type="H100", market="spot", amount=Decimal(2), price=price)
    meter.hold([spot, spot.model_copy(update={"market": text, "amount": Decimal(1), "price": None})])
    meter.hold([])
    meter.save(store)


def work(store: Store, run_id: str, first: int, end: int, lost: int = 0, skipped: int | None = None) -> None:
    """One attempt at steps `first` to `end`, with a skipped one and an evaluation after every tenth."""
    number = runs.begin_attempt(store, run_id, first, 2, 1)
    text = f"attempt {number}: training from step {first}"
    runs.tell(store, run_id, text, "running", kind="attempt", step=first, steps_lost=lost, seconds_lost=0.5 * lost)
    lines = [step_line(step, is_skipped=step == skipped) for step in range(first, end)]
    store.put(keys.metrics_part(run_id, number, first), "".join(f"{line}\n" for line in lines).encode())
    if skipped is not None:
        runs.tell(store, run_id, "the loss is nan, so it is skipped", kind="skipped", step=skipped + 1)
    for step in range(first + 10, end + 1, 10):
        loss = 3.1 - step / 60
        runs.tell(store, run_id, f"evaluation loss {loss}", kind="evaluation", step=step, evaluation_loss=loss)


def step_line(step: int, is_skipped: bool = False) -> str:
    return StepRecord(
        step=step,
        loss=None if is_skipped else 3.0 * 0.97**step,
        grad_norm=None if is_skipped else 1.0 + (step % 7) / 10,
        lr=2e-4 * (60 - step) / 60,
        tokens=1000,
        supervised_tokens=400,
        samples_seen=8 * (step + 1),
        tokens_per_s=2000.0 + step,
        step_s=0.5,
        cpu_s=0.4,
        data_wait_s=0.01,
        checkpoint_stall_s=0.002,
        padding_fraction=0.0,
        world_size=2,
        memory_bytes=3 << 30,
        skipped=is_skipped,
    ).to_json()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> history.History:
    store = FolderStore(tmp_path_factory.mktemp("store"))
    return history.read(store, write_run(store))


class Parsed(HTMLParser):
    """A page as a browser reads it: its elements with their attributes, and the text of each, by element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.elements[-1][0], data))

    @property
    def text(self) -> str:
        return "\n".join(data for tag, data in self.texts if tag != "style")


numbers = st.floats(-1e12, 1e12).map(lambda value: float(f"{value:.6e}"))


@given(numbers, numbers, st.integers(2, 10))
@example(2.225074e-313, -100000100000.0, 2)
@example(-2.225074e-313, 100000100000.0, 2)
def test_ticks_are_round_and_even_and_hold_all_values_between_them(one: float, other: float, about: int) -> None:
    low, high = sorted((one, other))
    if high - low < 1e-7 * max(abs(low), abs(high), 1e-290):
        high = low
    ticks = chart.ticks(low, high, about)
    assert ticks[0] - 1e-290 <= low
    assert high <= ticks[-1] + 1e-290
    assert 2 <= len(ticks) <= about + 3
    spacing = ticks[1] - ticks[0]
    assert np.allclose(np.diff(ticks), spacing, rtol=1e-6)
    assert f"{spacing:.4e}"[0] in "125"
    labels = [chart.label(tick, spacing) for tick in ticks]
    assert len(set(labels)) == len(labels)
    assert np.allclose([float(text.replace(",", "")) for text in labels], ticks, rtol=1e-9, atol=spacing / 1e6)


values = st.floats(-1e9, 1e9).map(lambda value: round(value, 3))


@given(st.lists(values | st.none(), min_size=1, max_size=60), st.booleans())
def test_who_reads_the_chart_by_its_axes_reads_the_values(given_values: list[float | None], from_zero: bool) -> None:
    points = [(step + 1, value) for step, value in enumerate(given_values)]
    drawn = draw(Chart("Loss", "nats", [Curve("training", points)], from_zero), len(points), [], [])
    value_of, step_of, error = axes(drawn)
    read = [
        (round(step_of(x)), value_of(y))
        for path in drawn.iter("path")
        if path.get("class") == "curve curve-0"
        for x, y in coordinates(path)
    ]
    there = [(step, value) for step, value in points if value is not None]
    assert [step for step, _ in read] == [step for step, _ in there]
    assert np.allclose([value for _, value in read], [value for _, value in there], rtol=0, atol=error)


def axes(drawn: Element) -> tuple[Any, Any, float]:
    """From pixels to values and to steps, by the labels alone; and how much of a value a drawn tenth of a pixel is."""
    labels = [text for text in drawn.iter("text") if text.get("class") == "tick"]
    up = [(float(text.get("y", "")) - 4, number(text)) for text in labels if text.get("text-anchor") == "end"]
    along = [(float(text.get("x", "")), number(text)) for text in labels if text.get("text-anchor") == "middle"]
    (y0, v0), (y1, v1) = up[0], up[-1]
    (x0, s0), (x1, s1) = along[0], along[-1]
    slope = (v1 - v0) / (y1 - y0)
    return lambda y: v0 + (y - y0) * slope, lambda x: s0 + (x - x0) * (s1 - s0) / (x1 - x0), abs(slope) * 0.11


def number(text: Element) -> float:
    return float((text.text or "").replace(",", ""))


def coordinates(path: Element) -> list[tuple[float, float]]:
    pairs = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.get("d", ""))
    return [(float(x), float(y)) for x, y in pairs]


def test_a_curve_of_more_steps_than_pixels_hides_no_outlier() -> None:
    points = [(step, 1.0) for step in range(1, 100_001)]
    points[54_321] = (54_322, 9.0)
    drawn = draw(Chart("Loss", "nats", [Curve("training", points)]), 100_000, [], [])
    value_of, step_of, error = axes(drawn)
    band = next(path for path in drawn.iter("path") if path.get("class") == "band curve-0")
    peak = min(coordinates(band), key=lambda point: point[1])
    assert abs(value_of(peak[1]) - 9.0) <= error
    assert abs(step_of(peak[0]) - 54_322) < 2 * 100_000 / (chart.RIGHT - chart.LEFT)
    assert len(coordinates(band)) < 2 * (chart.RIGHT - chart.LEFT + 2), "the file stays small whatever the run's length"


def test_a_mark_stands_where_the_steps_before_it_ended(told: history.History) -> None:
    found = [(mark.kind, mark.step) for mark in history.marks(told)]
    assert found == [
        ("attempt", 20),
        ("failure", 30),
        ("move", 40),
        ("skipped", 46),
        ("checkpoint", 60),
    ]
    assert history.lost(told.run.events) == [Span(20, 30)]


def test_the_end_of_a_run_that_failed_is_marked_after_its_last_step(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    run_id = write_run(store)
    runs.tell(store, run_id, "failed: at last", "failed")
    assert Mark("failure", 60, "failed: at last") in history.marks(history.read(store, run_id))


def test_an_evaluation_of_lost_steps_gives_way_to_the_one_that_was_measured_again(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    run_id = write_run(store)
    runs.tell(store, run_id, "again", kind="evaluation", step=30, evaluation_loss=0.25)
    measured = history.evaluations(history.read(store, run_id))
    assert [step for step, _ in measured] == [10, 20, 30, 40, 50, 60]
    assert dict(measured)[30] == 0.25


def test_the_totals_are_those_of_the_steps_that_count(told: history.History) -> None:
    totals = history.totals(told)
    assert totals["steps done"] == "60"
    assert totals["samples"] == "480"
    assert totals["tokens"] == "60,000, of which 24,000 supervised"
    assert totals["time in steps"] == "30.0 s, 2,000 tokens/s"
    assert totals["waiting for data"] == "0.6 s, 2.0 % of the time in steps"
    assert totals["done again"] == "10 steps, 5.0 s"
    assert totals["cost so far"] == "1.50 GPU-hours; $3.00 and what has no price"
    assert totals["workers were held for"] == "30 min 0 s"


def test_costs_are_told_by_market(told: history.History) -> None:
    text = Parsed(report.page(told)).text
    for row in (["worker", "H100 GPU", "spot", "1.0000", "3.0000", "3, calm"], ["calm", "0.5000", "not known"]):
        assert "\n".join(row) in text


@settings(max_examples=30)
@given(st.text(min_size=1) | st.just(HOSTILE))
def test_no_text_of_a_run_becomes_markup(text: str) -> None:
    with TemporaryDirectory() as folder, TemporaryDirectory() as calm:
        pages = []
        for where, what in ((folder, text), (calm, "calm")):
            store = FolderStore(Path(where))
            told = history.read(store, write_run(store, what))
            pages.append(Parsed(report.page(told)))
    ours, plain = pages
    assert [name for name, _ in ours.elements] == [name for name, _ in plain.elements]
    kept = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", text)
    assert f"submitted by {kept}".split() == next(data for _, data in ours.texts if "submitted by" in data).split()


def test_the_page_needs_nothing_beside_itself(told: history.History) -> None:
    page = report.page(told)
    parsed = Parsed(page)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {name for name, _ in parsed.elements}
    assert not {"src", "href"} & {name for _, attributes in parsed.elements for name in attributes}
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert "url(" not in page
    assert "@import" not in page
    (policy,) = [found["content"] for _, found in parsed.elements if found.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_run_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    run_id = write_run(store)
    for item in [*store.list(keys.metrics_prefix(run_id)), *store.list(keys.attempts_prefix(run_id))]:
        store.delete(item.key)
    assert "No step was done yet." in report.page(history.read(store, run_id))


STYLE = (Path(report.__file__).parent / "report.css").read_text()
THEMES: dict[str, dict[str, str]] = {
    scheme: dict(re.findall(r"(--[\w-]+): (#\w+)", block))
    for scheme, block in zip(("light", "dark"), re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL), strict=True)
}


@pytest.mark.parametrize("scheme", THEMES)
def test_every_colour_stands_out_from_what_it_is_drawn_on(scheme: str) -> None:
    """WCAG 2.2: 4.5 to 1 for text (1.4.3), 3 to 1 for what a picture is understood by (1.4.11)."""
    theme = THEMES[scheme]
    assert theme.keys() == THEMES["light"].keys()
    for name, colour in theme.items():
        if name in ("--page", "--box", "--line", "--grid", "--span"):
            continue
        wanted = 3.0 if name.startswith("--curve") else 4.5
        for ground in ("--page", "--box"):
            assert contrast(colour, theme[ground]) >= wanted, (name, ground)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_kind_of_mark_has_a_letter_of_its_own_and_a_colour() -> None:
    assert len({letter for letter, _ in chart.MARKS.values()}) == len(chart.MARKS)
    for kind in chart.MARKS:
        assert f".mark.{kind}, b.{kind} {{" in STYLE
        assert f"--{kind}" in THEMES["light"]


def test_a_browser_shows_axes_units_events_and_none_of_the_runs_text_as_markup(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    told = history.read(store, write_run(store, HOSTILE))
    page = tmp_path / "report.html"
    page.write_text(report.page(told), encoding="utf-8")
    shown = Parsed(browser.dom(page))
    assert not {"script", "img"} & {name for name, _ in shown.elements}
    assert ("title", f"{told.run.record.run_id}: succeeded") in shown.texts
    units = [chart.unit for chart in report.charts(told)]
    assert [data for name, data in shown.texts if name == "text" and data in {*units, "steps done"}] == [
        text for unit in units for text in ("steps done", unit)
    ]
    for event in told.run.events:
        assert event.text.replace("\x00", "\N{REPLACEMENT CHARACTER}") in shown.text
    letters = [data for name, data in shown.texts if name == "text" and data in "FMRNS"]
    assert "".join(letters) == "RFMN" * len(units), "every chart has every event"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_paints_every_curve_and_mark(
    scheme: Literal["light", "dark"], told: history.History, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text(report.page(told), encoding="utf-8")
    pixels = browser.picture(page, scheme, tmp_path / "report.png")
    assert painted(pixels, THEMES[scheme]["--page"]).mean() > 0.5, "the theme is the one that was asked for"
    charts = report.charts(told)
    assert len(wide_runs(painted(pixels, THEMES[scheme]["--curve-0"]))) == len(charts)
    assert painted(pixels, THEMES[scheme]["--faint"]).sum(axis=0).max() > 300 * len(charts), "axes that go up"
    assert len(wide_runs(painted(pixels, THEMES[scheme]["--curve-1"]))) == 2, "evaluation loss, and waiting for data"
    for kind in ("failure", "move", "attempt", "skipped"):
        assert painted(pixels, THEMES[scheme][f"--{kind}"]).sum(axis=0).max() > 80 * len(charts), f"{kind}: dashes"


def painted(pixels: browser.Pixels, colour: str) -> Any:
    return (pixels == [int(colour[place : place + 2], 16) for place in (1, 3, 5)]).all(axis=2)


def wide_runs(there: Any) -> list[tuple[int, int]]:
    """Ranges of rows that hold something, 100 empty rows apart at least, and are painted over a third of the width."""
    rows = np.flatnonzero(there.any(axis=1))
    groups = np.split(rows, np.flatnonzero(np.diff(rows) > 100) + 1)
    least = browser.WIDTH * browser.SCALE / 3
    wide = [group for group in groups if there[group[0] : group[-1] + 1].any(axis=0).sum() > least]
    return [(int(group[0]), int(group[-1])) for group in wide]


def test_the_command_writes_the_page_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.cli import app

    store = FolderStore(tmp_path / "store")
    run_id = write_run(store)
    file = tmp_path / "out.html"
    app(["report", run_id, "--store", store.url, "--out", str(file)], standalone_mode=False)
    assert capsys.readouterr().out.strip() == str(file)
    assert run_id in file.read_text()


def test_an_event_written_before_there_were_kinds_is_read(tmp_path: Path) -> None:
    old = {"at": records.now(), "state": "running", "text": "attempt 1", "step": 0, "steps_lost": 0, "seconds_lost": 0}
    assert RunEvent.model_validate_json(json.dumps(old)).kind is None
