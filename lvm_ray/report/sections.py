"""What each section of the page says: a `Report` as plain values for the template, by the names that it uses.

`content` is the way in; each function below makes one section's values. Charts are Markup, everything else is plain text.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lvm_ray import __version__
from lvm_ray.progress import duration
from lvm_ray.recipe_sections import BalanceSection
from lvm_ray.report import charts, mixture, pictures
from lvm_ray.report.folder import Report, Run, read_json, section
from lvm_ray.report.stages import stage_rows
from lvm_ray.report.words import count, finite, interval, metric_of, number, ordered, percent, short, times
from lvm_ray.storage import redacted

LIBRARIES = ("torch", "ray", "deepspeed", "transformers")


def content(report: Report) -> dict[str, Any]:
    """What the template shows, by the names that it uses. Charts are Markup, everything else is plain."""
    return {
        "name": report.folder.resolve().name,
        "roles": [run.role for run in report.runs],
        "distilled": section(report.main.config, "distill") != {},
        "examples": report.main.evaluation.get("examples", 3),
        "tasks": report.tasks,
        "facts": facts(report),
        "tiles": [tile for task in report.tasks if (tile := task_tile(report, task))],
        "galleries": galleries(report),
        "metrics": metric_groups(report),
        "stages": stage_rows(report.folder, report.config, report.tasks, lambda path: read_json(path, dict)),
        "set_aside": counted_in(report, "bad"),
        "empty_answers": counted_in(report, "nothing"),
        "losses": losses(report),
        "validated": any(_points(run, lambda line: line.get("validation")) for run in report.runs),
        "speeds": speeds(report),
        "balance": balance_rows(report.balance),
        "weighted": any(finite(row.get("weight")) is not None for row in report.balance),
        "mixture": mixture_charts(report),
        "strategy": section(report.config, "balance").get("strategy"),
        "command": command(report),
        "config": report.config_text,
        "seed": report.config.get("seed"),
        "versions": versions(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
    }


def facts(report: Report) -> list[tuple[str, str, str]]:
    """The key facts as (name, value, remark)."""
    found: list[tuple[str, str, str]] = []
    for run in report.runs:
        model = section(run.config, "model")
        remark = f"{model['width']} wide, {model['layers']} layers" if {"width", "layers"} <= set(model) else ""
        if run.parameters:
            found.append((run.role, f"{count(run.parameters)} parameters", remark))
    for run in report.runs:
        last = run.metrics[-1] if run.metrics else {}
        if (tokens := finite(last.get("tokens"))) is not None:
            steps = finite(last.get("step"))
            term = f"{run.role} trained on" if len(report.runs) > 1 else "trained on"
            found.append((term, f"{count(tokens)} tokens", "" if steps is None else f"in {steps:,.0f} steps"))
    times = [
        (run.role, seconds)
        for run in report.runs
        if run.metrics and (seconds := finite(run.metrics[-1].get("seconds"))) is not None
    ]
    if times:
        remark = ", ".join(f"{role} {duration(seconds)}" for role, seconds in times) if len(times) > 1 else ""
        found.append(("training time", duration(sum(seconds for _, seconds in times)), remark))
    counts = {task: max(numbers) for task in report.tasks if (numbers := _item_counts(report.main, task))}
    if counts:
        found.append(("tested on", f"{sum(counts.values()):,} items", f"of {len(counts)} task{'s' * (len(counts) > 1)}"))
    return found


def task_tile(report: Report, task: str) -> dict[str, Any] | None:
    """The headline of a task: its main metric's value, interval and way from floor to ceiling; None if not scored."""
    entries = _entries(report.main, task)
    if not entries:
        return None
    name = ordered(entries)[0]
    metric, entry = metric_of(name), entries[name]
    marks = _marks(report, task, name)
    floor, ceiling = number(entry.get("floor"), metric.digits), number(entry.get("ceiling"), metric.digits)
    ends = (f"floor {floor}", f"ceiling {ceiling}")
    return {
        "task": task,
        "label": metric.label,
        "meaning": metric.meaning,
        "unit": metric.unit,
        "value": number(entry.get("value"), metric.digits),
        "interval": interval(entry.get("ci95"), metric),
        "floor": floor,
        "ceiling": ceiling,
        "gauge": Markup(charts.gauge(marks, ends)) if marks else None,
        "progress": [(mark.role, percent(mark.progress)) for mark in reversed(marks)],
    }


