"""Charts of runs as SVG text: pure functions from numbers to markup, coloured by the classes of `colours.css` and `style.css`.

Every chart carries a title and a description for people who do not see it. All text is escaped here; the results are
safe to place in a page as they are.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lvm_ray.report.series import Series, line_class, mark
from lvm_ray.report.words import count, percent

Point = tuple[float, float]
Interval = tuple[float, float]

GAUGE_OUTSIDE = 0.5  # how far beyond floor and ceiling a gauge reaches, in lengths of the way between them
MOST_POINTS = 240  # of a drawn line: more cannot be told apart
MOST_RINGS = 24  # of a drawn row of rings
WIDTH, HEIGHT = 360, 230  # of a chart with axes
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 24, 38  # what its axes and their words take of it


@dataclass(frozen=True)
class Mark:
    """A value on a gauge: its progress (0 the floor, 1 the ceiling) and, if wanted, its interval."""

    series: Series
    progress: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Line:
    """A run's loss: points (tokens, loss) in order, while training and of the sentences held out for validation."""

    series: Series
    points: Sequence[Point]
    validation: Sequence[Point] = ()


@dataclass(frozen=True)
class Dot:
    """A run in a chart of scale: how much of something it had, and its score with its interval."""

    series: Series
    amount: float
    score: float
    interval: Interval | None = None


def gauge(marks: Sequence[Mark], ends: tuple[str, str] | None = None) -> str:
    """The way from floor to ceiling with every mark on it, the last one on top, as wide as its place.

    What lies beyond is shown up to GAUGE_OUTSIDE, then held at the edge. `ends` are words under floor and ceiling;
    without them the gauge is small, for a table's cell, and shows no interval.
    """
    reached = [0.0, 1.0] + [one.progress for one in marks]
    if ends:
        reached += [end for one in marks for end in one.interval or ()]
    low, high = max(min(reached), -GAUGE_OUTSIDE), min(max(reached), 1 + GAUGE_OUTSIDE)

    def x(progress: float) -> float:
        held = max(low, min(high, progress))
        return 2 + 96 * (held - low) / (high - low)  # percent: 2 are left at each side

    height, middle = (42, 14) if ends else (14, 7)
    parts = [f'<line class="track" x1="{x(0):.2f}%" x2="{x(1):.2f}%" y1="{middle}" y2="{middle}"/>']
    for end in (0, 1):
        parts.append(f'<line class="end" x1="{x(end):.2f}%" x2="{x(end):.2f}%" y1="{middle - 5}" y2="{middle + 5}"/>')
    for end, word, anchor in zip((0, 1), ends or (), ("start", "end"), strict=False):
        # The word begins or ends where its tick stands.
        parts.append(f'<text x="{x(end):.2f}%" y="{height - 2}" text-anchor="{anchor}">{html.escape(word)}</text>')
    for one in marks:
        if one.interval and ends:
            left, right = x(one.interval[0]), x(one.interval[1])
            box = f'x="{left:.2f}%" width="{right - left:.2f}%" y="{middle - 4}" height="8" rx="4"'
            parts.append(f'<rect class="interval {one.series.look}" {box}/>')
    parts += [mark(one.series, f"{x(one.progress):.2f}%", middle, 6 if ends else 4) for one in marks]
    spoken = html.escape(", ".join(f"{one.series.name} {percent(one.progress)}" for one in marks))
    return (
        f'<svg class="gauge" role="img" width="100%" height="{height}" aria-label="{spoken} of the way from floor to ceiling">'
        f"{''.join(parts)}</svg>"
    )


def loss_chart(name: str, lines: Sequence[Line], floor: float | None, key: str) -> str:
    """Loss in nats a token against tokens trained on. `key` makes the ids of this chart unique in its page.

    The last line is on top; `floor`, a dashed one, is the loss of an answer without a model; rings are the validation's. Needs at
    least one point.
    """
    known = [line for line in lines if line.points]
    thinned = [Line(line.series, thin(line.points, MOST_POINTS), thin(line.validation, MOST_RINGS)) for line in known]
    losses = [loss for line in thinned for _, loss in (*line.points, *line.validation)] + ([] if floor is None else [floor])
    y, parts = _upright(losses)
    x_high = max(tokens for line in known for tokens, _ in line.points) or 1.0
    x = _across(0, x_high)
    parts += [_under(x(tick), count(tick)) for tick in ticks(0, x_high, 4) if tick <= x_high]
    parts += _axes("loss of answer tokens, nats", "tokens trained on")
    if floor is not None:
        parts.append(f'<line class="floor" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(floor):.1f}" y2="{y(floor):.1f}"/>')
    for line in thinned:
        path = " ".join(f"{x(tokens):.1f},{y(loss):.1f}" for tokens, loss in line.points)
        last_x, last_y = x(line.points[-1][0]), y(line.points[-1][1])
        parts.append(f'<polyline class="{line_class(line.series)}" points="{path}"/>')
        parts.append(mark(line.series, f"{last_x:.1f}", round(last_y, 1), 3))
    # Above all lines.
    for line in thinned:
        for tokens, loss in line.validation:
            parts.append(f'<circle class="held-out {line.series.look}" cx="{x(tokens):.1f}" cy="{y(loss):.1f}" r="3.5"/>')
    spoken = "; ".join(
        f"{line.series.name}: {line.points[0][1]:.2f} at first, {line.points[-1][1]:.2f} after {count(line.points[-1][0])} tokens"
        + (f", {line.validation[-1][1]:.2f} on held-out sentences" if line.validation else "")
        for line in known
    )
    return _chart(f"{name}: loss while training", spoken, key, parts)


