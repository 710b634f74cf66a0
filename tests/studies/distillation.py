"""What a student learns from a teacher, and how: the paper's distillation, kept answers, the teacher's layers, two teachers, the
student's own answers, and more steps in place of a teacher.

All students of a seed see the same rows, and but for one arm take as many steps; all but the one that starts from its teacher's
layers start from the same weights. Nothing is chosen on the test scenes: rates were tuned before, on scenes of other seeds
(`docs/results.md`), for fresh models and for those that start from layers; no arm had trials of its own. Three seeds, each with
scenes, tokenizer and models of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvm_ray import config, pipeline
from lvm_ray.config import Recipe
from tests.bench.figure import Figure
from tests.studies import scenes, vision
from tests.studies.scenes import FRESH, METRICS, TASKS, perplexity
from tests.studies.summary import mean, spread

SEEDS = (21, 22, 23)
STEPS, TEACHER_STEPS = 140, 420
LONGER = "plain, steps for the teacher's forward"
# An arm's changes: of `distill` (None: no teacher) and of `train`.
ARMS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "plain": (None, FRESH),
    LONGER: (None, FRESH | {"steps": round(1.44 * STEPS)}),
    "KD (the paper's)": ({}, FRESH),
    "KD, kept hidden states": ({"cache": "hidden"}, FRESH),
    "KD, kept likely tokens": ({"cache": "sparse", "sparse": {"top": 64, "tail": 16}}, FRESH),
    "KD from three of the teacher's layers": ({"cache": "hidden", "layers": [0, 1, 3]}, {}),
    "KD, own answers in a quarter of the steps": ({"on_policy": 0.25}, FRESH),
    "KD from two teachers": ({"also": {"longer": {"teacher": LONGER}}}, FRESH),
    "KD + features": ({"features": {"network": "resnet", "weights": "vision", "weight": 0.5}}, FRESH),
}
KEPT = {"KD, kept hidden states": ("cache_vs_online", 1.01), "KD, kept likely tokens": ("cache_vs_online_sparse", 1.03)}


def recipes(place: Path) -> Iterator[tuple[str, Recipe]]:
    for seed in SEEDS:
        for arm in ARMS:
            yield f"{arm}, seed {seed}", _student(_base(place, seed), arm)


def run(recipe: Recipe) -> dict[str, Any]:
    """One student, and its data and its teacher where they are not there yet: scores of both, seconds and operations."""
    base = _base(Path(recipe.run).parent.parent, recipe.seed)
    scenes.prepare(base)
    pipeline.train(base, "teacher")
    if any(one.cache for one in recipe.teachers.values()):
        pipeline.cache(recipe)
    features = recipe.distill.features if recipe.distill else None
    if features and not Path(features.weights).is_dir():
        vision.train_network(Path(base.run) / "data" / "source", Path(features.weights), base.seed)
    began = time.monotonic()
    pipeline.train(recipe)
    seconds = time.monotonic() - began
    scores = {name: scenes.scores(one) for name, one in (("student", recipe), ("teacher", config.teacher_recipe(base)))}
    teachers = [config.load(f"{one.teacher}/config.yaml") for one in recipe.teachers.values()]
    asked = sum(scenes.operations(teacher, recipe.train.steps) for teacher in teachers) / 3
    return {
        "recipe": config.fingerprint(recipe),
        "seed": recipe.seed,
        "seconds": {"train": round(seconds, 1)},
        "operations": {
            "student": scenes.operations(recipe),
            "asking": asked,
            "teachers": sum(scenes.operations(teacher) for teacher in teachers),
        },
        "tasks": scores["student"],
        "teacher": scores["teacher"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with the lowest and the highest: perplexities, task metrics, and the part of the gap that is closed."""
    heads = ["student", "seeds", *(f"{task} target perplexity" for task in TASKS), *(" ".join(one) for one in METRICS)]
    heads += ["gap closed", "TFLOP: student, asking, training teachers", "seconds to train"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    plain = scenes.by_seed(rows, "plain")
    for arm in ("the teacher", *ARMS):
        mine = plain if arm == "the teacher" else scenes.by_seed(rows, arm)
        if not mine:
            continue
        scores = [row["teacher" if arm == "the teacher" else "tasks"] for row in mine.values()]
        cells = [arm, str(len(scores))]
        cells += [spread([one[task]["target_perplexity"]["value"] for one in scores], 2) for task in TASKS]
        cells += [spread([one[task][metric]["value"] for one in scores], 3) for task, metric in METRICS]
        if arm == "the teacher":
            cells += ["", "", ""]
        else:
            closed = [_closed(row["tasks"], plain[seed]) for seed, row in mine.items() if seed in plain and arm != "plain"]
            work = next(iter(mine.values()))["operations"]
            cells.append(spread(closed, 2) if closed else "")
            cells.append(", ".join(f"{work[part] / 1e12:.1f}" for part in ("student", "asking", "teachers")))
            cells.append(f"{mean([row['seconds']['train'] for row in mine.values()]):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """What kept answers cost, and the part of the gap that the best arm closes."""
    online, plain, found = scenes.by_seed(rows, "KD (the paper's)"), scenes.by_seed(rows, "plain"), {}
    for arm, (name, wanted) in KEPT.items():
        mine = scenes.by_seed(rows, arm)
        ratios = [_ratio(mine[seed]["tasks"], online[seed]["tasks"]) for seed in sorted(mine.keys() & online.keys())]
        if ratios:
            each = ", ".join(f"{ratio:.4f}" for ratio in ratios)
            how = f"target perplexity over that of the student that asks its teacher, mean of {len(ratios)} seeds ({each})"
            found[name] = Figure(mean(ratios), "x", f"<= {wanted}", how)
    arms = {arm: scenes.by_seed(rows, arm) for arm, (changes, _) in ARMS.items() if changes is not None}
    closed = {
        arm: [_closed(row["tasks"], plain[seed]) for seed, row in mine.items() if seed in plain] for arm, mine in arms.items()
    }
    closed = {arm: values for arm, values in closed.items() if values}
    if closed:
        best = max(closed, key=lambda arm: mean(closed[arm]))
        parts = [perplexity(row["teacher"], task) / perplexity(row["tasks"], task) for row in plain.values() for task in TASKS]
        how = (
            f"{best}: (plain - distilled) / (plain - teacher) in target perplexity, mean over tasks and {len(closed[best])} "
            f"seeds, {spread(closed[best], 2)}; the teacher's is at most {max(parts):.2f} of the plain student's anywhere"
        )
        found["teacher_gap_closed"] = Figure(mean(closed[best]), "of the gap", ">= 0.5", how)
    return found


def _base(place: Path, seed: int) -> Recipe:
    settings = [
        f"seed={seed}",
        "synth={train: {segmentation: 1500, pose: 300, derain: 60}, test: {segmentation: 64, pose: 64, derain: 64}}",
        *(f"tasks.{task}.validation=null" for task in TASKS),
        "tasks.pose.copies=8",
        "tasks.derain.copies=20",
        f"train.steps={STEPS}",
        "train.checkpoint_every=1000",
        f"teacher.train.steps={TEACHER_STEPS}",
        "evaluate={items: 64}",
        "compute={workers: 0, threads: 1}",
    ]
    return config.load("recipes/demo.yaml", settings, run=str(place / f"distillation-{seed}"))


def _student(base: Recipe, arm: str) -> Recipe:
    values, (distill, train) = config.to_dict(config.student_recipe(base)), ARMS[arm]
    values["run"] = scenes.folder_of(base, arm)
    values["train"] |= train
    if distill is None:
        values["distill"] = None
    else:
        cache = distill.get("cache")
        also = {name: one | {"teacher": scenes.folder_of(base, one["teacher"])} for name, one in distill.get("also", {}).items()}
        kept = cache and f"{base.run}/answers-{cache}"
        features = distill.get("features")
        features = features and features | {"weights": f"{base.run}/{features['weights']}"}
        values["distill"] |= {"layers": None} | distill | {"cache": kept, "also": also, "features": features}
    return Recipe.model_validate(values)


def _closed(tasks: dict[str, Any], plain: dict[str, Any]) -> float:
    """Mean over tasks of (plain - student) / (plain - teacher)."""
    alone, teacher = plain["tasks"], plain["teacher"]
    gaps = [(perplexity(alone, task), perplexity(tasks, task), perplexity(teacher, task)) for task in TASKS]
    return mean([(without - own) / (without - best) for without, own, best in gaps])


def _ratio(tasks: dict[str, Any], reference: dict[str, Any]) -> float:
    """Geometric mean over tasks of one student's perplexity over another's."""
    return math.exp(mean([math.log(perplexity(tasks, task) / perplexity(reference, task)) for task in TASKS]))
