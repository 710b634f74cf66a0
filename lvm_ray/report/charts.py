"""Charts as SVG text: pure functions from numbers to markup, coloured by the classes of `colours.css` and `style.css`.

Every chart carries a title and a description for people who do not see it. All text is escaped here; the results are
safe to place in a page as they are. A role is "student", "teacher" or "model" (a run without comparison).
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Role = Literal["student", "teacher", "model"]
Point = tuple[float, float]

GAUGE_OUTSIDE = 0.5  # how far beyond floor and ceiling a gauge reaches, in lengths of the way between them
ROW = 62  # height of a task's place in a chart of the mixture
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


@dataclass(frozen=True)
class Part:
    """A task's part of the mixture: a row of the balance table as far as it is known.

    before, after     its share of the pairs and of the training's rows, 0..1
    copies            distinct versions of each original; below 1 the part of the originals
    version, original, pixel  how often the training shows each version, each original, each pixel of an original
    warned            whether its versions are repeated too often
    """

    task: str
    before: float
    after: float
    copies: float | None = None
    version: float | None = None
    original: float | None = None
    pixel: float | None = None
    warned: bool = False


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


def share_chart(parts: Sequence[Part]) -> str:
    """Each task's share of the data before and after balancing, two bars a task, and its copies. As wide as its place."""
    longest = max([1e-9, *(share for part in parts for share in (part.before, part.after))])
    drawn = []
    for k, part in enumerate(parts):
        top = k * ROW
        drawn.append(f'<text class="name" x="0" y="{top + 14}">{html.escape(part.task)}</text>')
        drawn.append(f'<text x="100%" y="{top + 14}" text-anchor="end">{copies_text(part.copies)}</text>')
        for offset, kind, share in ((21, "before", part.before), (37, "after", part.after)):
            length = 82 * share / longest
            drawn.append(f'<rect class="{kind}" x="0" y="{top + offset}" width="{max(length, 0.3):.2f}%" height="13" rx="1.5"/>')
            drawn.append(f'<text x="{length:.2f}%" dx="7" y="{top + offset + 11}">{percent(share, 1)}</text>')
    spoken = "; ".join(f"{part.task} {percent(part.before, 1)} before, {percent(part.after, 1)} after" for part in parts)
    return (
        f'<svg class="shares" role="img" width="100%" height="{ROW * len(parts)}" '
        f'aria-label="Share of the data by task: {html.escape(spoken)}">{"".join(drawn)}</svg>'
    )


def repeats_chart(parts: Sequence[Part], most: float) -> str:
    """How often a training shows each version (disc), each original (ring) and each pixel of one (bar), a line a task.

    On a scale of powers of ten, with a dashed line at `most`, beyond which repeats teach little. As wide as its place.
    """
    known = [value for part in parts for value in (part.version, part.original, part.pixel) if value] + [most, 1.0]
    low, high = math.floor(math.log10(min(known)) + 0.02), math.ceil(math.log10(max(known)) - 0.02)
    bottom = ROW * len(parts)

    def x(times: float) -> float:
        return 3 + 94 * (math.log10(times) - low) / ((high - low) or 1)

    def uprights(kind: str, times: float) -> list[str]:
        # Interrupted at every line of text.
        lines = ((ROW * k + 21, ROW * k + 55) for k in range(len(parts)))
        place = f"{x(times):.2f}%"
        return [f'<line class="{kind}" x1="{place}" x2="{place}" y1="{start}" y2="{end}"/>' for start, end in lines]

    drawn = []
    for power in range(low, high + 1):
        drawn += uprights("grid", 10.0**power)
        drawn.append(f'<text x="{x(10.0**power):.2f}%" y="{bottom + 14}" text-anchor="middle">{10.0**power:g} ×</text>')
    drawn += uprights("limit", most)
    for k, part in enumerate(parts):
        top = k * ROW
        drawn.append(f'<text class="name" x="0" y="{top + 14}">{html.escape(part.task)}</text>')
        drawn.append(f'<text x="100%" y="{top + 14}" text-anchor="end">{html.escape(_seen(part))}</text>')
        places = [x(value) for value in (part.version, part.original, part.pixel) if value]
        middle = top + 38
        if places:
            drawn.append(f'<line class="track" x1="{min(places):.2f}%" x2="{max(places):.2f}%" y1="{middle}" y2="{middle}"/>')
        if part.original:
            drawn.append(f'<circle class="original" cx="{x(part.original):.2f}%" cy="{middle}" r="6.5"/>')
        if part.pixel:
            place = f"{x(part.pixel):.2f}%"
            drawn.append(f'<line class="pixel" x1="{place}" x2="{place}" y1="{middle - 8}" y2="{middle + 8}"/>')
        if part.version:
            kind = "version warned" if part.warned else "version"
            drawn.append(f'<circle class="{kind}" cx="{x(part.version):.2f}%" cy="{middle}" r="5"/>')
    spoken = "; ".join(f"{part.task}: {_seen(part)}" for part in parts)
    return (
        f'<svg class="repeats" role="img" width="100%" height="{bottom + 22}" '
        f'aria-label="How often the training shows the same: {html.escape(spoken)}">{"".join(drawn)}</svg>'
    )