def scale_chart(name: str, score: str, amount: str, dots: Sequence[Dot], key: str) -> str:
    """Score with its interval against how much of something each run had, on a scale of powers of ten.

    `score` and `amount` are the words of the axes, `key` makes the ids of this chart unique in its page. Needs at least one dot;
    amounts are above zero.
    """
    scores = [value for dot in dots for value in (dot.score, *(dot.interval or ()))]
    y, parts = _upright(scores)
    logs = [math.log10(dot.amount) for dot in dots]
    edge = 0.1 * ((max(logs) - min(logs)) or 1.0)
    across = _across(min(logs) - edge, max(logs) + edge)

    def x(value: float) -> float:
        return across(math.log10(value))

    low, high = 10 ** (min(logs) - edge), 10 ** (max(logs) + edge)
    for tick in round_amounts(low, high):
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(_under(x(tick), count(tick)))
    parts += _axes(score, amount)
    ordered = sorted(dots, key=lambda dot: dot.amount)
    if len({dot.amount for dot in dots}) == len(dots):  # a line through runs that had the same would say nothing
        path = " ".join(f"{x(dot.amount):.1f},{y(dot.score):.1f}" for dot in ordered)
        parts.append(f'<polyline class="through" points="{path}"/>')
    for dot in ordered:
        if dot.interval:
            ends = f'y1="{y(dot.interval[0]):.1f}" y2="{y(dot.interval[1]):.1f}"'
            parts.append(f'<line class="whisker {dot.series.look}" x1="{x(dot.amount):.1f}" x2="{x(dot.amount):.1f}" {ends}/>')
    parts += [mark(dot.series, f"{x(dot.amount):.1f}", round(y(dot.score), 1), 4.5) for dot in ordered]
    spoken = "; ".join(f"{dot.series.name}: {dot.score:.3g} at {count(dot.amount)}" for dot in ordered)
    return _chart(f"{name}: {score} against {amount}", spoken, key, parts)


def speed_chart(series: Series, points: Sequence[Point]) -> str:
    """Tokens a second against tokens trained on, as a small line without axes from zero up. Needs at least one point."""
    width, height, edge = 200, 26, 3
    thinned = thin(points, MOST_POINTS)
    x_low, x_high = thinned[0][0], thinned[-1][0]
    y_high = max(speed for _, speed in thinned) or 1.0
    path = " ".join(
        f"{edge + (width - 2 * edge) * (tokens - x_low) / ((x_high - x_low) or 1.0):.1f},"
        f"{height - edge - (height - 2 * edge) * speed / y_high:.1f}"
        for tokens, speed in thinned
    )
    speeds = [speed for _, speed in points]
    spoken = html.escape(f"{series.name}: {min(speeds):,.0f} to {max(speeds):,.0f} tokens a second")
    return (
        f'<svg class="speed" role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-label="{spoken}">'
        f'<line class="grid" x1="0" x2="{width}" y1="{height - 1}" y2="{height - 1}"/>'
        f'<polyline class="{line_class(series)}" points="{path}"/></svg>'
    )


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: means of neighbours, the last point kept as the end of the last group."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def ticks(low: float, high: float, about: int) -> list[float]:
    """About so many round numbers that cover low..high, steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        high = low + 1.0
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [round(k * step, 10) for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def round_amounts(low: float, high: float) -> list[float]:
    """Round numbers within low..high on a scale of powers of ten, at most about five: powers, or 1, 2 and 5 times such, or even
    steps where all lie within one of those."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    finer = [factor * power for power in powers for factor in (1, 2, 5) if low <= factor * power <= high]
    coarse = [power for power in powers if low <= power <= high]
    if len(finer) < 2:
        return [tick for tick in ticks(low, high, 5) if low <= tick <= high]
    return finer if len(finer) <= 5 else coarse[:: math.ceil(len(coarse) / 5)]


def _upright(values: Sequence[float]) -> tuple[Callable[[float], float], list[str]]:
    """The place of a value on the upright axis, and the lines and numbers of its ticks."""
    known = ticks(min(values), max(values), 5)
    low, high = min(*values, *known), max(*values, *known)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / ((high - low) or 1.0)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in known
    ]
    return y, parts


def _across(low: float, high: float) -> Callable[[float], float]:
    return lambda value: LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / ((high - low) or 1.0)


def _under(x: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{html.escape(text)}</text>'


def _axes(upright: str, across: str) -> list[str]:
    return [
        f'<text class="axis" x="0" y="10">{html.escape(upright)}</text>',
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(across)}</text>',
    ]


def _chart(title: str, spoken: str, key: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">{html.escape(title)}</title>'
        f'<desc id="{key}-text">{html.escape(spoken)}</desc>{"".join(parts)}</svg>'
    )
