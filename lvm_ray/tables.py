"""The tables that verbs print when they have found something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lvm_ray.progress import bars, say, table

SURE = 0.05  # p below which a difference is called one


def print_balance(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """What each task has and gets, by the rows of `data.balance.balance_table`, and its part before and after as bars."""
    columns = ["task", "pairs", "copies", "tokens", "each original is seen", "each version", "each pixel", "loss weight"]
    cells = [
        [
            row["task"],
            f"{row['pairs']:,}",
            f"{row['copies']:.3g}",
            f"{row['tokens']:,}",
            _times(row["seen"]),
            _times(row["epochs"]),
            _times(row["pixel_seen"]),
            row["weight"] and f"{row['weight']:.3g}",
        ]
        for row in rows
    ]
    # A column of dashes would tell nobody anything.
    kept = [place for place in range(len(columns)) if columns[place] != "loss weight" or rows[0]["weight"] is not None]
    table(f"balance: {title}", [columns[k] for k in kept], [[line[k] for k in kept] for line in cells])
    bars(
        "part of the pairs (before) and of the training (after)",
        [(row["task"], [("before", row["share_before"]), ("after", row["share_after"])]) for row in rows],
    )


def print_scores(evaluations: Mapping[str, Mapping[str, Any]], references: Mapping[str, Any] | None = None) -> None:
    """Every metric of some runs' evaluations, {run: evaluation}, with the scores of devoted networks where there are any."""
    scored = {name: _scored(result) for name, result in evaluations.items()}
    split = next(iter(evaluations.values()))["split"]
    devoted = [] if references is None else ["reference"]
    rows = []
    for task, first in next(iter(scored.values())).items():
        for metric, entry in first["scores"].items():
            entries = [found[task]["scores"][metric] for found in scored.values()]
            values, last = [_interval(entry) for entry in entries], entries[-1]
            if references is not None:
                known = references.get(task, {}).get(metric)  # of tokens a network without tokens has no score
                values.append(_interval(known) if known else "")
            rows.append([task, metric, _number(entry["floor"]), *values, _number(entry["ceiling"]), _progress(last)])
    table(f"scores on the {split} split", ["task", "metric", "floor", *evaluations, *devoted, "ceiling", "progress"], rows)
    for task, how in ({} if references is None else references["how"]).items():
        say(f"reference of {task}: {how}")
    for name, found in scored.items():
        for task, result in found.items():
            if result["nothing"]:
                n = next(iter(result["scores"].values()))["n"]
                say(f"{name}: {result['nothing']} of {n} answers of {task} show nothing at all")


def print_comparison(found: Mapping[str, Any], names: Sequence[str]) -> None:
    """By what two runs differ, as `evaluate.compare` found it; `names` of the first and the second."""
    rows = []
    for task, metrics in found["tasks"].items():
        for metric, entry in metrics.items():
            low, high = entry["ci95"]
            values = [_number(entry["first"]), _number(entry["second"])]
            difference = f"{entry['difference']:+.3f} [{low:+.3f}, {high:+.3f}]" if low is not None else ""
            rows.append([task, metric, str(entry["n"]), *values, difference, f"{entry['p']:.4f}", _verdict(entry)])
    table(f"{names[1]} against {names[0]}", ["task", "metric", "items", *names, "difference", "p", ""], rows)
    say(f"95 % intervals and p by {found['resamples']:,} draws over items: chance in the items, not in the trainings")
    for line in found["remarks"]:
        say(line)


def print_study(found: Mapping[str, Any], split: str) -> None:
    """What each way to ask scores, as `evaluate.study` found it, and the best way of each task against the run's own."""
    from lvm_ray.evaluate import study as studying

    own = found["ways"][0]["tasks"]
    mains = {task: next(iter(entries)) for task, entries in own.items()}
    columns = [f"{task} {metric}" for task, main in mains.items() for metric in (main, "target_perplexity")]
    rows = [
        [studying.words(way["settings"])]
        + [_interval(way["tasks"][task][metric]) for task, main in mains.items() for metric in (main, "target_perplexity")]
        for way in found["ways"]
    ]
    table(f"ways to ask, {split} split", ["", *columns], rows)
    for task, metric in mains.items():
        best = studying.best_way(found, task, metric)
        if best is None:
            say(f"{task}: no way is better than the run's own")
            continue
        settings, entry = best
        low, high = entry["ci95"]
        against = f"{metric} {entry['difference']:+.3f} [{low:+.3f}, {high:+.3f}] against the run's own, p {entry['p']:.3f}"
        say(f"{task}: the best is {studying.words(settings)}: {against}")
    say(f"the best of {len(rows) - 1} looks better than it is: p does not know how many were tried")


def _scored(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"scores": {metric: entry}, "nothing": answers that show nothing} of each task, and of each benchmark as NAME@VERSION."""
    nothing = evaluation["nothing"]
    tasks = {task: {"scores": scores, "nothing": nothing[task]} for task, scores in evaluation["tasks"].items()}
    return tasks | {f"{name}@{entry['version']}": entry for name, entry in evaluation["benchmarks"].items()}


def _verdict(entry: Mapping[str, Any]) -> str:
    """In a word, where chance is no likely reason."""
    if entry["p"] >= SURE or not entry["difference"]:
        return ""
    return "better" if (entry["difference"] > 0) == entry["higher_is_better"] else "worse"


def _times(value: float | None) -> str | None:
    """How often something is seen; None, a dash in the table, where nobody knows."""
    return None if value is None else f"{value:.1f} x"


def _progress(entry: dict[str, Any]) -> str:
    """Progress in percent; where the tokenizer's ceiling is no better than the floor there is no way to progress on."""
    if entry["progress"] is None:
        return ""
    better = entry["ceiling"] > entry["floor"] if entry["higher_is_better"] else entry["ceiling"] < entry["floor"]
    return f"{entry['progress']:.0%}" if better else "ceiling below floor"


def _interval(entry: dict[str, Any]) -> str:
    low, high = entry["ci95"]
    return "" if entry["value"] is None else f"{_number(entry['value'])} [{_number(low)}, {_number(high)}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
