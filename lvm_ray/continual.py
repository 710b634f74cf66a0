"""Tasks one after another: the single runs that a recipe with a `continual` section describes.

Each stage starts from the model of the one before and trains as long as the recipe says. Without more it forgets what came before
(the paper's experiment, tables 5 and 10); what keeps it is a few rows of the earlier tasks (`replay`, out of a part of their
pairs, `kept`), that they weigh more than others (`weight`), what the model of the stage before says about them (`distill`), and
smaller steps (`rate`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lvm_ray.config import Recipe, to_dict

STAGE = re.compile(r"(\d+)-.+")  # the name of a stage's folder


def stage_folders(folder: str | Path) -> list[Path]:
    """The folders of stages in a pipeline's folder, in their order."""
    found = [(int(match[1]), place) for place in Path(folder).glob("*-*") if (match := STAGE.fullmatch(place.name))]
    return [place for _, place in sorted(found)]


def stage_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """The stages' own recipes by the names of their folders in the pipeline's, in order: `1-segmentation`, `2-pose`, ..."""
    section = recipe.continual
    assert section is not None
    runs: dict[str, Recipe] = {}
    before: str | None = None
    for number, tasks in enumerate(section.tasks_of_stages):
        earlier = [task for stage in section.tasks_of_stages[:number] for task in stage]
        values: dict[str, Any] = to_dict(recipe) | {"continual": None, "shards": recipe.shard_folder}
        name = f"{number + 1}-{'-'.join(tasks)}"
        values["run"] = f"{recipe.run}/{name}"
        replay = section.replay if earlier else 0.0
        shares = dict.fromkeys(recipe.tasks, 0.0) | {task: (1 - replay) / len(tasks) for task in tasks}
        shares |= {task: replay / len(earlier) for task in earlier}
        ratios = dict(recipe.balance.ratios)
        if not recipe.balance.augments:
            ratios = dict.fromkeys(recipe.tasks, 1.0)
        ratios |= dict.fromkeys(earlier, section.kept)
        weights = dict(recipe.balance.weights)
        if section.weight != 1:
            weights |= {task: section.weight * weights.get(task, 1.0) for task in earlier}
        values["balance"] |= {"strategy": "augment", "shares": shares, "ratios": ratios, "weights": weights}
        if before is not None:
            values["model"]["init"] = before
            for rate in ("rate", "muon_rate"):
                values["train"][rate] *= section.rate
            if section.distill:
                asked = {task: float(task in earlier) for task in recipe.tasks}
                values["distill"] = {"teacher": before, "weight": section.distill, "weights": asked}
        runs[name] = Recipe.model_validate(values)
        before = values["run"]
    return runs
