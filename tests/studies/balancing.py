"""Which strategy of balance: who gains, who pays, at as many tokens (the paper's Table 1).

Scenes of 100 : 10 : 2, and fewer strategies at 100 : 3 : 0.4; three seeds each, every arm with the same model and steps. Every
strategy has the same trials of its rates at 100 : 10 : 2, on the validation scenes of a seed of their own. The strategy is chosen
on validation scenes: of those that cost the large task at most 2 % of its perplexity there, the one with the lowest perplexity
of the small ones. What it does is then said of the test scenes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvm_ray.config import Recipe
from tests.bench.figure import Figure
from tests.studies import scenes
from tests.studies.scenes import METRICS, TASKS
from tests.studies.summary import mean, spread

TUNING, SEEDS = 30, (34, 35, 36)
STEPS = 160
SIZES = {
    "100 : 10 : 2": {"segmentation": 1500, "pose": 150, "derain": 30},
    "100 : 3 : 0.4": {"segmentation": 1500, "pose": 45, "derain": 6},
}
COPIES = {"100 : 10 : 2": {"pose": 10, "derain": 20}, "100 : 3 : 0.4": {"pose": 30, "derain": 60}}
HEAD, TAILS = "segmentation", ("pose", "derain")
MOST_LOST = 1.03  # of the large task's perplexity, on test scenes
ALLOWED = 1.02  # on validation scenes: what other scenes add is about a hundredth
BEFORE = "none"
ARMS: dict[str, dict[str, Any]] = {
    BEFORE: {"strategy": "none"},
    "repeat (the paper's re-sampling)": {"strategy": "repeat"},
    "downsample": {"strategy": "downsample"},
    "temperature 0.5": {"strategy": "temperature", "alpha": 0.5},
    "augment (the paper's)": {"strategy": "augment"},
    "augment+temperature 0.5": {"strategy": "augment+temperature", "alpha": 0.5},
    "augment+temperature 0.7": {"strategy": "augment+temperature", "alpha": 0.7},
    "augment+temperature 0.85": {"strategy": "augment+temperature", "alpha": 0.85},
    "none, losses of small tasks times 3": {"strategy": "none", "weights": dict.fromkeys(TAILS, 3.0)},
}
STEEP = (BEFORE, "augment (the paper's)", "augment+temperature 0.7", "augment+temperature 0.85")
TRIALS = ("0.006, 0.045", "0.024, 0.045, short", "0.048, 0.09, short")
# The best of each arm's trials.
CHOSEN = {
    BEFORE: "0.048, 0.09, short",
    "repeat (the paper's re-sampling)": "0.006, 0.045",
    "downsample": "0.006, 0.045",
    "temperature 0.5": "0.006, 0.045",
    "augment (the paper's)": "0.048, 0.09, short",
    "augment+temperature 0.5": "0.048, 0.09, short",
    "augment+temperature 0.7": "0.048, 0.09, short",
    "augment+temperature 0.85": "0.048, 0.09, short",
    "none, losses of small tasks times 3": "0.024, 0.045, short",
}


def recipes(place: Path) -> Iterator[tuple[str, Recipe]]:
    for arm in ARMS:
        for trial in TRIALS:
            whole = _base(place, next(iter(SIZES)), TUNING)
            yield scenes.tried(arm, trial, TUNING), _training(whole, f"trial {arm} {trial}", arm, trial)
    for seed in SEEDS:
        for size in SIZES:
            whole = _base(place, size, seed)
            for arm in ARMS if size == next(iter(SIZES)) else STEEP:
                yield f"{size}, {arm}, seed {seed}", _training(whole, arm, arm, CHOSEN[arm])


def run(recipe: Recipe) -> dict[str, Any]:
    folder = Path(recipe.run).parent
    size = next(size for size in SIZES if folder.name == _name(size, recipe.seed))
    scenes.prepare(_base(folder.parent, size, recipe.seed))
    return scenes.row_of(recipe)


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["pairs", "strategy", *(f"{task} target perplexity" for task in TASKS), "large task, of none's"]
    heads += ["small tasks, of none's", *(" ".join(one) for one in METRICS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for size in SIZES:
        before, chosen = scenes.by_seed(rows, f"{size}, {BEFORE}"), choice(rows, size)
        for arm in ARMS:
            mine = scenes.by_seed(rows, f"{size}, {arm}")
            if not mine:
                continue
            cells = [size, f"**{arm}**" if arm == chosen else arm]
            cells += [spread([scenes.perplexity(row["tasks"], task) for row in mine.values()], 2) for task in TASKS]
            for tasks in ((HEAD,), TAILS):
                ratios = [_ratio(row["tasks"], before[seed]["tasks"], tasks) for seed, row in mine.items() if seed in before]
                cells.append(spread(ratios, 3) if arm != BEFORE and ratios else "")
            cells += [spread([row["tasks"][task][metric]["value"] for row in mine.values()], 3) for task, metric in METRICS]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", scenes.trials_table(rows, TRIALS, ARMS, CHOSEN, TUNING)])


def figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """What the chosen strategy does to small tasks and to the large one, on test scenes, where the sizes are 100 : 10 : 2."""
    size = next(iter(SIZES))
    before, chosen = scenes.by_seed(rows, f"{size}, {BEFORE}"), choice(rows, size)
    if chosen is None:
        return {}
    mine = scenes.by_seed(rows, f"{size}, {chosen}")
    found = {}
    for name, tasks, wanted in (("balance_tails", TAILS, "<= 0.9"), ("balance_head", (HEAD,), f"<= {MOST_LOST}")):
        ratios = [_ratio(row["tasks"], before[seed]["tasks"], tasks) for seed, row in mine.items() if seed in before]
        how = f"{chosen}: target perplexity of {' and '.join(tasks)} over that with none, test scenes, {spread(ratios, 3)}"
        found[name] = Figure(mean(ratios), "x", wanted, how)
    return found


def choice(rows: list[dict[str, Any]], size: str) -> str | None:
    """The arm that validation scenes choose; None where none is allowed."""
    before, found = scenes.by_seed(rows, f"{size}, {BEFORE}"), {}
    for arm in ARMS:
        mine = scenes.by_seed(rows, f"{size}, {arm}")
        if arm == BEFORE or not mine or mine.keys() != before.keys():
            continue
        pairs = [(row["validation"], before[seed]["validation"]) for seed, row in mine.items()]
        lost = {task: mean([after[task] - first[task] for after, first in pairs]) for task in TASKS}
        if lost[HEAD] <= math.log(ALLOWED):
            found[arm] = mean([lost[task] for task in TAILS])
    return min(found, key=lambda arm: found[arm]) if found else None


def _base(place: Path, size: str, seed: int) -> Recipe:
    copies = [f"tasks.{task}.copies={number}" for task, number in COPIES[size].items()]
    settings = ["tokenizer.steps=100", f"train.steps={STEPS}", "train.checkpoint_every=1000", "train.validation=64", *copies]
    return scenes.base(place / _name(size, seed), seed, SIZES[size], *settings)


def _training(whole: Recipe, label: str, arm: str, trial: str) -> Recipe:
    return scenes.arm(whole, label, {"balance": ARMS[arm], "train": scenes.RATES[trial], "model": scenes.SMALL})


def _name(size: str, seed: int) -> str:
    return f"balancing-{size.replace(' : ', '-')}-{seed}"


def _ratio(tasks: dict[str, Any], before: dict[str, Any], wanted: tuple[str, ...]) -> float:
    """Geometric mean over some tasks of a perplexity over that of another row."""
    return math.exp(mean([math.log(scenes.perplexity(tasks, task) / scenes.perplexity(before, task)) for task in wanted]))
