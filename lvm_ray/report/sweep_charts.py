"""The charts of a sweep as SVG text: pure functions from trials to markup, coloured by the classes of `style.css` and
`sweep.css`.

All text is escaped here. An objective is small where it is good.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvm_ray.report.charts import ticks
from lvm_ray.report.words import finite

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 40
MAGNITUDES = 8.0  # a range of positive numbers whose ends differ by this factor is drawn by orders of magnitude
SHOWN_NAMES = 14  # letters of a category


@dataclass(frozen=True)
class Dot:
    """A trial as the charts see it: its settings, its objective, and whether it ran to its end. `search`: or was a repeat."""

    number: int
    settings: Mapping[str, Any]
    value: float
    whole: bool
    search: bool = True


@dataclass(frozen=True)
class Axis:
    """Where values stand between two places: numbers evenly or by orders of magnitude, everything else in the order of
    `names`."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    names: tuple[str, ...] = ()

    def place(self, value: Any, start: float, end: float) -> float:
        if self.names:
            part = (self.names.index(str(value)) + 0.5) / len(self.names)
        else:
            low, high, here = ((math.log(one) if self.log else one) for one in (self.low, self.high, float(value)))
            part = 0.5 if high == low else (here - low) / (high - low)
        return start + (end - start) * part

    def marks(self) -> list[tuple[Any, str]]:
        """(value, word) of what is written along it."""
        if self.names:
            return [(name, name if len(name) <= SHOWN_NAMES else f"{name[: SHOWN_NAMES - 1]}…") for name in self.names]
        if not self.log:
            return [(tick, f"{tick:.4g}") for tick in ticks(self.low, self.high, 4) if self.low <= tick <= self.high]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        inside = [value for value in found if self.low <= value * 1.0001 and value <= self.high * 1.0001]
        return [(value, f"{value:g}") for value in inside[:: max(1, math.ceil(len(inside) / 6))]]


