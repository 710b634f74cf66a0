"""The pictures of docs/scale.md as SVG files of their own, light or dark as their viewer, in the colours of the report."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lvm_ray.report.mixture import colours
from tests.scale.inputs import ROOT
from tests.scale.training import checkpoint_seconds, expected_seconds, mtbf, restart_seconds, young
from tests.scale.training_tables import FACTORS, throughput
from tests.scale.whole import whole
from tests.scale.words import hours, percent, seconds
from tests.scale.workload import GPUS, HOUR, runs

FOLDER = ROOT / "docs" / "scale"
WIDTH, EDGE = 720, 24
LEFT, RIGHT = 150, 40  # of a chart: words at its left, room for the last number at its right
DAY = 24 * HOUR
TICKS = (1, 10, 60, 600, HOUR, 10 * HOUR, 4 * DAY, 40 * DAY, 400 * DAY)  # seconds: times that people know, about tenfold apart
STYLE = """
text { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
.title { fill: var(--text); font-size: 16px; font-weight: 650; }
.name { fill: var(--text); }
.grid { stroke: var(--line); }
.way { stroke: var(--track); stroke-width: 3; }
.now { fill: var(--page); stroke: var(--warned); stroke-width: 2.5; }
.then { fill: var(--after); }
.line-now { fill: none; stroke: var(--warned); stroke-width: 2; }
.line-then { fill: none; stroke: var(--after); stroke-width: 2; }
.young { stroke: var(--quiet); stroke-dasharray: 4 4; }
"""


def stage_hours() -> str:
    """Hours of each stage on each cluster, now and with the changes, on a scale of powers of ten."""
    stages = ("tokenize", "teacher", "student", "evaluate")
    plans = {gpus: (whole(gpus, False), whole(gpus, True)) for gpus in GPUS}
    values = [getattr(plan, stage) for pair in plans.values() for plan in pair for stage in stages]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    row, top, group = 24, 84, 44
    height = top + len(GPUS) * (group + row * len(stages)) + 30
    x = _across(low, high)
    bottom = height - 34
    drawn = []
    for tick in (tick / HOUR for tick in TICKS):
        if 10.0**low <= tick <= 10.0**high:
            drawn.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
            drawn.append(f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{hours(tick)}</text>')
    y, spoken = top, []
    for gpus, (now, then) in plans.items():
        y += group
        drawn.append(f'<text class="title" x="{EDGE}" y="{y - 16}" font-size="13">{gpus} GPUs</text>')
        for stage in stages:
            before, after = getattr(now, stage), getattr(then, stage)
            drawn.append(f'<text class="name" x="{EDGE}" y="{y + 4}">{stage}</text>')
            drawn.append(f'<line class="way" x1="{x(before):.1f}" x2="{x(after):.1f}" y1="{y}" y2="{y}"/>')
            drawn.append(f'<circle class="now" cx="{x(before):.1f}" cy="{y}" r="5"/>')
            drawn.append(f'<circle class="then" cx="{x(after):.1f}" cy="{y}" r="5"/>')
            spoken.append(f"{stage} on {gpus} GPUs {hours(before)} now, {hours(after)} then")
            y += row
    keys = _keys((("now", "the code as it is"), ("then", "with the changes of this page")))
    return _file("Hours of each stage", "; ".join(spoken), height, [*keys, *drawn])


def checkpoint_intervals() -> str:
    """What is left of the time on 512 rough spot GPUs, by the interval between checkpoints: formula, simulation, Young."""
    teacher, _ = runs(512)
    between = mtbf(512, "spot, rough")
    cases = []
    for changed in (False, True):
        save, restart = checkpoint_seconds(teacher, 512, changed), restart_seconds(teacher, 512, changed)
        cases.append(("then" if changed else "now", save, restart, young(save, between)))
    intervals = [factor * optimum for *_, optimum in cases for factor in FACTORS]
    low, high = math.log10(min(intervals)), math.log10(max(intervals))
    height, top = 320, 84
    bottom = height - 44
    x = _across(low, high)

    def y(part: float) -> float:
        return bottom - (bottom - top) * part

    drawn = []
    for part in (0, 0.25, 0.5, 0.75, 1):
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(part):.1f}" y2="{y(part):.1f}"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y(part) + 4:.1f}" text-anchor="end">{percent(part)}</text>')
    for tick in TICKS:
        if low <= math.log10(tick) <= high:
            drawn.append(f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{seconds(tick)}</text>')
    spoken = []
    for kind, save, restart, optimum in cases:
        curve = [10 ** (low + (high - low) * step / 120) for step in range(121)]
        points = " ".join(f"{x(t):.1f},{y(HOUR / expected_seconds(HOUR, t, save, restart, between)):.1f}" for t in curve)
        drawn.append(f'<polyline class="line-{kind}" points="{points}"/>')
        drawn.append(f'<line class="young" x1="{x(optimum):.1f}" x2="{x(optimum):.1f}" y1="{top}" y2="{bottom}"/>')
        for factor in FACTORS:
            found, _ = throughput(factor * optimum, save, restart, between)
            drawn.append(f'<circle class="{kind}" cx="{x(factor * optimum):.1f}" cy="{y(found):.1f}" r="4.5"/>')
            spoken.append(f"{kind}, {seconds(factor * optimum)} {percent(found)}")
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{height - 8}" text-anchor="end">work between two checkpoints</text>')
    keys = _keys((("now", "checkpoints as they are"), ("then", "with the changes")))
    keys.append(f'<text x="{WIDTH - RIGHT}" y="67" text-anchor="end">lines: formula, discs: simulated, dashes: Young</text>')
    return _file("Part of the time that is work, 512 spot GPUs on a bad day", "; ".join(spoken), height, [*keys, *drawn])


CHARTS: dict[str, Callable[[], str]] = {"hours": stage_hours, "checkpoints": checkpoint_intervals}


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in CHARTS.items():
        (folder / f"{name}.svg").write_text(make(), encoding="utf-8")


def _across(low: float, high: float) -> Callable[[float], float]:
    """The place of a value on an axis of powers of ten."""
    return lambda value: LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - low) / (high - low)


def _keys(words: Sequence[tuple[str, str]]) -> list[str]:
    drawn, left = [], EDGE
    for kind, text in words:
        drawn.append(f'<circle class="{kind}" cx="{left + 6}" cy="63" r="5"/>')
        drawn.append(f'<text x="{left + 18}" y="67">{html.escape(text)}</text>')
        left += 60 + 6.2 * len(text)
    return drawn


def _file(title: str, spoken: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{html.escape(f"{title}: {spoken}")}"><style>{colours()}{STYLE}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>'
        f'<text class="title" x="{EDGE}" y="38">{html.escape(title)}</text>'
        f"{''.join(parts)}</svg>\n"
    )
