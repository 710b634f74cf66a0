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
from lvm_ray.report import charts, mixture, pictures, series
from lvm_ray.report.folder import Report, Run, read_json, section
from lvm_ray.report.scores import counted_in, item_count, main_metric, score_groups, task_tile
from lvm_ray.report.stages import stage_rows
from lvm_ray.report.words import count, ends_of, finite, metric_of, number, percent, short, times
from lvm_ray.storage import redacted

LIBRARIES = ("torch", "ray", "deepspeed", "transformers")


def content(report: Report) -> dict[str, Any]:
    """What the template shows, by the names that it uses. Charts are Markup, everything else is plain."""
    metrics, asked = score_groups(report, report.tasks), benchmarks(report)
    groups = [*metrics, *(benchmark["group"] for benchmark in asked)]
    answers = galleries(report, report.tasks)
    shown = [*answers, *(gallery for benchmark in asked for gallery in benchmark["galleries"])]
    return {
        "name": report.main.name if report.compared else report.folder.resolve().name,
        "runs": [run_row(report, run) for run in report.runs],
        "legend": [run_row(report, run) for run in reversed(report.layered)],
        "reference_key": Markup(series.key(series.REFERENCE)),
        "compared": report.compared,
        "paired": any(run.pairs for run in report.runs),
        "distilled": section(report.main.config, "distill") != {},
        "examples": report.main.evaluation.get("examples", 3),
        "tasks": report.tasks,
        "names": [group["task"] for group in groups] or report.tasks,
        "metric_names": {row["name"]: row["label"] for group in groups for row in group["rows"]},
        "facts": facts(report),
        "tiles": [tile for task in report.tasks if (tile := task_tile(report, task))],
        "galleries": answers,
        "answered": shown[0]["columns"][2:] if shown else [],
        "outstanding": [line for gallery in shown for line in outstanding(gallery)],
        "metrics": metrics,
        "devoted": devoted(report),
        "benchmarks": asked,
        "scales": scales(report),
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


def run_row(report: Report, run: Run) -> dict[str, Any]:
    """A run: its name and keys for legends, and what it is and has learnt from, as text and, for sorting, as numbers."""
    model = section(run.config, "model")
    tokens, seconds = finite(run.last.get("tokens")), finite(run.last.get("seconds"))
    return {
        "name": run.name,
        "look": run.series.look,
        "main": run is report.main,
        "key": Markup(series.key(run.series)),
        "stroke": Markup(series.stroke(run.series)),
        "model": f"{model['width']} wide, {model['layers']} layers" if {"width", "layers"} <= set(model) else "",
        "parameters": _counted(run.parameters),
        "pairs": _counted(sum(run.pairs.values()) or None),
        "tokens": _counted(tokens),
        "steps": _counted(finite(run.last.get("step")), exact=True),
        "seconds": {"text": "–" if seconds is None else duration(seconds), "value": seconds},
        "seed": run.config.get("seed"),
    }


def _counted(value: float | None, exact: bool = False) -> dict[str, Any]:
    return {"text": number(value, 0) if exact or value is None else count(value), "value": value}


def facts(report: Report) -> list[tuple[str, str, str]]:
    """The key facts as (name, value, remark); of several runs those of the first, the others are in a table."""
    found: list[tuple[str, str, str]] = []
    runs = [report.main] if report.compared else report.runs
    for run in runs:
        model = section(run.config, "model")
        remark = f"{model['width']} wide, {model['layers']} layers" if {"width", "layers"} <= set(model) else ""
        if run.parameters:
            found.append((run.name, f"{count(run.parameters)} parameters", remark))
    for run in runs:
        if (tokens := finite(run.last.get("tokens"))) is not None:
            steps = finite(run.last.get("step"))
            term = f"{run.name} trained on" if len(runs) > 1 else "trained on"
            found.append((term, f"{count(tokens)} tokens", "" if steps is None else f"in {steps:,.0f} steps"))
    spent = [(run.name, seconds) for run in runs if (seconds := finite(run.last.get("seconds"))) is not None]
    if spent:
        remark = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent) if len(spent) > 1 else ""
        found.append(("training time", duration(sum(seconds for _, seconds in spent)), remark))
    counts = {task: many for task in report.tasks if (many := item_count(report.main, task))}
    if counts:
        found.append(("tested on", f"{sum(counts.values()):,} items", f"of {len(counts)} task{'s' * (len(counts) > 1)}"))
    return found


