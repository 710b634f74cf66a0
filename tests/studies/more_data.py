"""More data against more versions of the same data, for one task at as many tokens (the paper's Figure 2).

The paper shows two curves, segmentation from 1 % to 10 % of SA-1B and poses in 10 to 100 versions, and takes their like shape for
like worth. Here both are of one task, poses, so that a version and a new scene can be weighed against each other. All arms of
a seed share a tokenizer, learnt from the most scenes, and a few scenes are the first of the many.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvm_ray.config import Recipe
from tests.studies import scenes
from tests.studies.summary import spread

SEEDS = (61, 62, 63)
STEPS = 160
TASK = "pose"
FEW, MANY = 60, 1200
ARMS = {  # of which scenes, and how many versions of each; below 1 a part of them
    "60 scenes": (FEW, 1.0),
    "60 scenes in 4 versions": (FEW, 4.0),
    "60 scenes in 20 versions": (FEW, 20.0),
    "240 scenes": (MANY, 0.2),
    "1,200 scenes": (MANY, 1.0),
    "1,200 scenes in 4 versions": (MANY, 4.0),
}


def recipes(place: Path) -> Iterator[tuple[str, Recipe]]:
    for seed in SEEDS:
        for label, (pairs, ratio) in ARMS.items():
            balance = {"strategy": "augment", "ratios": {TASK: ratio}}
            changes = {"train": scenes.FRESH, "model": scenes.SMALL, "balance": balance}
            yield f"{label}, seed {seed}", scenes.arm(_base(place, seed, pairs), label, changes)


def run(recipe: Recipe) -> dict[str, Any]:
    place = Path(recipe.run).parent.parent
    scenes.prepare(_base(place, recipe.seed, MANY))
    scenes.prepare(_base(place, recipe.seed, FEW))
    return scenes.row_of(recipe)


def table(rows: list[dict[str, Any]]) -> str:
    """What each training draws on, and what comes of it."""
    lines = ["| draws on | seeds | each version is seen | pose target perplexity | pose pck |", "|---" * 5 + "|"]
    for label, (pairs, ratio) in ARMS.items():
        mine = list(scenes.by_seed(rows, label).values())
        if mine:
            seen = STEPS * 8 * 4 / (pairs * ratio)  # 8 sentences of 4 pairs a step
            scores = [row["tasks"][TASK] for row in mine]
            cells = [label, str(len(mine)), f"{seen:.1f} x", spread([one["target_perplexity"]["value"] for one in scores], 2)]
            lines.append(f"| {' | '.join([*cells, spread([one['pck']['value'] for one in scores], 3)])} |")
    return "\n".join(lines)


def _base(place: Path, seed: int, pairs: int) -> Recipe:
    folder, copies = place / f"more-data-{pairs}-{seed}", 4 if pairs == MANY else 20
    own = f"{place}/more-data-{MANY}-{seed}/tokenizer"
    tokenizer = "tokenizer.steps=100" if pairs == MANY else f"tokenizer={{kind: published, source: {own}, patch: 8, codes: 1024}}"
    settings = [tokenizer, f"tasks.pose.copies={copies}", f"train.steps={STEPS}", "train.checkpoint_every=1000"]
    return scenes.base(folder, seed, {TASK: pairs}, *settings)
