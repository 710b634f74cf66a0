"""Whose values a chart shows: a run's name, and the colour, mark and line by which it is told from others.

Colours are classes of `colours.css`, chosen so that people with any colour vision tell them apart; marks and lines differ
too. Colours, marks and lines repeat after 7, 4 and 28 runs: runs up to the 28th never share both colour and mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shape = Literal["disc", "ring", "square", "triangle", "wedge", "diamond"]

COLOURS = 7  # classes run-0, run-1, ...
SHAPES: tuple[Shape, ...] = ("disc", "square", "triangle", "wedge")


@dataclass(frozen=True)
class Series:
    """A run in charts and tables: its name, the class of its colour, the shape of its marks, and whether its lines are dashed."""

    name: str
    look: str
    shape: Shape = "disc"
    dashed: bool = False


STUDENT = Series("student", "student")
TEACHER = Series("teacher", "teacher", "ring")
MODEL = Series("model", "model")
REFERENCE = Series("reference", "reference", "diamond")  # a network devoted to one task


def series_of(k: int, name: str) -> Series:
    """The looks of the run number `k` of several."""
    return Series(name, f"run-{k % COLOURS}", SHAPES[k % len(SHAPES)], k // COLOURS % 2 == 1)


def mark(series: Series, x: str, y: float, radius: float) -> str:
    """A mark as SVG; `x` may be a percentage."""
    kind = f"mark {series.look}"
    if series.shape in ("disc", "ring"):
        return f'<circle class="{kind}" cx="{x}" cy="{y:g}" r="{radius:g}"/>'
    r = radius
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "triangle": [(0, -1.25 * r), (1.2 * r, r), (-1.2 * r, r)],
        "wedge": [(0, 1.25 * r), (-1.2 * r, -r), (1.2 * r, -r)],
        "diamond": [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
    }[series.shape]
    points = " ".join(f"{across:g},{down:g}" for across, down in corners)
    # A drawing in the drawing: the only way to place a polygon at a percentage.
    return f'<svg x="{x}" y="{y:g}" overflow="visible"><polygon class="{kind}" points="{points}"/></svg>'


def key(series: Series) -> str:
    """The mark alone, for a legend."""
    return f'<svg class="key" width="14" height="14" aria-hidden="true">{mark(series, "7", 7, 4)}</svg>'


def stroke(series: Series) -> str:
    """The line with its mark, for a legend."""
    line = f'<line class="{line_class(series)}" x1="1" x2="27" y1="7" y2="7"/>'
    return f'<svg class="key" width="28" height="14" aria-hidden="true">{line}{mark(series, "14", 7, 3.5)}</svg>'


def line_class(series: Series) -> str:
    """The classes of a line."""
    return f"line {series.look}{' dashed' if series.dashed else ''}"
