"""The stages of a pipeline, one function a verb: each takes a recipe, shows its progress and leaves its files.

    synth -> tokenize -> balance -> train (teacher, then student) -> evaluate -> report

`demo` is all of them in order. Every stage that is finished already says so and does nothing, so that an interrupted
pipeline goes on where it stopped. Heavy libraries are imported inside the stages, after the cheap checks.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.progress import duration, say, stage, table


def synth(recipe: Recipe) -> None:
    """Write the embedded data set below the pipeline folder, where the recipe asks for one (`synth`)."""
    from lvm_ray.data import synthetic

    if not recipe.synth:
        raise UserError(
            "synth: this recipe names no embedded data set; add a section like `synth: {train: {segmentation: 3000}}`"
        )
    folder = Path(recipe.run) / "data" / "source"
    mark = folder / "synth.json"
    wanted = {"version": synthetic.VERSION, "counts": recipe.synth, "size": recipe.size, "seed": recipe.seed}
    total = sum(count for tasks in recipe.synth.values() for count in tasks.values())
    with stage("synth", total=total, unit="pairs") as bar:
        if mark.is_file() and json.loads(mark.read_text()) == wanted:
            bar.set(total, note="as before")
            return
        shutil.rmtree(folder, ignore_errors=True)
        synthetic.write(str(folder), recipe.synth, recipe.size, recipe.seed, bar.advance)
        mark.write_text(json.dumps(wanted))


def tokenize(recipe: Recipe) -> None:
    """Train the tokenizer where the pipeline has none, then make token shards of every split, task and copy."""
    from lvm_ray.data import tokenize as shards

    _make_tokenizer(recipe)
    with stage("tokenize", unit="pairs") as bar:
        shards.tokenize(recipe, bar)


def balance(recipe: Recipe) -> list[dict[str, Any]]:
    """Print and keep the balance table: what each task has, and what part of the plan it gets."""
    from lvm_ray.data.balance import balance_table
    from lvm_ray.data.shards import open_shards

    rows = balance_table(open_shards(recipe.shard_folder).manifest, recipe)
    columns = ["task", "pairs", "copies", "tokens", "share before", "share after", "each copy is seen"]
    cells = [
        [
            row["task"],
            f"{row['pairs']:,}",
            f"{row['copies']:g}",
            f"{row['tokens']:,}",
            f"{row['share_before']:.1%}",
            f"{row['share_after']:.1%}",
            f"{row['epochs']:.1f} x",
        ]
        for row in rows
    ]
    table(f"balance: {recipe.balance.strategy}", columns, cells)
    place = Path(recipe.run) / "data" / "balance.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(rows, indent=1))
    return rows


def train(recipe: Recipe, only: str | None = None) -> list[str]:
    """Train what the recipe describes: teacher then student, or a single run. The run folders.

    `only`: one of tokenizer, teacher and student by itself. Raises UserError where the recipe has no teacher to tell apart.
    """
    if only == "tokenizer":
        _make_tokenizer(recipe)
        return [recipe.tokenizer_folder]
    from lvm_ray.train import launch

    if recipe.teacher is None:
        if only:
            raise UserError(f"--only {only}: this recipe has no teacher section, so it is a single run: leave --only out")
        runs = {"": recipe}
    else:
        _keep_recipe(recipe)
        runs = {"teacher": config.teacher_recipe(recipe), "student": config.student_recipe(recipe)}
    folders = []
    for run in [runs[only]] if only else runs.values():
        with stage(f"train {Path(run.run).name}", total=run.train.steps, unit="steps") as bar:
            folders.append(str(launch.train(run, bar)))
    return folders


def evaluate(recipe: Recipe) -> None:
    """Score the recipe's runs on the test split; a pipeline's own `evaluation.json` is the student's."""
    from lvm_ray.evaluate.run import evaluate_runs

    runs = [f"{recipe.run}/teacher", f"{recipe.run}/student"] if recipe.teacher else [recipe.run]
    for run in runs:
        if not (Path(run) / "model" / "model.safetensors").is_file():
            raise UserError(f"{run}: no trained model here (model/model.safetensors); run `lvm-ray train` first")
    with stage("evaluate", unit="answers") as bar:
        results = evaluate_runs(runs, recipe, bar)
    if recipe.teacher:
        shutil.copyfile(f"{recipe.run}/student/evaluation.json", f"{recipe.run}/evaluation.json")
    _print_scores({Path(run).name: result for run, result in zip(runs, results, strict=True)})


def report(folder: str) -> str:
    """Write the report page of a pipeline or run folder; its path."""
    from lvm_ray.report.page import write_report

    with stage("report") as bar:
        path = write_report(folder)
        bar.set(1, note=str(path))
    return str(path)


def demo(recipe: Recipe) -> str:
    """Every stage in order, from nothing to the report page; the page's path."""
    began = time.monotonic()
    if recipe.synth:
        synth(recipe)
    tokenize(recipe)
    balance(recipe)
    train(recipe)
    evaluate(recipe)
    path = report(recipe.run)
    say(f"done in {duration(time.monotonic() - began)}: open {path}")
    return path


def _make_tokenizer(recipe: Recipe) -> None:
    """Train the tokenizer, or read the published one, where the pipeline has none."""
    from lvm_ray import tokenizer

    steps = 0 if recipe.tokenizer.kind == "published" else recipe.tokenizer.steps
    with stage("tokenizer", total=steps or None, unit="steps") as bar:
        if tokenizer.is_trained(recipe):
            bar.set(steps, note="as before")
        else:
            tokenizer.train_tokenizer(recipe, lambda done, note: bar.set(done, note=note))
            bar.set(steps)


def _keep_recipe(recipe: Recipe) -> None:
    """The pipeline's own resolved recipe, at the top of its folder."""
    place = Path(recipe.run)
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(config.dump(recipe), encoding="utf-8")


def _print_scores(evaluations: dict[str, dict[str, Any]]) -> None:
    first = next(iter(evaluations.values()))["tasks"]
    rows = []
    for task, metrics in first.items():
        for metric, entry in metrics.items():
            values = [_interval(result["tasks"][task][metric]) for result in evaluations.values()]
            last = list(evaluations.values())[-1]["tasks"][task][metric]
            rows.append([task, metric, _number(entry["floor"]), *values, _number(entry["ceiling"]), _progress(last)])
    table("scores on the test split", ["task", "metric", "floor", *evaluations, "ceiling", "progress"], rows)


def _progress(entry: dict[str, Any]) -> str:
    """Progress in percent; where the tokenizer's ceiling is no better than the floor there is no way to progress on."""
    if entry["progress"] is None:
        return ""
    better = entry["ceiling"] > entry["floor"] if entry["higher_is_better"] else entry["ceiling"] < entry["floor"]
    return f"{entry['progress']:.0%}" if better else "ceiling below floor"


def _interval(entry: dict[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{_number(entry['value'])} [{_number(low)}, {_number(high)}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
