"""Teacher, student and distilled student of one task alone (the paper's Table 2): segmentation and poses, each by itself.

As in the paper the distillation is that of the distributions alone, at temperature 1 and weight 1, the student starting from
nothing. A student sees a third of the rows that the students of three tasks see in `distillation.py`, so each task gets as many.
Rates are those found for the demo, on scenes of other seeds; no arm had trials of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvm_ray import config
from lvm_ray.config import Recipe
from tests.studies import scenes
from tests.studies.scenes import FRESH, SMALL, perplexity
from tests.studies.summary import spread

SEEDS = (81, 82, 83)
TASKS = {"segmentation": "miou", "pose": "pck"}
TEACHER = "teacher"
ARMS: dict[str, dict[str, Any]] = {
    TEACHER: {"model": {"width": 128, "layers": 3}, "train": FRESH | {"steps": 160}},
    "plain": {"model": SMALL, "train": FRESH | {"steps": 80}},
    "distilled": {"model": SMALL, "train": FRESH | {"steps": 80}},
}


def recipes(place: Path) -> Iterator[tuple[str, Recipe]]:
    for seed in SEEDS:
        for task in TASKS:
            base = _base(place, task, seed)
            for arm, changes in ARMS.items():
                distill = {"distill": {"teacher": scenes.folder_of(base, TEACHER)}} if arm == "distilled" else {}
                yield f"{task}, {arm}, seed {seed}", scenes.arm(base, arm, changes | distill)


def run(recipe: Recipe) -> dict[str, Any]:
    (task,) = recipe.tasks
    scenes.prepare(_base(Path(recipe.run).parent.parent, task, recipe.seed))
    row = scenes.row_of(recipe)
    for one in recipe.teachers.values():
        row["operations"]["asking"] = scenes.operations(config.load(f"{one.teacher}/config.yaml"), recipe.train.steps) / 3
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Each task's three models, and the part of the gap that the distillation closes."""
    lines = ["| task | model | seeds | target perplexity | metric | gap closed | TFLOP |", "|---" * 7 + "|"]
    for task, metric in TASKS.items():
        arms = {arm: scenes.by_seed(rows, f"{task}, {arm}") for arm in ARMS}
        for arm, mine in arms.items():
            if not mine:
                continue
            closed = [
                (_perplexity(arms["plain"], seed) - _perplexity(mine, seed))
                / (_perplexity(arms["plain"], seed) - _perplexity(arms[TEACHER], seed))
                for seed in mine
                if arm == "distilled"
            ]
            scores = [row["tasks"][task][metric]["value"] for row in mine.values()]
            work = sum(next(iter(mine.values()))["operations"].values()) / 1e12
            cells = [task, arm, str(len(mine)), spread([_perplexity(mine, seed) for seed in mine], 3)]
            cells += [f"{metric} {spread(scores, 3)}", spread(closed, 2) if closed else "", f"{work:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _perplexity(rows: dict[int, dict[str, Any]], seed: int) -> float:
    (task,) = rows[seed]["tasks"]
    return perplexity(rows[seed]["tasks"], task)


def _base(place: Path, task: str, seed: int) -> Recipe:
    settings = ["tokenizer.steps=100", f"tasks.{task}.copies=1", "train.checkpoint_every=1000"]
    return scenes.base(place / f"single-{task}-{seed}", seed, {task: 1500}, *settings)
