"""Charts as SVG text: pure functions from numbers to markup, coloured by the classes of `colours.css` and `style.css`.

Every chart carries a title and a description for people who do not see it. All text is escaped here; the results are
safe to place in a page as they are. A role is "student", "teacher" or "model" (a run without comparison).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lvm_ray.report.words import count, percent

Role = Literal["student", "teacher", "model"]
Point = tuple[float, float]

GAUGE_OUTSIDE = 0.5  # how far beyond floor and ceiling a gauge reaches, in lengths of the way between them
MOST_POINTS = 240  # of a drawn line: more cannot be told apart
MOST_RINGS = 24  # of a drawn row of rings


@dataclass(frozen=True)
class Mark:
    """A value on a gauge: its progress (0 the floor, 1 the ceiling) and, if wanted, its interval."""

    role: Role
    progress: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A run's loss: points (tokens, loss) in order, while training and of the sentences held out for validation."""

    role: Role
    points: Sequence[Point]
    validation: Sequence[Point] = ()


def gauge(marks: Sequence[Mark], ends: tuple[str, str] | None = None) -> str:
    """The way from floor to ceiling with every run's mark on it, as wide as its place.

    What lies beyond is shown up to GAUGE_OUTSIDE, then held at the edge. `ends` are words under floor and ceiling;
    without them the gauge is small, for a table's cell, and shows no interval.
    """
    reached = [0.0, 1.0] + [mark.progress for mark in marks]
    if ends:
        reached += [end for mark in marks for end in mark.interval or ()]
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
    for mark in marks:
        if mark.interval and ends:
            left, right = x(mark.interval[0]), x(mark.interval[1])
            box = f'x="{left:.2f}%" width="{right - left:.2f}%" y="{middle - 4}" height="8" rx="4"'
            parts.append(f'<rect class="interval {mark.role}" {box}/>')
    radius = 6 if ends else 4
    # A teacher is a ring, everything else a disc: told apart without colour.
    for mark in sorted(marks, key=lambda mark: mark.role != "teacher"):
        parts.append(f'<circle class="mark {mark.role}" cx="{x(mark.progress):.2f}%" cy="{middle}" r="{radius}"/>')
    spoken = ", ".join(f"{mark.role} {percent(mark.progress)}" for mark in marks)
    return (
        f'<svg class="gauge" role="img" width="100%" height="{height}" aria-label="{spoken} of the way from floor to ceiling">'
        f"{''.join(parts)}</svg>"
    )


def loss_chart(name: str, lines: Sequence[Line], floor: float | None, key: str) -> str:
    """Loss in nats a token against tokens trained on. `key` makes the ids of this chart unique in its page.

    `floor`, a dashed line, is the loss of an answer without a model; rings are the validation's. Needs at least one point.
    """
    width, height, left, right, top, bottom = 360, 230, 40, 12, 24, 38
    known = [line for line in lines if line.points]
    thinned = [Line(line.role, thin(line.points, MOST_POINTS), thin(line.validation, MOST_RINGS)) for line in known]
    losses = [loss for line in thinned for _, loss in (*line.points, *line.validation)] + ([] if floor is None else [floor])
    y_ticks = ticks(min(losses), max(losses), 5)
    y_low, y_high = min(*losses, *y_ticks), max(*losses, *y_ticks)
    x_high = max(tokens for line in known for tokens, _ in line.points) or 1.0

    def x(tokens: float) -> float:
        return left + (width - left - right) * tokens / x_high

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (y_high - loss) / ((y_high - y_low) or 1.0)

    parts = [
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{left - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in y_ticks
    ]
    for tick in ticks(0, x_high, 4):
        if tick <= x_high:
            parts.append(
                f'<text x="{x(tick):.1f}" y="{height - bottom + 17}" text-anchor="middle">{html.escape(count(tick))}</text>'
            )
    parts.append(f'<text class="axis" x="0" y="10">{html.escape("loss of answer tokens, nats")}</text>')
    parts.append(f'<text class="axis" x="{width - right}" y="{height - 4}" text-anchor="end">tokens trained on</text>')
    if floor is not None:
        parts.append(f'<line class="floor" x1="{left}" x2="{width - right}" y1="{y(floor):.1f}" y2="{y(floor):.1f}"/>')
    for line in thinned:
        path = " ".join(f"{x(tokens):.1f},{y(loss):.1f}" for tokens, loss in line.points)
        last_x, last_y = x(line.points[-1][0]), y(line.points[-1][1])
        parts.append(f'<polyline class="line {line.role}" points="{path}"/>')
        parts.append(f'<circle class="dot {line.role}" cx="{last_x:.1f}" cy="{last_y:.1f}" r="3"/>')
    # Above all lines.
    for line in thinned:
        for tokens, loss in line.validation:
            parts.append(f'<circle class="ring {line.role}" cx="{x(tokens):.1f}" cy="{y(loss):.1f}" r="3.5"/>')
    spoken = "; ".join(
        f"{line.role}: {line.points[0][1]:.2f} at first, {line.points[-1][1]:.2f} after {count(line.points[-1][0])} tokens"
        + (f", {line.validation[-1][1]:.2f} on held-out sentences" if line.validation else "")
        for line in known
    )
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">{html.escape(name)}: loss while training</title>'
        f'<desc id="{key}-text">{html.escape(spoken)}</desc>{"".join(parts)}</svg>'
    )


def speed_chart(role: Role, points: Sequence[Point]) -> str:
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
    spoken = f"{role}: {min(speed for _, speed in points):,.0f} to {max(speed for _, speed in points):,.0f} tokens a second"
    return (
        f'<svg class="speed" role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-label="{spoken}">'
        f'<line class="grid" x1="0" x2="{width}" y1="{height - 1}" y2="{height - 1}"/>'
        f'<polyline class="line {role}" points="{path}"/></svg>'
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
