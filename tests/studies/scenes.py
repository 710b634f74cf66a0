"""What studies on the drawn scenes share: data of one seed, recipes that differ by an arm's changes, and scores."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lvm_ray import config, estimate, pipeline
from lvm_ray.config import Recipe
from lvm_ray.train.meter import read_metrics
from tests.studies.summary import mean

TASKS = ("segmentation", "pose", "derain")
METRICS = (("segmentation", "miou"), ("pose", "pck"), ("derain", "psnr_y"))
# Tuned for the demo on scenes of seeds 7 and 99 (`docs/results.md`), for models that start from nothing.
FRESH = {"rate": 6.0e-3, "muon_rate": 0.045}
USUAL, SHORT = {"muon_momentum": 0.95, "betas": [0.9, 0.95]}, {"muon_momentum": 0.8, "betas": [0.8, 0.95]}
# What an arm may try: the rate of AdamW's part, that of Muon's, and how long they remember gradients.
RATES: dict[str, dict[str, Any]] = {
    "0.006, 0.045": {"rate": 6e-3, "muon_rate": 0.045, **USUAL},
    "0.006, 0.025, short": {"rate": 6e-3, "muon_rate": 0.025, **SHORT},
    "0.006, 0.045, short": {"rate": 6e-3, "muon_rate": 0.045, **SHORT},
    "0.012, 0.045, short": {"rate": 1.2e-2, "muon_rate": 0.045, **SHORT},
    "0.024, 0.045, short": {"rate": 2.4e-2, "muon_rate": 0.045, **SHORT},
    "0.024, 0.09, short": {"rate": 2.4e-2, "muon_rate": 0.09, **SHORT},
    "0.048, 0.09, short": {"rate": 4.8e-2, "muon_rate": 0.09, **SHORT},
}
SMALL = {"width": 64, "layers": 2, "heads": 4, "mlp": 176}


def base(folder: Path, seed: int, train: Mapping[str, int], *settings: str) -> Recipe:
    """A pipeline of those of the demo's tasks that have training pairs here, with 64 pairs each for validation and test, on one
    thread, in the precision that every processor has."""
    counts = {"train": dict(train), "validation": dict.fromkeys(train, 64), "test": dict.fromkeys(train, 64)}
    compute = "compute={workers: 0, threads: 1, precision: fp32}"
    own = [f"seed={seed}", f"synth={counts}", "evaluate={items: 64}", compute, *settings]
    values = config.to_dict(config.load("recipes/demo.yaml", own, run=str(folder)))
    values["tasks"] = {task: section for task, section in values["tasks"].items() if task in train}
    values["balance"]["shares"] = {}
    return Recipe.model_validate(values)


def arm(pipeline_recipe: Recipe, label: str, changes: Mapping[str, Any]) -> Recipe:
    """A single run in a folder of its label, without a teacher where `changes` name none; sections are changed key by key."""
    values = config.to_dict(config.student_recipe(pipeline_recipe))
    values |= {"run": folder_of(pipeline_recipe, label), "distill": None}
    for key, value in changes.items():
        values[key] = {**(values[key] or {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(values)


def folder_of(pipeline_recipe: Recipe, label: str) -> str:
    return f"{pipeline_recipe.run}/{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}"


def prepare(pipeline_recipe: Recipe) -> None:
    """Scenes, tokenizer and shards, where they are not there yet."""
    pipeline.synth(pipeline_recipe)
    pipeline.tokenize(pipeline_recipe)


def row_of(recipe: Recipe) -> dict[str, Any]:
    """Train and score a single run: what its row says. Seconds are those of the clock and of this process on its core."""
    began, began_core = time.monotonic(), time.process_time()
    pipeline.train(recipe)
    seconds = {"train": round(time.monotonic() - began, 1), "core": round(time.process_time() - began_core, 1)}
    return {
        "recipe": config.fingerprint(recipe),
        "seed": recipe.seed,
        "steps": recipe.train.steps,
        "seconds": seconds,
        "operations": {"student": operations(recipe)},
        "validation": last_validation(recipe.run),
        "tasks": scores(recipe),
    }


def scores(recipe: Recipe) -> dict[str, Any]:
    """Its scores on the test scenes by task and metric."""
    place = Path(recipe.run) / "evaluation.json"
    if not place.is_file():
        pipeline.evaluate(recipe)
    tasks: dict[str, Any] = json.loads(place.read_text())["tasks"]
    return tasks


def last_validation(run: str) -> dict[str, float]:
    """{task: mean cross-entropy of label tokens in nats} on the validation scenes, at the end of a training."""
    return next(line["validation_loss"] for line in reversed(read_metrics(run)) if "validation_loss" in line)


def operations(recipe: Recipe, steps: int | None = None) -> float:
    """Floating-point operations of so many training steps of a recipe's model; of all where none are named."""
    of_a_token = estimate.operations_per_token(recipe.model, recipe.tokenizer.codes, recipe.sentence_tokens)
    return of_a_token * recipe.sentence_tokens * recipe.train.batch * (recipe.train.steps if steps is None else steps)


def perplexity(tasks: Mapping[str, Any], task: str) -> float:
    value: float = tasks[task]["target_perplexity"]["value"]
    return value


def by_seed(rows: list[dict[str, Any]], label: str) -> dict[int, dict[str, Any]]:
    """The rows of one arm, in the order of their seeds."""
    found = {row["seed"]: row for row in rows if row["label"] == f"{label}, seed {row['seed']}"}
    return dict(sorted(found.items()))


def tried(arm: str, trial: str, seed: int) -> str:
    """The label of a trial's row."""
    return f"trial, {arm}, {trial}, seed {seed}"


def trials_table(
    rows: list[dict[str, Any]], tries: Iterable[str], arms: Iterable[str], chosen: Mapping[str, str], seed: int
) -> str:
    """Perplexity on validation scenes, geometric mean over tasks, of each arm with each setting, the best in bold.

    Raises ValueError where an arm trains with another than its best.
    """
    found = {row["label"]: math.exp(mean(row["validation"].values())) for row in rows if row["seed"] == seed}
    tries = tuple(tries)
    lines = [f"| trial: rate of AdamW's part, of Muon's, memory | {' | '.join(tries)} |", "|---" * (1 + len(tries)) + "|"]
    for arm in arms:
        values = {trial: found[tried(arm, trial, seed)] for trial in tries if tried(arm, trial, seed) in found}
        if not values:
            continue
        check_choice(arm, chosen[arm], values)
        cells = (values.get(trial) for trial in tries)
        best = min(values.values())
        said = ("" if value is None else f"**{value:.2f}**" if value == best else f"{value:.2f}" for value in cells)
        lines.append(f"| {arm} | {' | '.join(said)} |")
    return "\n".join(lines)


def check_choice(arm: str, chosen: str, perplexities: Mapping[str, float]) -> None:
    """Raises ValueError where an arm trains with another than the best of its trials, {name: perplexity on validation}."""
    best = min(perplexities, key=lambda trial: perplexities[trial], default=chosen)
    if best != chosen:
        raise ValueError(f"{arm}: trains with {chosen}, and the best of its trials is {best}: write that down as its choice")
