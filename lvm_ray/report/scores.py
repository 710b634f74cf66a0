"""Scores as the page shows them: a tile for each task's main metric, and a table of every metric of tasks and benchmarks.

Every run's value stands beside the floor, the ceiling and, where one was trained, the network devoted to the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lvm_ray.report import charts
from lvm_ray.report.folder import Entries, Report, Run
from lvm_ray.report.series import REFERENCE, key
from lvm_ray.report.words import ends_of, finite, interval, metric_of, number, ordered, percent


def task_tile(report: Report, task: str) -> dict[str, Any] | None:
    """The headline of a task: its main metric's value, interval and way from floor to ceiling; None if not scored."""
    name = main_metric(report, task)
    if name is None or task not in report.main.scores:
        return None
    metric, entry = metric_of(name), report.main.scores[task][name]
    marks = _marks(report, task, name)
    floor, ceiling = number(entry.get("floor"), metric.digits), number(entry.get("ceiling"), metric.digits)
    ends = (f"floor {floor}", f"ceiling {ceiling}")
    shown = [one for one in reversed(marks) if one.series is not REFERENCE] + [one for one in marks if one.series is REFERENCE]
    return {
        "task": task,
        "name": name,
        "label": metric.label,
        "meaning": metric.meaning,
        "unit": metric.unit,
        "value": number(entry.get("value"), metric.digits),
        "interval": interval(entry.get("ci95"), metric),
        "floor": floor,
        "ceiling": ceiling,
        "gauge": Markup(charts.gauge(marks, ends)) if marks else None,
        "progress": [(Markup(key(one.series)), one.series.name, percent(one.progress)) for one in shown],
    }


def score_groups(report: Report, names: Sequence[str]) -> list[dict[str, Any]]:
    """A group of rows for each of these tasks or benchmarks that was scored."""
    groups = []
    for task in names:
        entries = _entries(report, task)
        rows = [_row(report, task, name, entries[name]) for name in ordered(entries)]
        if rows:
            referred = any(row["reference"] for row in rows)
            groups.append({"task": task, "rows": rows, "n": item_count(report.main, task), "referred": referred})
    return groups


def main_metric(report: Report, task: str) -> str | None:
    """The metric that stands for all others of a task; None where it is not scored."""
    return next(iter(ordered(_entries(report, task))), None)


def counted_in(report: Report, key: str) -> str:
    """What the evaluation counts by task under a key, `bad` items or answers that show `nothing`; empty where there are none."""
    found = report.main.evaluation.get(key)
    counts = {task: many for task, many in found.items() if many} if isinstance(found, Mapping) else {}
    return ", ".join(f"{many} of {task}" for task, many in counts.items())


def item_count(run: Run, task: str) -> int | None:
    """How many test items of a task were scored, None where nobody knows."""
    known = (finite(entry.get("n")) for entry in run.scores.get(task, {}).values())
    return max((int(many) for many in known if many is not None), default=None)


def _entries(report: Report, task: str) -> Entries:
    """The main run's metrics of a task; where it was not asked, those of the first run that was."""
    return next((found for run in [report.main, *report.runs] if (found := run.scores.get(task))), {})


def _row(report: Report, task: str, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    metric = metric_of(name)
    marks = _marks(report, task, name)
    own = next((one for one in marks if one.series is report.main.series), None)
    return {
        "task": task,
        "name": name,
        "label": metric.label,
        "meaning": metric.meaning,
        "unit": metric.unit,
        "higher_is_better": bool(entry.get("higher_is_better", True)),
        "floor": _cell(name, {"value": entry.get("floor")}),
        "floor_name": entry.get("floor_name"),
        "ceiling": _cell(name, {"value": entry.get("ceiling")}),
        "values": [
            {"look": run.series.look, "main": run is report.main, **_cell(name, run.scores.get(task, {}).get(name, {}))}
            for run in report.runs
        ],
        "reference": _cell(name, found) if (found := report.main.reference(task, name)) else None,
        "gauge": Markup(charts.gauge(marks)) if own else None,
        "progress": percent(own.progress) if own else None,
        "part": own.progress if own else None,
        "below_floor": finite(entry.get("ceiling")) is not None and not _has_way(entry),
    }


def _cell(metric: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A value as text, with its interval, and as a number."""
    known = metric_of(metric)
    value = finite(entry.get("value"))
    return {"text": number(value, known.digits), "interval": interval(entry.get("ci95"), known), "value": value}


def _has_way(entry: Mapping[str, Any]) -> bool:
    """Whether the ceiling is better than the floor: progress says nothing where no model at all beats the tokenizer."""
    floor, ceiling = finite(entry.get("floor")), finite(entry.get("ceiling"))
    if floor is None or ceiling is None:
        return False
    return ceiling > floor if entry.get("higher_is_better", True) else ceiling < floor


def _marks(report: Report, task: str, name: str) -> list[charts.Mark]:
    """Every run's place between its floor and ceiling, the main one last and with its interval, and the devoted network's between
    the main one's. None without the main run's."""
    entry = report.main.scores.get(task, {}).get(name, {})
    if _progress(entry, entry.get("value")) is None:
        return []
    marks = []
    reference = _progress(entry, report.main.reference(task, name).get("value"))
    if reference is not None:
        marks.append(charts.Mark(REFERENCE, reference))
    for run in report.layered:
        own = run.scores.get(task, {}).get(name, {})
        progress = _progress(own, own.get("value"))
        if progress is not None:
            marks.append(charts.Mark(run.series, progress, _band(own) if run is report.main else None))
    return marks


def _progress(entry: Mapping[str, Any], value: Any) -> float | None:
    """The part of the way from an entry's floor to its ceiling."""
    floor, ceiling, known = finite(entry.get("floor")), finite(entry.get("ceiling")), finite(value)
    if not _has_way(entry) or floor is None or ceiling is None or known is None:
        return None
    return (known - floor) / (ceiling - floor)


def _band(entry: Mapping[str, Any]) -> charts.Interval | None:
    """An entry's interval as progress."""
    ends = ends_of(entry.get("ci95"))
    known = [progress for end in ends or () if (progress := _progress(entry, end)) is not None]
    return (min(known), max(known)) if known else None
