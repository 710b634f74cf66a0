"""The report page: `write_report(folder)` reads a pipeline or run folder and writes `report.html` into it.

A pipeline folder holds `student/` and `teacher/`, which the page compares; any other folder is a single run. The page is
one file of HTML without scripts: styles and pictures are in it, and its Content-Security-Policy forbids to load anything.
All text goes through the template's autoescape. What a folder lacks is left out with a short note.

The way through this file: `read` gathers a folder into a `Report`, `content` turns that into plain values, `render` fills
the template.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lvm_ray import __version__
from lvm_ray.continual import stage_folders
from lvm_ray.errors import UserError
from lvm_ray.progress import duration
from lvm_ray.recipe_sections import BalanceSection
from lvm_ray.report import charts, pictures
from lvm_ray.report.charts import Role
from lvm_ray.report.stages import stage_rows
from lvm_ray.storage import redacted
from lvm_ray.train.meter import read_metrics

LIBRARIES = ("torch", "ray", "deepspeed", "transformers")
TOKEN_METRICS = ("target_perplexity", "token_accuracy")


@dataclass(frozen=True)
class Metric:
    """How a metric is written: its name, digits after the point, unit, and what it measures."""

    label: str
    digits: int = 3
    unit: str = ""
    meaning: str = ""


METRICS = {  # a task's main metric comes before its others
    "miou": Metric("mIoU", meaning="overlap with the true masks"),
    "pck": Metric("PCK", meaning="joints found within 0.2 of the person’s box"),
    "pck_0.1": Metric("PCK 0.1", meaning="joints found within 0.1 of the person’s box"),
    "pck_0.05": Metric("PCK 0.05", meaning="joints found within 0.05 of the person’s box"),
    "ap": Metric("AP", meaning="COCO keypoint average precision"),
    "ar": Metric("AR", meaning="COCO keypoint average recall"),
    "psnr_y": Metric("PSNR", 2, "dB", "fidelity of the brightness channel"),
    "ssim_y": Metric("SSIM", meaning="structural likeness of the brightness channel"),
    "target_perplexity": Metric("perplexity", 1, meaning="of the true answer's tokens"),
    "token_accuracy": Metric("token accuracy", meaning="true tokens that were the likeliest"),
}


@dataclass(frozen=True)
class Run:
    """A run folder as far as it is there: lines of metrics, evaluation, gallery entries, number of parameters."""

    role: Role
    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    gallery: Sequence[Mapping[str, Any]]
    parameters: int | None


@dataclass(frozen=True)
class Report:
    """Everything that the page is made of. The last run is the one that the page is about."""

    folder: Path
    config: Mapping[str, Any]
    config_text: str
    balance: Sequence[Mapping[str, Any]]
    runs: Sequence[Run]

    @property
    def main(self) -> Run:
        return self.runs[-1]

    @property
    def tasks(self) -> list[str]:
        """The tasks in the recipe's order."""
        known = self.config.get("tasks")
        scored = self.main.evaluation.get("tasks", {})
        named = [*known] if isinstance(known, Mapping) else []
        return [str(task) for task in [*named, *(task for task in scored if task not in named)]]


def write_report(folder: str, form: str = "html") -> str:
    """Write `report.html`, `.md` or `.json` into a pipeline or run folder; its path.

    Raises UserError where the folder has neither metrics nor an evaluation, or where a file in it cannot be read.
    """
    text = render(read(Path(folder)), form)
    path = Path(folder) / f"report.{form}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return str(path)


def read(folder: Path) -> Report:
    """Gather what a folder holds."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name a pipeline or run folder, for example runs/demo")
    roles: tuple[tuple[Role, Path], ...] = (("teacher", folder / "teacher"), ("student", folder / "student"))
    runs = [run for role, place in roles if (run := _read_run(role, place)).metrics or run.evaluation]
    runs = runs or [_read_run("model", next(reversed(stage_folders(folder)), folder))]
    if not (runs[-1].metrics or runs[-1].evaluation):
        raise UserError(f"{folder}: neither metrics.jsonl nor evaluation.json here: run lvm-ray train, then lvm-ray evaluate")
    text = _text(folder / "config.yaml") or ""
    balance = _json(folder / "data" / "balance.json", list)
    return Report(folder, _config(folder), redacted(text), balance, runs)


def render(report: Report, form: str = "html") -> str:
    """The page as HTML; as Markdown without its pictures; or as JSON, what a program would read of it."""
    if form == "json":
        return json.dumps(values(report), indent=1, ensure_ascii=False) + "\n"
    place = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(place), autoescape=form == "html", undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _markdown
    style = Markup(charts.colours() + (place / "style.css").read_text(encoding="utf-8")) if form == "html" else ""
    return environment.get_template(f"page.{form}").render(style=style, **content(report))


def values(report: Report) -> dict[str, Any]:
    """What a program would read of a folder: each run's evaluation and last line of its journal, and the balance table."""
    runs = {
        run.role: {"parameters": run.parameters, "evaluation": run.evaluation, "last": run.metrics[-1] if run.metrics else None}
        for run in report.runs
    }
    stages = stage_rows(report.folder, report.config, report.tasks, lambda path: _json(path, dict))
    known = {"name": report.folder.resolve().name, "seed": report.config.get("seed"), "command": command(report)}
    return {**known, "runs": runs, "stages": stages, "balance": report.balance, "versions": dict(versions())}


