"""What a student learns from a teacher, and how: plain, three divergences, the student's own answers, kept answers.

A teacher of four layers and twice the student's width, on the embedded data set. All students of a seed start from the same
weights, see the same rows and take as many steps; nothing is chosen on the test scenes. Three seeds, each with scenes, tokenizer
and models of its own.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvm_ray import config, pipeline
from lvm_ray.config import Recipe
from tests.bench.figure import Figure

SEEDS = (21, 22, 23)
TASKS = ("segmentation", "pose", "derain")
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "forward KL": {},
    "forward KL, T = 2": {"temperature": 2.0},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD": {"divergence": "jsd"},
    "own answers in a quarter of the steps": {"on_policy": 0.25},
    "kept hidden states": {"cache": "hidden"},
    "kept likely tokens": {"cache": "sparse", "sparse": {"top": 64, "tail": 16}},
}
KEPT = {"kept hidden states": ("cache_vs_online", 1.01), "kept likely tokens": ("cache_vs_online_sparse", 1.03)}


def recipes(place: Path) -> Iterator[tuple[str, Recipe]]:
    for seed in SEEDS:
        for arm in ARMS:
            yield f"{arm}, seed {seed}", _student(_base(place, seed), arm)


def run(recipe: Recipe) -> dict[str, Any]:
    """One student, and its data and its teacher where they are not there yet: scores of both, seconds of the student."""
    base = _base(Path(recipe.run).parent.parent, recipe.seed)
    pipeline.synth(base)
    pipeline.tokenize(base)
    pipeline.train(base, "teacher")
    if any(one.cache for one in recipe.teachers.values()):
        pipeline.cache(recipe)
    began = time.monotonic()
    pipeline.train(recipe)
    seconds = time.monotonic() - began
    scores = {}
    for name, one in (("student", recipe), ("teacher", config.teacher_recipe(base))):
        if not (Path(one.run) / "evaluation.json").is_file():
            pipeline.evaluate(one)
        scores[name] = json.loads((Path(one.run) / "evaluation.json").read_text())["tasks"]
    return {
        "recipe": config.fingerprint(recipe),
        "seed": recipe.seed,
        "seconds": {"train": round(seconds, 1)},
        "tasks": scores["student"],
        "teacher": scores["teacher"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with the lowest and the highest: perplexities, and the part of the gap that is closed over all tasks."""
    lines = [f"| student | seeds | {' | '.join(f'{task} target perplexity' for task in TASKS)} | gap closed | seconds to train |"]
    lines.append("|---" * (len(TASKS) + 4) + "|")
    plain = _by_seed(rows, "plain")
    if plain:
        lines.append(_line("the teacher", [_perplexities(row["teacher"]) for row in plain.values()], None, None))
    for arm in ARMS:
        mine = _by_seed(rows, arm)
        if mine:
            found = {seed: _perplexities(row["tasks"]) for seed, row in mine.items()}
            closed = [_closed(found[seed], plain[seed]) for seed in found if seed in plain and arm != "plain"]
            seconds = statistics.mean(row["seconds"]["train"] for row in mine.values())
            lines.append(_line(arm, list(found.values()), closed, seconds))
    return "\n".join(lines)


def figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """How much kept answers cost: the geometric mean over tasks and seeds of perplexity over that of the student that asks."""
    online, found = _by_seed(rows, "forward KL"), {}
    for arm, (name, wanted) in KEPT.items():
        seeds = _by_seed(rows, arm).keys() & online.keys()
        if not seeds:
            continue
        ratios = [_ratio(_by_seed(rows, arm)[seed], online[seed]) for seed in sorted(seeds)]
        each = ", ".join(f"{ratio:.4f}" for ratio in ratios)
        how = f"target perplexity over that of the student that asks its teacher, mean of {len(ratios)} seeds ({each})"
        found[name] = Figure(statistics.mean(ratios), "x", f"<= {wanted}", how)
    return found


def _base(place: Path, seed: int) -> Recipe:
    settings = [
        f"seed={seed}",
        "synth={train: {segmentation: 1500, pose: 300, derain: 60}, test: {segmentation: 64, pose: 64, derain: 64}}",
        *(f"tasks.{task}.validation=null" for task in TASKS),
        "tasks.pose.copies=8",
        "tasks.derain.copies=20",
        "model={width: 64, layers: 2, heads: 4, mlp: 176, rope_base: 100, aligned_heads: true}",
        "train.steps=400",
        "teacher={model: {width: 128, layers: 4, mlp: 352}, train: {steps: 700, rate: 6.0e-3, muon_rate: 0.045}}",
        "distill={temperature: 1.0, weight: 1.0}",
        "evaluate={items: 64}",
        "compute.workers=0",
    ]
    return config.load("recipes/demo.yaml", settings, run=str(place / f"distillation-{seed}"))


def _student(base: Recipe, arm: str) -> Recipe:
    values, changes = config.to_dict(config.student_recipe(base)), ARMS[arm]
    values["run"] = f"{base.run}/{re.sub(r'[^a-z0-9]+', '-', arm.lower())}"
    if changes is None:
        values["distill"] = None
    else:
        cache = changes.get("cache")
        values["distill"] |= changes | {"cache": cache and f"{base.run}/answers-{cache}"}
    return Recipe.model_validate(values)


def _by_seed(rows: list[dict[str, Any]], arm: str) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in rows if row["label"] == f"{arm}, seed {row['seed']}"}


def _perplexities(tasks: dict[str, Any]) -> list[float]:
    return [tasks[task]["target_perplexity"]["value"] for task in TASKS]


def _closed(found: list[float], plain: dict[str, Any]) -> float:
    """Mean over tasks of (plain - student) / (plain - teacher)."""
    gaps = zip(_perplexities(plain["tasks"]), found, _perplexities(plain["teacher"]), strict=True)
    return statistics.mean((alone - own) / (alone - teacher) for alone, own, teacher in gaps)


def _ratio(row: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip(_perplexities(row["tasks"]), _perplexities(other["tasks"]), strict=True)
    return math.exp(statistics.mean(math.log(own / reference) for own, reference in pairs))


def _line(name: str, perplexities: list[list[float]], closed: list[float] | None, seconds: float | None) -> str:
    cells = [name, str(len(perplexities))]
    cells += [
        f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in zip(*perplexities, strict=True)
    ]
    cells.append(f"{statistics.mean(closed):.2f} ({min(closed):.2f} to {max(closed):.2f})" if closed else "")
    cells.append("" if seconds is None else f"{seconds:.0f}")
    return f"| {' | '.join(cells)} |"
