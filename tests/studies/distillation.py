"""What a student learns from a teacher, and how: the paper's distillation, kept answers, the teacher's layers, two teachers, the
student's own answers, and more steps in place of a teacher.

All students of a seed see the same rows, and but for one arm take as many steps; all but the one that starts from its teacher's
layers start from the same weights. Every arm has the same trials of its rates, its teacher all but one, on the validation scenes
of a seed of their own; its best trains on three further seeds, each with scenes, tokenizer and models of its own. The three arms
that differ only in how the teacher is asked have one choice in common.
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
from tests.studies.scenes import METRICS, RATES, TASKS, perplexity
from tests.studies.summary import mean, spread

TUNING, SEEDS = 20, (24, 25, 26)
STEPS, TEACHER_STEPS = 140, 420
PAIRS = {"segmentation": 1500, "pose": 300, "derain": 60}
TEACHER, PLAIN, LONGER, ONLINE = "the teacher", "plain", "plain, steps for the teacher's forward", "KD (the paper's)"
HIDDEN, SPARSE, LAYERS = "KD, kept hidden states", "KD, kept likely tokens", "KD from three of the teacher's layers"
# What an arm has of `distill`; None: no teacher.
ARMS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    LONGER: None,
    ONLINE: {},
    HIDDEN: {"cache": "hidden"},
    SPARSE: {"cache": "sparse", "sparse": {"top": 64, "tail": 16}},
    LAYERS: {"cache": "hidden", "layers": [0, 1, 3]},
    "KD, own answers in a quarter of the steps": {"on_policy": 0.25},
    "KD from two teachers": {"also": {"longer": {"teacher": LONGER}}},
    "KD + features": {"features": {"network": "resnet", "weights": "vision", "weight": 0.5}},
}
# The best of each arm's trials.
CHOSEN = {
    TEACHER: "0.006, 0.045, short",
    PLAIN: "0.024, 0.09, short",
    LONGER: "0.024, 0.045, short",
    ONLINE: "0.048, 0.09, short",
    HIDDEN: "0.048, 0.09, short",
    SPARSE: "0.048, 0.09, short",
    LAYERS: "0.006, 0.025, short",
    "KD, own answers in a quarter of the steps": "0.024, 0.045, short",
    "KD from two teachers": "0.024, 0.045, short",
    "KD + features": "0.048, 0.09, short",
}
# Asking and keeping have one choice. The largest rates were added for the students, of which some are best at the edge.
TRIALS = {TEACHER: tuple(RATES)[:-1]} | {arm: tuple(RATES) for arm in ARMS if arm not in (ONLINE, SPARSE)}
KEPT = {HIDDEN: ("cache_vs_online", 1.01), SPARSE: ("cache_vs_online_sparse", 1.03)}


def recipes(place: Path) -> Iterator[tuple[str, Recipe]]:
    base = _base(place, TUNING)
    for arm, tries in TRIALS.items():
        for trial in tries:
            yield scenes.tried(arm, trial, TUNING), _training(base, arm, trial)
    for seed in SEEDS:
        for arm in ARMS:
            yield f"{arm}, seed {seed}", _training(_base(place, seed), arm)


def run(recipe: Recipe) -> dict[str, Any]:
    """One training, and its data and its teachers where they are not there yet: of a trial its loss on validation scenes, of
    another the scores on test scenes, beside those of the teacher; seconds and operations."""
    base = _base(Path(recipe.run).parent.parent, recipe.seed)
    trial = recipe.seed == TUNING
    scenes.prepare(base)
    if recipe.teachers or not trial:
        pipeline.train(base, "teacher")
    if recipe.distill and recipe.distill.also:
        pipeline.train(_training(base, LONGER))
    if any(one.cache for one in recipe.teachers.values()):
        pipeline.cache(recipe)
    features = recipe.distill.features if recipe.distill else None
    if features and not Path(features.weights).is_dir():
        vision.train_network(Path(base.run) / "data" / "source", Path(features.weights), base.seed)
    began = time.monotonic()
    pipeline.train(recipe)
    seconds = time.monotonic() - began
    teachers = [config.load(f"{one.teacher}/config.yaml") for one in recipe.teachers.values()]
    asked = sum(scenes.operations(teacher, recipe.train.steps) for teacher in teachers) / 3
    row = {
        "recipe": config.fingerprint(recipe),
        "seed": recipe.seed,
        "seconds": {"train": round(seconds, 1)},
        "operations": {
            "student": scenes.operations(recipe),
            "asking": asked,
            "teachers": sum(scenes.operations(teacher) for teacher in teachers),
        },
        "validation": scenes.last_validation(recipe.run),
    }
    if not trial:
        row |= {"tasks": scenes.scores(recipe), "teacher": scenes.scores(config.teacher_recipe(base))}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with the lowest and the highest: perplexities, task metrics, and the part of the gap that is closed."""
    heads = ["student", "seeds", *(f"{task} target perplexity" for task in TASKS), *(" ".join(one) for one in METRICS)]
    heads += ["gap closed", "TFLOP: student, asking, training teachers"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    plain = scenes.by_seed(rows, PLAIN)
    for arm in (TEACHER, *ARMS):
        mine = plain if arm == TEACHER else scenes.by_seed(rows, arm)
        if not mine:
            continue
        scores = [row["teacher" if arm == TEACHER else "tasks"] for row in mine.values()]
        cells = [arm, str(len(scores))]
        cells += [spread([one[task]["target_perplexity"]["value"] for one in scores], 2) for task in TASKS]
        cells += [spread([one[task][metric]["value"] for one in scores], 3) for task, metric in METRICS]
        if arm == TEACHER:
            cells += ["", ""]
        else:
            closed = [_closed(row["tasks"], plain[seed]) for seed, row in mine.items() if seed in plain and arm != PLAIN]
            work = next(iter(mine.values()))["operations"]
            cells.append(spread(closed, 2) if closed else "")
            cells.append(", ".join(f"{work[part] / 1e12:.1f}" for part in ("student", "asking", "teachers")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", scenes.trials_table(rows, RATES, TRIALS, CHOSEN, TUNING)])


def figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """What kept answers cost, and the part of the gap that the best arm closes."""
    online, plain, found = scenes.by_seed(rows, ONLINE), scenes.by_seed(rows, PLAIN), {}
    for arm, (name, wanted) in KEPT.items():
        mine = scenes.by_seed(rows, arm)
        ratios = [_ratio(mine[seed]["tasks"], online[seed]["tasks"]) for seed in sorted(mine.keys() & online.keys())]
        if ratios:
            each = ", ".join(f"{ratio:.4f}" for ratio in ratios)
            how = f"target perplexity over that of the student that asks its teacher, mean of {len(ratios)} seeds ({each})"
            found[name] = Figure(mean(ratios), "x", f"<= {wanted}", how)
    arms = {arm: scenes.by_seed(rows, arm) for arm, changes in ARMS.items() if changes is not None}
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
    counts = {"train": PAIRS, "validation": dict.fromkeys(TASKS, 64), "test": dict.fromkeys(TASKS, 64)}
    settings = [
        f"seed={seed}",
        f"synth={counts}",
        "tasks.pose.copies=8",
        "tasks.derain.copies=20",
        f"train.steps={STEPS}",
        "train.checkpoint_every=1000",
        "train.validation=64",
        f"teacher.train={ {'steps': TEACHER_STEPS} | RATES[CHOSEN[TEACHER]] }",
        "evaluate={items: 64}",
        "compute={workers: 0, threads: 1}",
    ]
    return config.load("recipes/demo.yaml", settings, run=str(place / f"distillation-{seed}"))


def _training(base: Recipe, arm: str, trial: str | None = None) -> Recipe:
    """An arm's recipe with the settings of a trial, or with those that were chosen."""
    values = config.to_dict(config.teacher_recipe(base) if arm == TEACHER else config.student_recipe(base))
    values["run"] = scenes.folder_of(base, f"trial {arm} {trial}" if trial else arm)
    values["train"] |= RATES[trial or CHOSEN[arm]]
    if arm == LONGER:
        values["train"]["steps"] = round(1.44 * STEPS)
    distill = ARMS.get(arm)
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
