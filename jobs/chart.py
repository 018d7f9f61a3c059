"""One chart as inline SVG: curves over steps, axes with their units, and marks for what happened. Pure.

Nothing is told by colour alone: curves differ in their dashes, marks have letters. What is longer than the chart is
wide is drawn by columns: their mean as the line, from lowest to highest as the band around it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal
from xml.etree.ElementTree import Element

from jobs.markup import tag

WIDTH, HEIGHT = 760, 250
LEFT, RIGHT, TOP, BOTTOM = 84, 744, 26, 206
"""The plot's own edges in the picture, in pixels."""

MARKS = {
    "failure": ("F", "failure"),
    "memory": ("O", "out of memory"),
    "move": ("M", "moved to other workers"),
    "attempt": ("R", "training went on from here"),
    "skipped": ("N", "step not finite, skipped"),
    "stop": ("S", "stopped"),
    "checkpoint": ("▲", "checkpoint that is kept"),
}
"""Each kind of mark: its letter in the charts, and what it means."""

MarkKind = Literal["failure", "memory", "move", "attempt", "skipped", "stop", "checkpoint"]

_LETTER_PX = 10.0


@dataclass(frozen=True)
class Curve:
    """Values by the number of steps that were done; where a value is None the line is broken."""

    name: str
    points: Sequence[tuple[int, float | None]]


@dataclass(frozen=True)
class Mark:
    """Something that happened after `step` steps."""

    kind: MarkKind
    step: int
    text: str


@dataclass(frozen=True)
class Span:
    """Steps that were done, lost and done again: after `first`, up to and with `last`."""

    first: int
    last: int


@dataclass(frozen=True)
class Chart:
    """Curves in one unit. `from_zero` has the axis begin there, whatever the values."""

    title: str
    unit: str
    curves: Sequence[Curve]
    from_zero: bool = True


@dataclass(frozen=True)
class Scale:
    """A straight line from values to pixels; `low` is below `high`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values from below `low` to above `high`: multiples of 1, 2 or 5 times a power of ten (Heckbert 1990).

    Equal limits are first moved apart; what is nearer to 0 than 1e-290, where quotients underflow, counts as 0.
    """
    low, high = (0.0 if abs(limit) < 1e-290 else limit for limit in (low, high))
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / about
    power = math.floor(math.log10(rough))
    factor = next((factor for factor in (1, 2, 5) if factor * 10.0**power >= rough), 10)
    # Whole multiples of a decimal string, since 3 * 0.1 is not 0.3.
    unit = float(f"{factor}e{power}")
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [float(f"{number * factor}e{power}") for number in range(first, last + 1)]


def label(value: float, spacing: float) -> str:
    """A tick's number, with as many digits as tell it from its neighbours."""
    if value == 0:
        return "0"
    last = math.floor(math.log10(spacing) + 1e-9)
    if last < -4 or abs(value) >= 1e7:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - last)
        mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, -last)}f}"


def draw(chart: Chart, steps: int, marks: Sequence[Mark], spans: Sequence[Span]) -> Element:
    """The chart of a run of so many steps, with its legend: a <figure>."""
    values = [value for curve in chart.curves for _, value in curve.points if value is not None]
    heights = _heights(values, chart.from_zero)
    down = Scale(heights[0], heights[-1], BOTTOM, TOP)
    across = Scale(0, max(1, steps), LEFT, RIGHT)
    picture = tag(
        "svg",
        {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "class": "chart"},
        tag("title", {}, f"{chart.title}, in {chart.unit}, by step"),
        tag("desc", {}, " ".join(_told(curve) for curve in chart.curves)),
        *(_span(span, across) for span in spans),
        *_axes(chart.unit, heights, down, across),
        *(part for number, curve in enumerate(chart.curves) for part in _curve(curve, number, across, down)),
        *_marks(marks, across),
    )
    legend = [_key(curve.name, number) for number, curve in enumerate(chart.curves)] if len(chart.curves) > 1 else []
    caption = tag("figcaption", {}, tag("h3", {}, chart.title), *legend)
    return tag("figure", {}, caption, picture)


def _heights(values: list[float], from_zero: bool) -> list[float]:
    """The ticks of the axis that goes up."""
    if not from_zero and values:
        return ticks(min(values), max(values), 5)
    highest = max(values, default=0.0)
    return ticks(min([0.0, *values]), highest if highest > 0 else 1.0, 5)