def _markdown(text: object) -> str:
    """A text as part of a Markdown table: on one line, and nothing of it is a tag or a column's end."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def content(report: Report) -> dict[str, Any]:
    """What the template shows, by the names that it uses. Charts are Markup, everything else is plain."""
    return {
        "name": report.folder.resolve().name,
        "roles": [run.role for run in report.runs],
        "distilled": _section(report.main.config, "distill") != {},
        "examples": report.main.evaluation.get("examples", 3),
        "tasks": report.tasks,
        "facts": facts(report),
        "tiles": [tile for task in report.tasks if (tile := task_tile(report, task))],
        "galleries": galleries(report),
        "metrics": metric_groups(report),
        "stages": stage_rows(report.folder, report.config, report.tasks, lambda path: _json(path, dict)),
        "set_aside": counted(report, "bad"),
        "empty_answers": counted(report, "nothing"),
        "losses": losses(report),
        "validated": any(_points(run, lambda line: line.get("validation")) for run in report.runs),
        "speeds": speeds(report),
        "balance": balance_rows(report.balance),
        "weighted": any(_float(row.get("weight")) is not None for row in report.balance),
        "mixture": mixture_charts(report),
        "strategy": _section(report.config, "balance").get("strategy"),
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
        model = _section(run.config, "model")
        remark = f"{model['width']} wide, {model['layers']} layers" if {"width", "layers"} <= set(model) else ""
        if run.parameters:
            found.append((run.role, f"{charts.count(run.parameters)} parameters", remark))
    for run in report.runs:
        last = run.metrics[-1] if run.metrics else {}
        if (tokens := _float(last.get("tokens"))) is not None:
            steps = _float(last.get("step"))
            term = f"{run.role} trained on" if len(report.runs) > 1 else "trained on"
            found.append((term, f"{charts.count(tokens)} tokens", "" if steps is None else f"in {steps:,.0f} steps"))
    times = [
        (run.role, seconds)
        for run in report.runs
        if run.metrics and (seconds := _float(run.metrics[-1].get("seconds"))) is not None
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
    name = _ordered(entries)[0]
    metric, entry = _metric(name), entries[name]
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
        "progress": [(mark.role, charts.percent(mark.progress)) for mark in reversed(marks)],
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
        rows = [_metric_row(report, task, name, entries[name]) for name in _ordered(entries)]
        if rows:
            groups.append({"task": task, "rows": rows, "n": max(_item_counts(report.main, task), default=None)})
    return groups


def _metric_row(report: Report, task: str, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    metric = _metric(name)
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
        "progress": charts.percent(marks[-1].progress) if marks else None,
        "below_floor": _float(entry.get("ceiling")) is not None and not _has_way(entry),
    }


def counted(report: Report, key: str) -> str:
    """What the evaluation counts by task under a key, `bad` items or answers that show `nothing`; empty where there are none."""
    found = report.main.evaluation.get(key)
    counts = {task: number for task, number in found.items() if number} if isinstance(found, Mapping) else {}
    return ", ".join(f"{number} of {task}" for task, number in counts.items())


def losses(report: Report) -> list[dict[str, Any]]:
    """A chart of each task's target loss."""
    shown = []
    for k, task in enumerate(report.tasks):
        curves = (charts.Line(run.role, _losses(run, task), _losses(run, task, "validation_loss")) for run in report.runs)
        lines = [line for line in curves if line.points]
        if not lines:
            continue
        perplexity = _float(_entries(report.main, task).get("target_perplexity", {}).get("floor"))
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
                    "share": charts.percent(statistics.median(shares)) if shares else None,
                }
            )
    return shown