def mixture(table: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The parts of a balance table, which may come out of a file: rows without shares are left out."""
    parts = []
    for row in table:
        before, after = finite(row.get("share_before")), finite(row.get("share_after"))
        if before is not None and after is not None:
            copies, version, original, pixel = (finite(row.get(key)) for key in ("copies", "epochs", "seen", "pixel_seen"))
            warned = bool(row.get("warning"))
            parts.append(Part(str(row.get("task")), before, after, copies, version, original, pixel, warned))
    return parts


def balance_picture(table: Sequence[Mapping[str, Any]], most: float) -> str:
    """A balance table as an SVG file of its own, light or dark as its viewer: shares on the left, repeats on the right."""
    parts = mixture(table)
    strategy = html.escape(str(table[0].get("strategy", ""))) if table else ""
    width, edge, top, half = 1040, 28, 92, 470
    height = top + ROW * len(parts) + 22 + edge
    right = width - edge - half
    keys = [
        f'<rect class="before" x="{edge}" y="61" width="12" height="12" rx="2"/>',
        f'<rect class="after" x="{edge + 150}" y="61" width="12" height="12" rx="2"/>',
        f'<circle class="version" cx="{right + 6}" cy="67" r="5"/>',
        f'<circle class="original" cx="{right + 157}" cy="67" r="6"/>',
        f'<line class="pixel" x1="{right + 273}" x2="{right + 273}" y1="60" y2="75"/>',
        f'<line class="limit" x1="{right + 365}" x2="{right + 365}" y1="59" y2="76"/>',
    ]
    words = {
        edge + 19: "share of the pairs",
        edge + 169: "share of the training rows",
        right + 18: "each version seen",
        right + 170: "each original",
        right + 282: "its pixels",
        right + 374: f"limit of {most:g} ×",
    }
    keys += [f'<text x="{x}" y="72">{word}</text>' for x, word in words.items()]
    title = f'<text class="title" x="{edge}" y="40">Balance: {strategy}</text>'
    placed = "".join(
        f'<svg x="{left}" y="{top}" width="{half}" height="{height - top}" overflow="visible">{chart}</svg>'
        for left, chart in ((edge, share_chart(parts)), (right, repeats_chart(parts, most)))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="The mixture of tasks: {strategy}"><style>{colours()}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/><g class="shares repeats">{title}{"".join(keys)}</g>'
        f"{placed}</svg>\n"
    )


def colours() -> str:
    """The style rules that the charts of the mixture need, in a page and in a file of their own."""
    return (Path(__file__).parent / "colours.css").read_text(encoding="utf-8")


def copies_text(copies: float | None) -> str:
    """Distinct copies in words: `20 copies`, `originals alone`, `2 % of the originals`."""
    if copies is None:
        return ""
    return (
        f"{percent(copies, 1)} of the originals" if copies < 1 else "originals alone" if copies == 1 else f"{copies:.3g} copies"
    )


def _seen(part: Part) -> str:
    known = (("version", part.version), ("original", part.original), ("pixel", part.pixel))
    return ", ".join(f"{name} {times(value)}" for name, value in known if value is not None)


def times(value: float | None) -> str:
    """How often, in three digits: `2.77 ×`, `139 ×`; a dash where nobody knows."""
    return "–" if value is None else f"{value:,.0f} ×" if value >= 99.5 else f"{value:.3g} ×"


def finite(value: Any) -> float | None:
    """The value if it is a finite number: a file may hold anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


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
