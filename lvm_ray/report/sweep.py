"""A sweep's `sweep.json` to one HTML page: what each setting does, the search, all trials."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lvm_ray.errors import UserError
from lvm_ray.progress import duration
from lvm_ray.report import sweep_charts
from lvm_ray.report.mixture import colours
from lvm_ray.report.sweep_charts import Dot
from lvm_ray.report.words import finite
from lvm_ray.storage import redacted
from lvm_ray.tune import answers

JSON = "sweep.json"


def write_sweep(folder: str, form: str = "html") -> str:
    """Write `report.html` into a sweep's folder; its path. Raises UserError where `sweep.json` cannot be read."""
    path = Path(folder) / JSON
    if form != "html":
        raise UserError(f"--format {form}: a sweep's values are in {path}: leave --format out for its page")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        text = render(values, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no sweep's values ({type(error).__name__}: {error}): run lvm-ray tune again") from None
    page = Path(folder) / "report.html"
    temporary = page.with_name(f".{page.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(page)
    return str(page)


def render(values: Mapping[str, Any], folder: str) -> str:
    """The page of a sweep's values."""
    place = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(place), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = "".join((place / name).read_text(encoding="utf-8") for name in ("style.css", "sweep.css"))
    return environment.get_template("sweep.html").render(style=Markup(colours() + style), **content(values, folder))


def content(values: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What the template shows, by the names that it uses."""
    trials, space = values["trials"], values["space"]
    goals = [answers.NAMES.get(name, name) for name in space["objectives"]]
    dots = dots_of(trials, space["objectives"][0])
    keys = [key for key in space["values"] if len({json.dumps(one["settings"].get(key)) for one in trials}) > 1]
    tried = [dot for dot in dots if dot.search]
    best = (values["best"] or {}).get("number")
    return {
        "name": Path(folder).resolve().name,
        "folder": redacted(folder),
        "sentence": values["sentence"],
        "complete": values["complete"],
        "facts": facts(values),
        "keys": keys,
        "goals": goals,
        "best": "–" if best is None else best,
        "curves": [(key, Markup(sweep_charts.curve(key, dots, means_of(dots, key), goals[0]))) for key in _tried(keys, tried)],
        "history": Markup(sweep_charts.history(dots, goals[0])) if tried else "",
        "importance": Markup(sweep_charts.importance(parts)) if (parts := importances(dots, _tried(keys, tried))) else "",
        "parallel": _parallel(dots, _tried(keys, tried), goals[0]),
        "pareto": _pareto(values, goals),
        "rows": [_row(one, keys, space["objectives"], best) for one in trials],
    }


def dots_of(trials: Sequence[Mapping[str, Any]], goal: str) -> list[Dot]:
    """The trials that have a result."""
    found = [(one, finite(one["objectives"].get(goal))) for one in trials]
    return [
        Dot(
            int(one["number"]),
            one["settings"],
            value,
            one["state"] == "finished" and one.get("until") is None,
            one["kind"] == "search",
        )
        for one, value in found
        if value is not None and value > 0
    ]


def means_of(dots: Sequence[Dot], key: str) -> list[tuple[Any, float, tuple[float, float] | None]]:
    """(setting, mean, 95 % interval) of trials that were trained again, by their settings; of perplexities, so by logarithms."""
    groups: dict[str, list[Dot]] = {}
    for dot in dots:
        if not dot.search and dot.whole and key in dot.settings:
            groups.setdefault(json.dumps(dot.settings, sort_keys=True), []).append(dot)
    return [(group[0].settings[key], *interval([dot.value for dot in group])) for group in groups.values()]


def interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The mean and Student's 95 % interval of positive values, by their logarithms; None of one value."""
    logs = np.log(values)
    if len(logs) < 2:
        return float(np.exp(logs.mean())), None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(logs) - 1)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    centre = float(logs.mean())
    return math.exp(centre), (math.exp(centre - half), math.exp(centre + half))


def importances(dots: Sequence[Dot], keys: Sequence[str]) -> dict[str, float]:
    """What part of the order of the trials each setting explains by itself, 0..1: of a number the adjusted R² of a parabola
    through its ranks, since a temperature is best in the middle; of a choice that of its groups. {} of too few trials."""
    tried = [dot for dot in dots if dot.search and dot.whole and all(key in dot.settings for key in keys)]
    if len(tried) < 5:
        return {}
    goal = _ranks([dot.value for dot in tried])
    return {key: _explained([dot.settings[key] for dot in tried], goal) for key in keys}


def _explained(values: Sequence[Any], goal: np.ndarray[Any, Any]) -> float:
    numbers = [finite(value) for value in values]
    if None in numbers:
        names = [json.dumps(value) for value in values]
        groups = sorted(set(names))
        fitted = sum(
            np.array([name == group for name in names]) * goal[[name == group for name in names]].mean() for group in groups
        )
        used = len(groups)
    else:
        ranks = _ranks(numbers)
        degree = min(2, len(set(numbers)) - 1)
        fitted, used = np.polyval(np.polyfit(ranks, goal, degree), ranks), degree + 1
    left, total = float(((goal - fitted) ** 2).sum()), float(((goal - goal.mean()) ** 2).sum())
    if not total or len(goal) <= used:
        return 0.0
    return max(0.0, 1 - left / total * (len(goal) - 1) / (len(goal) - used))


def _ranks(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    from scipy.stats import rankdata

    ranks: np.ndarray[Any, Any] = rankdata(values)
    return ranks


def _tried(keys: Sequence[str], tried: Sequence[Dot]) -> list[str]:
    """The keys that differ between the search's trials, and that all of them have."""
    known = [key for key in keys if tried and all(key in dot.settings for dot in tried)]
    return [key for key in known if len({json.dumps(dot.settings[key]) for dot in tried}) > 1]


def _parallel(dots: Sequence[Dot], keys: Sequence[str], goal: str) -> Any:
    if len(keys) < 2 or not any(dot.search and dot.whole for dot in dots):
        return ""
    return Markup(sweep_charts.parallel(dots, keys, goal))


def _pareto(values: Mapping[str, Any], goals: Sequence[str]) -> Any:
    names = values["space"]["objectives"]
    done = [one for one in values["trials"] if one["state"] == "finished" and one["kind"] == "search"]
    if len(names) < 2 or not done:
        return ""
    points = [(one["number"], *(float(one["objectives"][name]) for name in names[:2])) for one in done]
    return Markup(sweep_charts.pareto(points, answers.front(done, names[:2]), (goals[0], goals[1])))


def facts(values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The head of the page: (term, value, remark)."""
    trials, counters = values["trials"], values["counters"]
    states = {state: sum(one["state"] == state for one in trials) for state in ("finished", "stopped", "failed")}
    search = f"{values['space']['search']}" + (f" with {values['space']['stopping']}" if values["space"]["stopping"] else "")
    return [
        ("trials", str(len(trials)), ", ".join(f"{number} {state}" for state, number in states.items() if number)),
        ("search", search, f"over {len(values['space']['values'])} settings"),
        ("training", duration(sum(one["seconds"] for one in trials)), "of all trials, one after another"),
        ("compared with", values["reference"]["text"], f"{values['reference']['seeds']} seeds"),
        ("asked of teachers", f"{counters['teacher_forwards']:,}", "forwards by trials: their answers are kept"),
    ]


def _row(one: Mapping[str, Any], keys: Sequence[str], names: Sequence[str], best: Any) -> dict[str, Any]:
    values = [finite(one["objectives"].get(name)) for name in names]
    return {
        "number": one["number"],
        "best": one["number"] == best,
        "settings": ["–" if key not in one["settings"] else _text(one["settings"][key]) for key in keys],
        "kind": one["kind"],
        "seed": one["seed"],
        "state": f"stopped at step {one['step']}" if one["state"] == "stopped" else one["state"],
        "objectives": ["–" if value is None else f"{value:.5g}" for value in values],
        "seconds": duration(one["seconds"]) if one["seconds"] else "",
        "reason": redacted(one["reason"]),
    }


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