def galleries(report: Report, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of pictures of each task or benchmark: the first items, and beside them those that stand out."""
    sources = [(run.name, run.folder, run.gallery) for run in report.runs if run.gallery]
    main = next((k for k, source in enumerate(sources) if source[1] == report.main.folder), 0)
    shown = []
    for name in names if sources else []:
        rows = pictures.gallery_rows(name, sources, main)
        if rows:
            columns = ["query", "truth", *(run for run, _, _ in sources)]
            shown.append({"task": name, "columns": columns, "parts": pictures.parts(rows)})
    return shown


def outstanding(gallery: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The items of a gallery that are shown for what was answered, as text: why, and each run's score."""
    return [
        {"task": gallery["task"], "item": row.item, "why": row.why, "scores": [one.score or "–" for one in row.pictures[2:]]}
        for part in gallery["parts"]
        for row in sorted(part.rows, key=lambda row: (row.why != "best", row.why != "median"))
        if row.why
    ]


def benchmarks(report: Report) -> list[dict[str, Any]]:
    """Each benchmark: its protocol in words, its scores and its pictures."""
    found = []
    for group in score_groups(report, report.benchmarks):
        name = group["task"]
        entry = next(run.benchmarks[name] for run in [report.main, *report.runs] if name in run.benchmarks)
        protocol = section(entry, "protocol")
        counts = (
            (finite(entry.get(key)), words) for key, words in (("bad", "could not be used"), ("nothing", "show nothing at all"))
        )
        found.append(
            {
                "name": name,
                "task": str(entry.get("task", "")),
                "says": " ".join(str(protocol.get("says", "")).split()),
                "protocol": [("test items", f"{group['n'] or 0:,}"), *_protocol(protocol)],
                "remarks": [f"{many:,.0f} {words}" for many, words in counts if many],
                "group": group,
                "galleries": galleries(report, [name]),
            }
        )
    return found


def _protocol(protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What decides a benchmark's score beside its words."""
    known = {
        "pairs before each query": protocol.get("examples"),
        "pairs are": {"run": "the run’s training pairs", "own": "other items of the benchmark"}.get(str(protocol.get("pairs"))),
        "alike in": protocol.get("alike"),
        "of them asked, the first by id": protocol.get("items"),
        "answers drawn": protocol.get("draws") or None,
        "seed": protocol.get("seed"),
    }
    return [(key, str(value)) for key, value in known.items() if value is not None]


def devoted(report: Report) -> list[str]:
    """How the devoted networks were trained, a sentence a task."""
    how = section(report.main.references, "how")
    return [f"{task}: {how[task]}" for task in report.tasks if task in how]


def scales(report: Report) -> list[dict[str, Any]]:
    """Of several runs, charts of each task's main metric against what they had: parameters, tokens trained on, pairs. Each is
    left out where the runs do not differ in it."""
    shown = []
    for k, task in enumerate(report.tasks if report.compared else []):
        name = main_metric(report, task)
        if name is None:
            continue
        metric = metric_of(name)
        score = f"{metric.label}, {metric.unit}" if metric.unit else metric.label
        drawn = []
        for place, amount in enumerate(_amounts(report.main, task)):
            dots = [dot for run in report.layered if (dot := _dot(run, task, name, _amounts(run, task)[amount]))]
            if len({dot.amount for dot in dots}) > 1:
                drawn.append(Markup(charts.scale_chart(task, score, amount, dots, f"scale-{k}-{place}")))
        if drawn:
            shown.append({"task": task, "name": name, "label": metric.label, "charts": drawn})
    return shown


def _amounts(run: Run, task: str) -> dict[str, float | None]:
    """What a run had that another may have had more of."""
    return {
        "parameters": run.parameters,
        "tokens trained on": finite(run.last.get("tokens")),
        f"training pairs of {task}": run.pairs.get(task),
    }


def _dot(run: Run, task: str, metric: str, amount: float | None) -> charts.Dot | None:
    entry = run.scores.get(task, {}).get(metric, {})
    score = finite(entry.get("value"))
    if score is None or not amount or amount <= 0:
        return None
    return charts.Dot(run.series, float(amount), score, ends_of(entry.get("ci95")))


def losses(report: Report) -> list[dict[str, Any]]:
    """A chart of each task's target loss."""
    shown = []
    for k, task in enumerate(report.tasks):
        curves = (charts.Line(run.series, _losses(run, task), _losses(run, task, "validation_loss")) for run in report.layered)
        lines = [line for line in curves if line.points]
        if not lines:
            continue
        perplexity = finite(report.main.scores.get(task, {}).get("target_perplexity", {}).get("floor"))
        floor = math.log(perplexity) if perplexity and perplexity > 0 else None
        shown.append(
            {
                "task": task,
                "chart": Markup(charts.loss_chart(task, lines, floor, f"loss-{k}")),
                "last": [(line.series.name, f"{line.points[-1][1]:.2f}", _last_of(line.validation)) for line in lines],
                "floor": None if floor is None else f"{floor:.2f}",
            }
        )
    return shown


def speeds(report: Report) -> list[dict[str, Any]]:
    """How fast each run trained, as far as its journal tells."""
    shown = []
    for run in report.layered:
        points = _points(run, lambda line: line.get("tokens_per_s"))
        shares = [share for _, share in _points(run, lambda line: line.get("matmul_share"))]
        if points:
            shown.append(
                {
                    "name": run.name,
                    "chart": Markup(charts.speed_chart(run.series, points)),
                    "tokens": f"{statistics.median(speed for _, speed in points):,.0f}",
                    "share": percent(statistics.median(shares)) if shares else None,
                }
            )
    return shown


def balance_rows(balance: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The balance table, written out; `values` are its numbers, for sorting."""
    written: dict[str, Callable[[float | None], str]] = {
        "pairs": lambda value: number(value, 0),
        "copies": lambda value: short(value, 3),
        "tokens": lambda value: "–" if value is None else count(value),
        "share_before": lambda value: "–" if value is None else percent(value, 1),
        "share_after": lambda value: "–" if value is None else percent(value, 1),
        "weight": lambda value: short(value, 3),
        "seen": times,
        "epochs": times,
        "pixel_seen": times,
    }
    rows = []
    for row in balance:
        values = {key: finite(row.get(key)) for key in written}
        texts = {key: write(values[key]) for key, write in written.items()}
        rows.append({"task": str(row.get("task")), "warning": str(row.get("warning") or ""), **texts, "values": values})
    return rows


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
    verb = "demo" if report.pipeline else "train"
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


def _losses(run: Run, task: str, key: str = "target_loss") -> list[charts.Point]:
    return _points(run, lambda line: of_tasks.get(task) if isinstance(of_tasks := line.get(key), Mapping) else None)


def _points(run: Run, value_of: Callable[[Mapping[str, Any]], Any]) -> list[charts.Point]:
    """(tokens, value) of every line of the journal that knows both."""
    known = ((finite(line.get("tokens")), finite(value_of(line))) for line in run.metrics)
    return [(tokens, value) for tokens, value in known if tokens is not None and value is not None]


def _last_of(points: Sequence[charts.Point]) -> str | None:
    return f"{points[-1][1]:.2f}" if points else None
