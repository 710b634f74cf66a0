"""How many tokens Muon needs for what AdamW reaches with the paper's schedule.

Three arms have twenty trials each, on the validation scenes of a seed of their own, each at its own length: AdamW's rate with the
paper's betas, its rate and betas, and Muon's rates, betas and momentum. The best of each, by these trials alone, trains on six
further seeds. Shorter runs have schedules of their own, so each length is a training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvm_ray.config import Recipe
from tests.bench.figure import Figure
from tests.studies import scenes
from tests.studies.scenes import TASKS
from tests.studies.summary import mean, spread

TUNING, SEEDS = 50, (60, 61, 62, 63, 64, 65)
STEPS = 240  # of AdamW
PAPERS = {"optimizer": "adamw", "warmup": 0.0056, "final_rate": 0.1}  # weight decay and clipping are the paper's anyway
PAPERS_ARM, ADAMW_ARM, MUON_ARM = "AdamW, the paper's betas", "AdamW, betas chosen too", "Muon, memories chosen too"
LENGTHS = {PAPERS_ARM: STEPS, ADAMW_ARM: STEPS, MUON_ARM: STEPS // 2}  # steps of an arm's trials
COARSE = (1.5e-3, 3e-3, 6e-3, 9e-3, 1.05e-2, 1.2e-2, 1.35e-2, 1.5e-2, 1.65e-2, 1.8e-2, 2.1e-2, 2.4e-2)  # of both AdamW's arms
FINE = (4.5e-3, 7.5e-3, 1.275e-2, 1.425e-2, 1.575e-2, 1.725e-2, 1.95e-2, 3e-2)
WITH_BETAS = (
    *((1.5e-2, (0.8, 0.95)), (1.5e-2, (0.7, 0.95)), (1.8e-2, (0.7, 0.95)), (1.8e-2, (0.7, 0.98))),
    *((1.8e-2, (0.6, 0.95)), (1.5e-2, (0.6, 0.98)), (1.2e-2, (0.6, 0.98)), (1.5e-2, (0.5, 0.95))),
)
LINEAR = {"schedule": "wsd", "decay": 0.98, "final_rate": 0.0}  # down to nothing on a straight line, right after the warmup
# The rate of AdamW's part, that of Muon's, and what else differs from the demo's schedule.
WITH_MUON: tuple[tuple[float, float, dict[str, Any]], ...] = (
    *((6e-3, 0.0225, {}), (6e-3, 0.045, {}), (6e-3, 0.09, {}), (3e-3, 0.045, {})),
    *((1.2e-2, 0.045, {}), (2.4e-2, 0.045, {}), (4.8e-2, 0.045, {}), (2.4e-2, 0.09, {})),
    *((4.8e-2, 0.045, LINEAR), (4.8e-2, 0.0675, LINEAR), (7.2e-2, 0.0675, LINEAR), (3.6e-2, 0.0675, LINEAR)),
    *((4.8e-2, 0.045, {"muon_momentum": 0.9}), (4.8e-2, 0.045, {"muon_momentum": 0.8})),
    *((4.8e-2, 0.045, {"betas": (0.8, 0.95)}), (4.8e-2, 0.045, {"betas": (0.8, 0.95), "muon_momentum": 0.8})),
    *((4.8e-2, rate, {"betas": (0.7, 0.95), "muon_momentum": 0.8}) for rate in (0.0675, 0.09, 0.135)),
    (4.8e-2, 0.09, {"betas": (0.7, 0.98), "muon_momentum": 0.8}),
)
TRIALS: dict[str, list[dict[str, Any]]] = {
    PAPERS_ARM: [{"rate": rate} for rate in COARSE + FINE],
    ADAMW_ARM: [*({"rate": rate} for rate in COARSE), *({"rate": rate, "betas": betas} for rate, betas in WITH_BETAS)],
    MUON_ARM: [{"rate": rate, "muon_rate": muon_rate} | own for rate, muon_rate, own in WITH_MUON],
}
BEST: dict[str, dict[str, Any]] = {  # of each arm's trials; `table` checks it
    PAPERS_ARM: {"rate": 1.725e-2},
    ADAMW_ARM: {"rate": 1.5e-2, "betas": (0.7, 0.95)},
    MUON_ARM: {"rate": 4.8e-2, "muon_rate": 0.09, "betas": (0.7, 0.95), "muon_momentum": 0.8},
}
PARTS = (0.4, 0.5, 0.6)  # of AdamW's steps that Muon gets


def recipes(place: Path) -> Iterator[tuple[str, Recipe]]:
    # By their labels, since two arms share some trials.
    trials = {_trial(train): (LENGTHS[arm], train) for arm in TRIALS for train in TRIALS[arm]}
    for label, (steps, train) in trials.items():
        yield _recipe(place, label, TUNING, steps, train)
    for seed in SEEDS:
        for arm in (PAPERS_ARM, ADAMW_ARM):
            yield _recipe(place, arm, seed, STEPS, BEST[arm])
        for part in PARTS:
            yield _recipe(place, _muon(part), seed, round(STEPS * part), BEST[MUON_ARM])


def run(recipe: Recipe) -> dict[str, Any]:
    scenes.prepare(_base(Path(recipe.run).parent.parent, recipe.seed))
    return scenes.row_of(recipe)


def table(rows: list[dict[str, Any]]) -> str:
    """Trials by their validation perplexity, then the seeds' test perplexities."""
    for arm, trials in TRIALS.items():
        found = {label: _validated(row) for label in map(_trial, trials) for row in scenes.by_seed(rows, label).values()}
        scenes.check_choice(arm, _trial(BEST[arm]), found)
    lines = [
        "| training | seeds | steps | perplexity, validation | " + " | ".join(f"{task}, test" for task in TASKS) + " | TFLOP |"
    ]
    lines.append("|---" * (5 + len(TASKS)) + "|")
    for label in dict.fromkeys(row["label"].rsplit(", seed", 1)[0] for row in rows):
        mine = list(scenes.by_seed(rows, label).values())
        cells = [label, str(len(mine)), str(mine[0]["steps"]), spread([_validated(row) for row in mine], 2)]
        cells += [spread([scenes.perplexity(row["tasks"], task) for row in mine], 2) for task in TASKS]
        cells.append(f"{mine[0]['operations']['student'] / 1e12:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """The shortest of the trainings with Muon that reaches what AdamW does, on test scenes: with the paper's betas, as the figure
    is meant, and with betas that had as many trials as Muon's.
    """
    found = {}
    for name, arm in (("muon_tokens_vs_adamw", PAPERS_ARM), ("muon_tokens_vs_adamw_tuned", ADAMW_ARM)):
        target = scenes.by_seed(rows, arm)
        ratios = {}
        for part in PARTS:
            mine = scenes.by_seed(rows, _muon(part))
            if mine and mine.keys() == target.keys():
                ratios[part] = [_perplexity(row) / _perplexity(target[seed]) for seed, row in mine.items()]
        reached = [part for part, values in ratios.items() if mean(values) <= 1]
        if reached:
            said = ", ".join(f"with {part:.2f} of the tokens {spread(values, 3)}" for part, values in ratios.items())
            how = f"target perplexity with Muon over that with {arm}, geometric mean over tasks, {len(target)} seeds: {said}"
            found[name] = Figure(min(reached), "of the tokens", "<= 0.5", how)
    return found


def _trial(train: dict[str, Any]) -> str:
    """A trial's name."""
    own = {key: value for key, value in train.items() if key not in ("rate", "muon_rate")}
    said = ", linear" if own == LINEAR else "".join(f", {key.removeprefix('muon_')} {value}" for key, value in own.items())
    muon = f"Muon {train['muon_rate']:g}, " if "muon_rate" in train else ""
    return f"trial, {muon}AdamW {train['rate']:g}{said}"


def _muon(part: float) -> str:
    return f"{MUON_ARM}, {part:.2f} of the tokens"


def _recipe(place: Path, label: str, seed: int, steps: int, train: dict[str, Any]) -> tuple[str, Recipe]:
    schedule = {} if "muon_rate" in train else PAPERS
    changes = {"train": {"steps": steps} | schedule | train, "model": scenes.SMALL, "balance": {"strategy": "repeat"}}
    return f"{label}, seed {seed}", scenes.arm(_base(place, seed), label, changes)


def _base(place: Path, seed: int) -> Recipe:
    settings = ["tokenizer.steps=100", "tasks.pose.copies=1", "tasks.derain.copies=1", "train.checkpoint_every=1000"]
    return scenes.base(place / f"optimizers-{seed}", seed, dict.fromkeys(TASKS, 1500), *settings)


def _validated(row: dict[str, Any]) -> float:
    return math.exp(mean(row["validation"].values()))


def _perplexity(row: dict[str, Any]) -> float:
    """The geometric mean over tasks."""
    return math.exp(mean([math.log(scenes.perplexity(row["tasks"], task)) for task in TASKS]))
