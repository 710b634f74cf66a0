"""Charts of the mixture of tasks, as SVG text: shares of the data before and after balancing, and how often what is seen.

In a page they are coloured by its style; `balance_picture` is a file of its own.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvm_ray.report.words import copies_text, finite, percent, times

ROW = 62  # height of a task's place in a chart


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


def _seen(part: Part) -> str:
    known = (("version", part.version), ("original", part.original), ("pixel", part.pixel))
    return ", ".join(f"{name} {times(value)}" for name, value in known if value is not None)
