"""A chart of curves as SVG, and what a script needs to say what is under the pointer; the standard library alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

WIDTH, HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 16, 22, 32
MOST_POINTS = 2000
"""Of a curve; of a longer one the smallest and the largest of neighbors are drawn."""
MOST_COLOURS = 8

type Points = list[tuple[int, float | None]]
"""(step, value) in the order of the steps; None where a line is interrupted."""


@dataclass(frozen=True)
class Series:
    """A curve and its validation, in one color."""

    label: str
    color: int
    """Of MOST_COLOURS, from 0."""
    line: Mapping[int, float] = field(default_factory=dict)
    """Numbers by step, ascending."""
    dots: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """Series over one pair of axes; at most MOST_COLOURS of them."""

    title: str
    unit: str
    series: Sequence[Series]
    may_be_logarithmic: bool = False
    """Whether a curve that falls by more than a decade is shown over a logarithmic axis."""

    def steps(self) -> list[int]:
        """All of them, ascending."""
        return sorted({step for one in self.series for curve in (one.line, one.dots) for step in curve})


@dataclass(frozen=True)
class _Axes:
    x: tuple[float, float]
    y: tuple[float, float]
    logarithmic: bool

    def across(self, step: float) -> float:
        return _LEFT + (step - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        low, high, value = (math.log10(it) for it in (*self.y, value)) if self.logarithmic else (*self.y, value)
        return _TOP + (high - value) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def thinned(curve: Mapping[int, float], most: int = MOST_POINTS) -> Points:
    """At most about `most` points that look the same: of neighbors the smallest and the largest, in their order.

    What is not finite interrupts the line wherever it is.
    """
    together = math.ceil(2 * len(curve) / most) if len(curve) > most else 1
    ends = (next(iter(curve), None), next(reversed(curve), None)) if curve else ()
    points: Points = []
    bucket: list[tuple[int, float]] = []

    def empty() -> None:
        if bucket:
            kept = {min(bucket, key=lambda it: it[1]), max(bucket, key=lambda it: it[1])}
            kept |= {it for it in (bucket[0], bucket[-1]) if it[0] in ends}
            points.extend(sorted(kept))
            bucket.clear()

    for step, value in curve.items():
        if math.isfinite(value):
            bucket.append((step, value))
            if len(bucket) == together:
                empty()
        else:
            empty()
            if points and points[-1][1] is not None:
                points.append((step, None))
    empty()
    return points


def ticks(low: float, high: float, about: int = 7) -> list[float]:
    """Round numbers within the bounds, a step of 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the bounds; powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [it for power in powers for factor in factors if low <= (it := factor * 10.0**power) <= high]


def number(value: float) -> str:
    """For reading: five digits, and all of what is before the point. The script writes numbers alike."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if abs(value) >= 1e4 or value == int(value):
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.5g}".replace("e-0", "e-")


def _tick(value: float) -> str:
    if abs(value) < 1e4:
        return f"{value:.6g}"
    size, letter = next(it for it in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= it[0])
    return f"{value / size:.6g}{letter}"


def _axes(chart: Chart, steps: tuple[int, int]) -> _Axes:
    curves = [curve for one in chart.series for curve in (one.line, one.dots)]
    values = [value for curve in curves for value in curve.values() if math.isfinite(value)] or [0.0]
    x = (float(steps[0]), float(steps[1])) if steps[0] < steps[1] else (steps[0] - 1.0, steps[0] + 1.0)
    low, high = min(values), max(values)
    if chart.may_be_logarithmic and low > 0 and high / low > 10:
        room = (high / low) ** 0.03
        return _Axes(x, (low / room, high * room), True)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return _Axes(x, (max(low - room, 0.0) if low >= 0 else low - room, high + room), False)


def draw(chart: Chart, identifier: str, steps: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """Draw a chart.

    Args:
        chart: with one step at least.
        identifier: of the SVG in its page.
        steps: the ends of its axis.

    Returns:
        The SVG, with a title and a description, and for the script what is drawn where.
    """
    axes = _axes(chart, steps)
    drawn = [(one, thinned(one.line), thinned(one.dots)) for one in chart.series]
    marks = [*_grid(axes), *_labels(chart, axes)]
    marks += [f'<path class="line k{one.color}" d="{_path(line, axes)}"/>' for one, line, _ in drawn if line]
    marks += [
        f'<circle class="dot k{one.color}" cx="{axes.across(step):.1f}" cy="{axes.up(value):.1f}" r="3.2"/>'
        for one, _, dots in drawn
        for step, value in dots
        if value is not None
    ]
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-labelledby="{identifier}-t {identifier}-d">'
        f'<title id="{identifier}-t">{escape(chart.title)}</title>'
        f'<desc id="{identifier}-d">{escape(_described(chart))}</desc>{"".join(marks)}<g class="pointer"></g></svg>'
    )
    data = {
        "x": axes.x,
        "y": axes.y,
        "log": axes.logarithmic,
        "box": [_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM],
        "series": [
            {
                "label": one.label,
                "color": one.color,
                "line": [point for point in line if point[1] is not None],
                "dots": [point for point in dots if point[1] is not None],
            }
            for one, line, dots in drawn
        ],
    }
    return svg, data


def _path(line: Points, axes: _Axes) -> str:
    parts, pen_is_down = [], False
    for position, (step, value) in enumerate(line):
        if value is None:
            pen_is_down = False
            continue
        parts.append(f"{'L' if pen_is_down else 'M'}{axes.across(step):.1f} {axes.up(value):.1f}")
        alone = not pen_is_down and (position + 1 == len(line) or line[position + 1][1] is None)
        parts += ["h0"] if alone else []  # with round ends this is a dot
        pen_is_down = True
    return "".join(parts)


def _grid(axes: _Axes) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    marks = []
    for value in log_ticks(*axes.y) if axes.logarithmic else ticks(*axes.y):
        y = axes.up(value)
        marks.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    for value in ticks(*axes.x, about=6):
        if value == int(value):
            x = axes.across(value)
            marks.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>')
            marks.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{_tick(value)}</text>')
    return [*marks, f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>']


def _labels(chart: Chart, axes: _Axes) -> list[str]:
    unit = ", ".join([*([chart.unit] if chart.unit else []), *(["logarithmic"] if axes.logarithmic else [])])
    return [
        f'<text class="unit" x="2" y="12">{escape(unit)}</text>',
        f'<text class="unit" x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>',
    ]


def _described(chart: Chart) -> str:
    """The ends of every curve, in words."""
    said = []
    for one in chart.series:
        for curve, what in ((one.line, one.label), (one.dots, f"{one.label}, validation")):
            finite = [(step, value) for step, value in curve.items() if math.isfinite(value)]
            if finite:
                (first, begin), (last, end) = finite[0], finite[-1]
                said.append(f"{what}: {number(begin)} at step {first}, {number(end)} at step {last}")
    return f"{chart.unit + ' ' if chart.unit else ''}by step. {'; '.join(said)}."


def last_of(chart: Chart) -> str:
    """The last numbers of a chart on a line, as the script writes those under the pointer."""
    last, said = chart.steps()[-1], []
    for one in chart.series:
        found = []
        for curve, what in (
            (one.line, one.label),
            (one.dots, "validation" if one.line else f"{one.label}, validation"),
        ):
            if curve:
                step = max(curve)
                found.append(f"{what} {number(curve[step])}{'' if step == last else f' (step {step})'}")
        said.append(", ".join(found))
    return f"step {last}: {'; '.join(said)}"