def _axes(unit: str, heights: list[float], down: Scale, across: Scale) -> Iterable[Element]:
    for height in heights:
        y = down(height)
        yield tag("line", {"class": "grid", "x1": LEFT, "x2": RIGHT, "y1": y, "y2": y})
        text = label(height, heights[1] - heights[0])
        yield tag("text", {"class": "tick", "x": LEFT - 8.0, "y": y + 4, "text-anchor": "end"}, text)
    for step in (tick for tick in ticks(0, across.high, 8) if tick <= across.high and tick == int(tick)):
        x = across(step)
        yield tag("line", {"class": "axis", "x1": x, "x2": x, "y1": BOTTOM, "y2": BOTTOM + 5.0})
        yield tag("text", {"class": "tick", "x": x, "y": BOTTOM + 18.0, "text-anchor": "middle"}, f"{step:,.0f}")
    yield tag("path", {"class": "axis", "d": f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"})
    middle = {"class": "unit", "text-anchor": "middle"}
    yield tag("text", {**middle, "x": (LEFT + RIGHT) / 2, "y": BOTTOM + 38.0}, "steps done")
    turned = f"translate(14 {(TOP + BOTTOM) / 2:g}) rotate(-90)"
    yield tag("text", {**middle, "transform": turned}, unit)


def _curve(curve: Curve, number: int, across: Scale, down: Scale) -> Iterable[Element]:
    """The line, and the band around it where several steps share a column."""
    for has_value, group in groupby(curve.points, lambda point: point[1] is not None):
        if not has_value:
            continue
        columns = _columns([(across(step), value) for step, value in group if value is not None])
        if any(low < high for _, low, _, high in columns):
            rim = [f"{x:.1f} {down(high):.1f}" for x, _, _, high in columns]
            rim += [f"{x:.1f} {down(low):.1f}" for x, low, _, _ in reversed(columns)]
            yield tag("path", {"class": f"band curve-{number}", "d": f"M{'L'.join(rim)}Z"})
        line = "L".join(f"{x:.1f} {down(mean):.1f}" for x, _, mean, _ in columns)
        alone = "h0" if len(columns) == 1 else ""  # a lone point is drawn as the round end of a line
        yield tag("path", {"class": f"curve curve-{number}", "d": f"M{line}{alone}"})


def _columns(points: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """(x, lowest, mean, highest) of each column: a pixel where there are more points than those, else of each point."""
    if len(points) <= RIGHT - LEFT:
        return [(x, y, y, y) for x, y in points]
    columns = []
    for _, group in groupby(points, lambda point: int(point[0])):
        there = list(group)
        heights = [y for _, y in there]
        columns.append((there[0][0], min(heights), math.fsum(heights) / len(heights), max(heights)))
    return columns


def _marks(marks: Sequence[Mark], across: Scale) -> Iterable[Element]:
    letters: list[float] = []
    for mark in marks:
        x = across(mark.step)
        letter, meaning = MARKS[mark.kind]
        told = tag("title", {}, f"after step {mark.step:,}: {meaning}: {mark.text}")
        if mark.kind == "checkpoint":
            corners = f"M{x:.1f} {BOTTOM - 9}l4.5 8h-9z"
            yield tag("g", {"class": "mark checkpoint"}, told, tag("path", {"d": corners}))
            continue
        level = sum(abs(x - other) < _LETTER_PX for other in letters) % 2  # two letters beside each other share no line
        letters.append(x)
        line = tag("line", {"x1": x, "x2": x, "y1": TOP, "y2": BOTTOM})
        text = tag("text", {"x": x, "y": TOP - 4 - 11.0 * level, "text-anchor": "middle"}, letter)
        yield tag("g", {"class": f"mark {mark.kind}"}, told, line, text)


def _span(span: Span, across: Scale) -> Element:
    left, right = across(span.first), across(span.last)
    told = tag("title", {}, f"steps {span.first + 1:,} to {span.last:,} were lost, and done again")
    height = float(BOTTOM - TOP)
    return tag("rect", {"class": "span", "x": left, "y": TOP, "width": right - left, "height": height}, told)


def _key(name: str, number: int) -> Element:
    line = tag("path", {"class": f"curve curve-{number}", "d": "M1 6H31"})
    return tag("span", {"class": "key"}, tag("svg", {"viewBox": "0 0 32 12", "aria-hidden": "true"}, line), name)


def _told(curve: Curve) -> str:
    """A curve in a sentence, for who hears the page."""
    there = [(step, value) for step, value in curve.points if value is not None]
    if not there:
        return f"{curve.name}: no values."
    lowest, highest = min(there, key=lambda point: point[1]), max(there, key=lambda point: point[1])
    return (
        f"{curve.name}: {there[0][1]:.4g} at step {there[0][0]:,}, {there[-1][1]:.4g} at step {there[-1][0]:,}; "
        f"lowest {lowest[1]:.4g} at step {lowest[0]:,}, highest {highest[1]:.4g} at step {highest[0]:,}."
    )