def galleries(report: Report) -> list[dict[str, Any]]:
    """Each task's rows of pictures, in two halves that stand side by side where there is room."""
    sources = [(run.role, run.folder, run.gallery) for run in report.runs if run.gallery]
    shown = []
    for task in report.tasks if sources else []:
        rows = pictures.gallery_rows(task, sources)
        half = math.ceil(len(rows) / 2)
        if rows:
            columns = ["query", "truth", *(role for role, _, _ in sources)]
            shown.append({"task": task, "columns": columns, "halves": [part for part in (rows[:half], rows[half:]) if part]})
    return shown


def metric_groups(report: Report) -> list[dict[str, Any]]:
    """The metrics table: a group of rows for every task."""
    groups = []
    for task in report.tasks:
        entries = _entries(report.main, task)
        rows = [_metric_row(report, task, name, entries[name]) for name in ordered(entries)]
        if rows:
            groups.append({"task": task, "rows": rows, "n": max(_item_counts(report.main, task), default=None)})
    return groups


def _metric_row(report: Report, task: str, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    metric = metric_of(name)
    values = []
    for run in report.runs:
        own = _entries(run, task).get(name, {})
        values.append((run.role, number(own.get("value"), metric.digits), interval(own.get("ci95"), metric)))
    marks = _marks(report, task, name)
    return {
        "label": metric.label,
        "meaning": metric.meaning,
        "unit": metric.unit,
        "higher_is_better": bool(entry.get("higher_is_better", True)),
        "floor": number(entry.get("floor"), metric.digits),
        "floor_name": entry.get("floor_name"),
        "ceiling": number(entry.get("ceiling"), metric.digits),
        "values": values,
        "gauge": Markup(charts.gauge(marks)) if marks else None,
        "progress": percent(marks[-1].progress) if marks else None,
        "below_floor": finite(entry.get("ceiling")) is not None and not _has_way(entry),
    }


def counted_in(report: Report, key: str) -> str:
    """What the evaluation counts by task under a key, `bad` items or answers that show `nothing`; empty where there are none."""
    found = report.main.evaluation.get(key)
    counts = {task: number for task, many in found.items() if many} if isinstance(found, Mapping) else {}
    return ", ".join(f"{many} of {task}" for task, many in counts.items())


def losses(report: Report) -> list[dict[str, Any]]:
    """A chart of each task's target loss."""
    shown = []
    for k, task in enumerate(report.tasks):
        curves = (charts.Line(run.role, _losses(run, task), _losses(run, task, "validation_loss")) for run in report.runs)
        lines = [line for line in curves if line.points]
        if not lines:
            continue
        perplexity = finite(_entries(report.main, task).get("target_perplexity", {}).get("floor"))
        floor = math.log(perplexity) if perplexity and perplexity > 0 else None
        shown.append(
            {
                "task": task,
                "chart": Markup(charts.loss_chart(task, lines, floor, f"loss-{k}")),
                "last": [(line.role, f"{line.points[-1][1]:.2f}", _last_of(line.validation)) for line in lines],
                "floor": None if floor is None else f"{floor:.2f}",
            }
        )
    return shown


def speeds(report: Report) -> list[dict[str, Any]]:
    """How fast each run trained, as far as its journal tells."""
    shown = []
    for run in report.runs:
        points = _points(run, lambda line: line.get("tokens_per_s"))
        shares = [share for _, share in _points(run, lambda line: line.get("matmul_share"))]
        if points:
            shown.append(
                {
                    "role": run.role,
                    "chart": Markup(charts.speed_chart(run.role, points)),
                    "tokens": f"{statistics.median(speed for _, speed in points):,.0f}",
                    "share": percent(statistics.median(shares)) if shares else None,
                }
            )
    return shown


def balance_rows(balance: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The balance table, written out."""
    return [
        {
            "task": str(row.get("task")),
            "pairs": number(row.get("pairs"), 0),
            "copies": short(row.get("copies"), 3),
            "tokens": "–" if (tokens := finite(row.get("tokens"))) is None else count(tokens),
            "share_before": "–" if (share := finite(row.get("share_before"))) is None else percent(share, 1),
            "share_after": "–" if (share := finite(row.get("share_after"))) is None else percent(share, 1),
            "weight": short(row.get("weight"), 3),
            "seen": times(finite(row.get("seen"))),
            "epochs": times(finite(row.get("epochs"))),
            "pixel_seen": times(finite(row.get("pixel_seen"))),
            "warning": str(row.get("warning") or ""),
        }
        for row in balance
    ]


def mixture_charts(report: Report) -> dict[str, Any] | None:
    """The pictures of the balance table; None where it lacks the shares."""
    parts = mixture.mixture(report.balance)
    if not parts:
        return None
    most = finite(section(report.config, "balance").get("most_repeats")) or BalanceSection().most_repeats
    return {
        "shares": Markup(mixture.share_chart(parts)),
        "repeats": Markup(mixture.repeats_chart(parts, most)),
        "most": times(most),
    }


def command(report: Report) -> str:
    """The command that makes this run again, from the recipe that it left behind."""
    run = str(report.config.get("run") or report.folder)
    verb = "train" if report.main.role == "model" else "demo"
    return f"lvm-ray {verb} {shlex.quote(redacted(run) + '/config.yaml')}"


def versions() -> list[tuple[str, str]]:
    """The libraries that matter, with their versions here."""
    found = [("lvm-ray", __version__), ("Python", platform.python_version())]
    for name in LIBRARIES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _entries(run: Run, task: str) -> Mapping[str, Mapping[str, Any]]:
    entries = run.evaluation.get("tasks", {}).get(task, {})
    return {str(name): entry for name, entry in entries.items() if isinstance(entry, Mapping)}


def _item_counts(run: Run, task: str) -> list[int]:
    return [int(entry["n"]) for entry in _entries(run, task).values() if finite(entry.get("n")) is not None]


def _has_way(entry: Mapping[str, Any]) -> bool:
    """Whether the ceiling is better than the floor: progress says nothing where no model at all beats the tokenizer."""
    floor, ceiling = finite(entry.get("floor")), finite(entry.get("ceiling"))
    if floor is None or ceiling is None:
        return False
    return ceiling > floor if entry.get("higher_is_better", True) else ceiling < floor


def _marks(report: Report, task: str, name: str) -> list[charts.Mark]:
    """Every run's place between floor and ceiling; the interval of the main run alone."""
    marks = []
    for run in report.runs:
        entry = _entries(run, task).get(name, {})
        floor, ceiling, value = (finite(entry.get(key)) for key in ("floor", "ceiling", "value"))
        if not _has_way(entry) or floor is None or ceiling is None or value is None:
            continue
        band = None
        if run is report.main and interval(entry.get("ci95"), metric_of(name)):
            low, high = sorted((end - floor) / (ceiling - floor) for end in entry["ci95"])
            band = (low, high)
        marks.append(charts.Mark(run.role, (value - floor) / (ceiling - floor), band))
    return marks if any(mark.role == report.main.role for mark in marks) else []


def _losses(run: Run, task: str, key: str = "target_loss") -> list[charts.Point]:
    return _points(run, lambda line: of_tasks.get(task) if isinstance(of_tasks := line.get(key), Mapping) else None)


def _points(run: Run, value_of: Callable[[Mapping[str, Any]], Any]) -> list[charts.Point]:
    """(tokens, value) of every line of the journal that knows both."""
    known = ((finite(line.get("tokens")), finite(value_of(line))) for line in run.metrics)
    return [(tokens, value) for tokens, value in known if tokens is not None and value is not None]


def _last_of(points: Sequence[charts.Point]) -> str | None:
    return f"{points[-1][1]:.2f}" if points else None