def axis_of(values: Sequence[Any], room: float = 0.0) -> Axis:
    """The axis for these values. `room`: beyond its ends, as a part of its length."""
    numbers = [finite(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers) or not known:
        return Axis(names=tuple(dict.fromkeys(map(str, values))))
    low, high = min(known), max(known)
    if low > 0 and high / low >= MAGNITUDES:
        factor = (high / low) ** room
        return Axis(low / factor, high * factor, log=True)
    more = (high - low or abs(high) or 1.0) * room
    return Axis(low - more, high + more)


def history(dots: Sequence[Dot], goal: str) -> str:
    """Each trial's objective in the order of their numbers, and the best so far as a line."""
    tried = [dot for dot in dots if dot.search]
    x, y = Axis(-0.5, max(dot.number for dot in tried) + 0.5), axis_of([dot.value for dot in tried], 0.06)
    best, path = math.inf, []
    for dot in tried:
        before, best = best, min(best, dot.value) if dot.whole else best
        if math.isfinite(best):
            here = _x(x, dot.number)
            path += [f"{here:.1f},{_y(y, before):.1f}"] if math.isfinite(before) else []
            path.append(f"{here:.1f},{_y(y, best):.1f}")
    last = max(dot.number for dot in tried)
    marks = [tick for tick in ticks(0, last, 5) if tick == int(tick) and tick <= last]
    drawn = [_grid(y), _below([(_x(x, tick), f"{tick:.0f}") for tick in marks], "trial"), _above(goal)]
    drawn.append(f'<polyline class="line model" points="{" ".join(path)}"/>')
    drawn += [_disc(_x(x, dot.number), _y(y, dot.value), dot) for dot in tried]
    return _chart("Optimisation history", f"{len(tried)} trials, the best of them {best:.4g}", drawn)


def curve(key: str, dots: Sequence[Dot], means: Sequence[tuple[Any, float, tuple[float, float] | None]], goal: str) -> str:
    """The objective against one setting. `means`: (setting, mean, interval) over new seeds."""
    known = [dot for dot in dots if dot.search and key in dot.settings]
    x = axis_of([dot.settings[key] for dot in known] + [value for value, _, _ in means], 0.04)
    levels = [dot.value for dot in known] + [end for _, mean, interval in means for end in (mean, *(interval or ()))]
    # An interval of few seeds may be far wider than all trials lie apart: it then runs out of the chart.
    spread = max(dot.value for dot in known) - min(dot.value for dot in known) or abs(known[0].value) * 0.05
    low, high = min(dot.value for dot in known) - spread, max(dot.value for dot in known) + spread
    y = axis_of([min(max(level, low), high) for level in levels], 0.06)
    drawn = [_grid(y), _below([(_x(x, value), word) for value, word in x.marks()], key), _above(goal)]
    for value, mean, interval in means:
        here = _x(x, value)
        if interval:
            ends = [_y(y, min(max(end, y.low), y.high)) for end in interval]
            drawn.append(f'<line class="bar" x1="{here:.1f}" x2="{here:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>')
        if y.low <= mean <= y.high:
            drawn.append(f'<rect class="mean" x="{here - 4:.1f}" y="{_y(y, mean) - 4:.1f}" width="8" height="8"/>')
    drawn += [_disc(_x(x, dot.settings[key]), _y(y, dot.value), dot) for dot in known]
    best = min(known, key=lambda dot: dot.value)
    return _chart(key, f"{goal} is lowest, {best.value:.4g}, at {best.settings[key]}", drawn)


def parallel(dots: Sequence[Dot], keys: Sequence[str], goal: str) -> str:
    """A line for each trial through all of its settings to its objective; the best third stands out."""
    width, height, top, bottom = 760, 280, 34, 16
    tried = [dot for dot in dots if dot.search and dot.whole and all(key in dot.settings for key in keys)]
    names = [*keys, goal]
    axes = [axis_of([dot.settings[key] for dot in tried]) for key in keys] + [axis_of([dot.value for dot in tried])]
    places = [70 + (width - 140) * k / (len(names) - 1) for k in range(len(names))]
    drawn = []
    for k, (name, axis, place) in enumerate(zip(names, axes, places, strict=True)):
        anchor = "start" if k == 0 else "end" if k == len(names) - 1 else "middle"
        side, towards = ("end", -6) if k == 0 else ("start", 6)
        drawn.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{height - bottom}"/>')
        drawn.append(f'<text class="axis" x="{place:.1f}" y="14" text-anchor="{anchor}">{html.escape(name)}</text>')
        for value, word in axis.marks():
            level = axis.place(value, height - bottom, top) + 4
            drawn.append(f'<text x="{place + towards:.1f}" y="{level:.1f}" text-anchor="{side}">{html.escape(word)}</text>')
    order = sorted(tried, key=lambda dot: -dot.value)
    for place, dot in enumerate(order):
        values = [*(dot.settings[key] for key in keys), dot.value]
        points = " ".join(
            f"{x:.1f},{axis.place(v, height - bottom, top):.1f}" for x, axis, v in zip(places, axes, values, strict=True)
        )
        kind = "best" if place >= len(order) - math.ceil(len(order) / 3) else "other"
        drawn.append(
            f'<polyline class="thread {kind}" points="{points}"><title>trial {dot.number}: {dot.value:.4g}</title></polyline>'
        )
    return _chart("Parallel coordinates", f"{len(tried)} trials by {', '.join(keys)}", drawn, width, height)


def importance(parts: Mapping[str, float]) -> str:
    """Bars of what part of the differences each setting explains by itself."""
    row, height = 34, 34 * len(parts) + 4
    drawn = []
    for k, (key, part) in enumerate(sorted(parts.items(), key=lambda entry: -entry[1])):
        top = k * row
        drawn.append(f'<text class="name" x="0" y="{top + 12}">{html.escape(key)}</text>')
        drawn.append(f'<rect class="after" x="0" y="{top + 17}" width="{max(300 * part, 1):.1f}" height="10" rx="1.5"/>')
        drawn.append(f'<text x="{max(300 * part, 1) + 7:.1f}" y="{top + 26}">{100 * part:.0f} %</text>')
    return _chart("Importance", "; ".join(f"{key} {100 * part:.0f} %" for key, part in parts.items()), drawn, WIDTH, height)


def pareto(points: Sequence[tuple[int, float, float]], best: Sequence[int], names: tuple[str, str]) -> str:
    """Two objectives against each other, (number, first, second) of each trial; the numbers in `best` are beaten by none."""
    x, y = (axis_of([point[k] for point in points], 0.06) for k in (2, 1))
    drawn = [_grid(y), _below([(_x(x, value), word) for value, word in x.marks()], names[1]), _above(names[0])]
    line = sorted((point for point in points if point[0] in best), key=lambda point: point[2])
    drawn.append(f'<polyline class="line model" points="{" ".join(f"{_x(x, c):.1f},{_y(y, b):.1f}" for _, b, c in line)}"/>')
    drawn += [_disc(_x(x, c), _y(y, b), Dot(number, {}, b, number in best)) for number, b, c in points]
    return _chart("Pareto front", f"{len(line)} of {len(points)} trials are beaten by none in both", drawn)


def _x(axis: Axis, value: Any) -> float:
    return axis.place(value, LEFT, WIDTH - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return axis.place(value, HEIGHT - BOTTOM, TOP)


def _grid(y: Axis) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(y, value):.1f}" y2="{_y(y, value):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{_y(y, value) + 4:.1f}" text-anchor="end">{html.escape(word)}</text>'
        for value, word in y.marks()
    )


def _below(marks: Sequence[tuple[float, str]], name: str) -> str:
    words = [f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{html.escape(word)}</text>' for x, word in marks]
    return (
        "".join(words) + f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(name)}</text>'
    )


def _above(name: str) -> str:
    return f'<text class="axis" x="0" y="12">{html.escape(name)}</text>'


def _disc(x: float, y: float, dot: Dot) -> str:
    """A trial: a disc; a ring where it was stopped early, or is beaten."""
    kind = "dot model" if dot.whole else "ring model"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>trial {dot.number}: {dot.value:.4g}</title></circle>'


def _chart(title: str, text: str, drawn: Sequence[str], width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" style="max-width: {1.5 * width:.0f}px">'
        f"<title>{html.escape(title)}</title><desc>{html.escape(text)}</desc>{''.join(drawn)}</svg>"
    )
