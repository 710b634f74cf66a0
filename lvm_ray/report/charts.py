"""Charts as SVG text: pure functions from numbers to markup, coloured by the classes of `style.css`.

Every chart carries a title and a description for people who do not see it. All text is escaped here; the results are
safe to place in a page as they are. A role is "student", "teacher" or "model" (a run without comparison).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["student", "teacher", "model"]
Point = tuple[float, float]

GAUGE_OUTSIDE = 0.5  # how far beyond floor and ceiling a gauge reaches, in lengths of the way between them
MOST_POINTS = 240  # of a drawn line: more cannot be told apart


@dataclass(frozen=True)
class Mark:
    """A value on a gauge: its progress (0 the floor, 1 the ceiling) and, if wanted, its interval."""

    role: Role
    progress: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A run's loss: points (tokens, loss) in order."""

    role: Role
    points: Sequence[Point]


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

    `floor`, a dashed line, is the loss of an answer without a model. Needs at least one point.
    """
    width, height, left, right, top, bottom = 360, 230, 40, 12, 24, 38
    thinned = [Line(line.role, thin(line.points, MOST_POINTS)) for line in lines if line.points]
    losses = [loss for line in thinned for _, loss in line.points] + ([] if floor is None else [floor])
    y_ticks = ticks(min(losses), max(losses), 5)
    y_low, y_high = min(*losses, *y_ticks), max(*losses, *y_ticks)
    x_high = max(tokens for line in lines for tokens, _ in line.points) or 1.0

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
    spoken = "; ".join(
        f"{line.role}: {line.points[0][1]:.2f} at first, {line.points[-1][1]:.2f} after {count(line.points[-1][0])} tokens"
        for line in lines
        if line.points
    )
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">{html.escape(name)}: loss while training</title>'
        f'<desc id="{key}-text">{html.escape(spoken)}</desc>{"".join(parts)}</svg>'
    )


def share_chart(shares: Sequence[tuple[str, float, float]]) -> str:
    """Each task's share of the data before and after balancing, two bars a task, as wide as its place."""
    row, longest = 62, max([1e-9, *(share for _, *pair in shares for share in pair)])
    parts = []
    for k, (task, before, after) in enumerate(shares):
        top = k * row
        parts.append(f'<text class="name" x="0" y="{top + 14}">{html.escape(task)}</text>')
        for offset, kind, share in ((21, "before", before), (37, "after", after)):
            length = 82 * share / longest
            parts.append(f'<rect class="{kind}" x="0" y="{top + offset}" width="{max(length, 0.3):.2f}%" height="13" rx="1.5"/>')
            parts.append(f'<text x="{length:.2f}%" dx="7" y="{top + offset + 11}">{percent(share, 1)}</text>')
    spoken = "; ".join(f"{task} {percent(before, 1)} before, {percent(after, 1)} after" for task, before, after in shares)
    return (
        f'<svg class="shares" role="img" width="100%" height="{row * len(shares)}" '
        f'aria-label="Share of the data by task: {html.escape(spoken)}">{"".join(parts)}</svg>'
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


def count(value: float) -> str:
    """A large count in three digits: `840`, `3.28 M`, `300 k`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def percent(part: float, digits: int = 0) -> str:
    """A part as `53 %`."""
    rounded = round(100 * part, digits) + 0.0  # no "-0"
    return f"{rounded:.{digits}f} %".replace("-", "−")