def balance_rows(balance: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The balance table, written out."""
    return [
        {
            "task": str(row.get("task")),
            "pairs": number(row.get("pairs"), 0),
            "copies": _short(row.get("copies"), 3),
            "tokens": "–" if (tokens := _float(row.get("tokens"))) is None else charts.count(tokens),
            "share_before": "–" if (share := _float(row.get("share_before"))) is None else charts.percent(share, 1),
            "share_after": "–" if (share := _float(row.get("share_after"))) is None else charts.percent(share, 1),
            "weight": _short(row.get("weight"), 3),
            "seen": charts.times(_float(row.get("seen"))),
            "epochs": charts.times(_float(row.get("epochs"))),
            "pixel_seen": charts.times(_float(row.get("pixel_seen"))),
            "warning": str(row.get("warning") or ""),
        }
        for row in balance
    ]


def mixture_charts(report: Report) -> dict[str, Any] | None:
    """The pictures of the balance table; None where it lacks the shares."""
    parts = charts.mixture(report.balance)
    if not parts:
        return None
    most = _float(_section(report.config, "balance").get("most_repeats")) or BalanceSection().most_repeats
    return {
        "shares": Markup(charts.share_chart(parts)),
        "repeats": Markup(charts.repeats_chart(parts, most)),
        "most": charts.times(most),
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


def number(value: Any, digits: int) -> str:
    """A number with so many digits after the point, a dash where there is none."""
    known = _float(value)
    return "–" if known is None else f"{known:,.{digits}f}".replace("-", "−")


def interval(ends: Any, metric: Metric) -> str:
    """A 95 % interval as `0.38–0.44`, `−0.02 to 0.01` where a dash would read as a minus; empty where there is none."""
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or None in (_float(ends[0]), _float(ends[1])):
        return ""
    low, high = (number(end, metric.digits) for end in ends)
    return f"{low} to {high}" if "−" in low + high else f"{low}–{high}"


def _metric(name: str) -> Metric:
    return METRICS.get(name, Metric(name))


def _ordered(entries: Mapping[str, Any]) -> list[str]:
    """A task's metrics, its main one first, those of tokens last."""
    known = [*METRICS]
    return sorted(entries, key=lambda name: (name in TOKEN_METRICS, known.index(name) if name in known else len(known), name))


def _entries(run: Run, task: str) -> Mapping[str, Mapping[str, Any]]:
    entries = run.evaluation.get("tasks", {}).get(task, {})
    return {str(name): entry for name, entry in entries.items() if isinstance(entry, Mapping)}


def _item_counts(run: Run, task: str) -> list[int]:
    return [int(entry["n"]) for entry in _entries(run, task).values() if _float(entry.get("n")) is not None]


def _has_way(entry: Mapping[str, Any]) -> bool:
    """Whether the ceiling is better than the floor: progress says nothing where no model at all beats the tokenizer."""
    floor, ceiling = _float(entry.get("floor")), _float(entry.get("ceiling"))
    if floor is None or ceiling is None:
        return False
    return ceiling > floor if entry.get("higher_is_better", True) else ceiling < floor


def _marks(report: Report, task: str, name: str) -> list[charts.Mark]:
    """Every run's place between floor and ceiling; the interval of the main run alone."""
    marks = []
    for run in report.runs:
        entry = _entries(run, task).get(name, {})
        floor, ceiling, value = (_float(entry.get(key)) for key in ("floor", "ceiling", "value"))
        if not _has_way(entry) or floor is None or ceiling is None or value is None:
            continue
        band = None
        if run is report.main and interval(entry.get("ci95"), _metric(name)):
            low, high = sorted((end - floor) / (ceiling - floor) for end in entry["ci95"])
            band = (low, high)
        marks.append(charts.Mark(run.role, (value - floor) / (ceiling - floor), band))
    return marks if any(mark.role == report.main.role for mark in marks) else []


def _losses(run: Run, task: str, key: str = "target_loss") -> list[charts.Point]:
    return _points(run, lambda line: of_tasks.get(task) if isinstance(of_tasks := line.get(key), Mapping) else None)


def _points(run: Run, value_of: Callable[[Mapping[str, Any]], Any]) -> list[charts.Point]:
    """(tokens, value) of every line of the journal that knows both."""
    known = ((_float(line.get("tokens")), _float(value_of(line))) for line in run.metrics)
    return [(tokens, value) for tokens, value in known if tokens is not None and value is not None]


def _last_of(points: Sequence[charts.Point]) -> str | None:
    return f"{points[-1][1]:.2f}" if points else None


_float = charts.finite


def _short(value: Any, digits: int = 6) -> str:
    known = _float(value)
    return "–" if known is None else f"{known:.{digits}g}"


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _read_run(role: Role, folder: Path) -> Run:
    evaluation = _json(folder / "evaluation.json", dict)
    tasks = evaluation.get("tasks", {})
    if not isinstance(tasks, dict) or not all(isinstance(entries, dict) for entries in tasks.values()):
        raise UserError(f"{folder}/evaluation.json: tasks: not a mapping of tasks to metrics: run lvm-ray evaluate again")
    return Run(
        role,
        folder,
        _config(folder),
        read_metrics(folder),
        evaluation,
        [entry for entry in _json(folder / "gallery.json", list) if isinstance(entry, dict)],
        parameters(folder / "model" / "model.safetensors"),
    )


def parameters(path: Path) -> int | None:
    """How many numbers a safetensors file holds, from its header alone; None where there is no such file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:  # the format's own limit
                raise ValueError
            header = json.loads(file.read(length))
        return sum(int(math.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a safetensors file: train the run again, or remove it") from None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        value = yaml.safe_load(_text(path) or "")
    except yaml.YAMLError:
        raise UserError(f"{path}: not valid YAML: write the recipe anew by training again, or remove the file") from None
    return value if isinstance(value, dict) else {}


def _json(path: Path, kind: type[Any]) -> Any:
    """The content of a JSON file, an empty one of its kind where there is none."""
    text = _text(path)
    if text is None:
        return kind()
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise UserError(f"{path}: not a JSON {'list' if kind is list else 'object'}: remove it, or make it again")
    return value


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot read it as text in UTF-8: remove it, or make it again") from None
