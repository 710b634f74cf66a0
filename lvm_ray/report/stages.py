"""The table of a training in stages: each task's perplexity after each stage, and what the later ones made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvm_ray.continual import stage_folders


def stage_rows(
    folder: Path, config: Mapping[str, Any], tasks: Sequence[str], read: Callable[[Path], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each scored stage of a pipeline's folder: its name and a cell for each task; none of another kind of pipeline.

    A cell has the target perplexity as text, whether the stage was the task's own, and, of a task that had its stage before, by
    what its perplexity has grown since. `read` gives the content of an evaluation.json.
    """
    section = config.get("continual")
    stages = section.get("stages") if isinstance(section, Mapping) else None
    if not isinstance(stages, list):
        return []
    own: dict[str, float] = {}
    rows = []
    for place, stage in zip(stage_folders(folder), stages, strict=False):
        scores = read(place / "evaluation.json").get("tasks", {})
        cells = []
        for task in tasks:
            value = scores.get(task, {}).get("target_perplexity", {}).get("value")
            is_own = task == stage or (isinstance(stage, list) and task in stage)
            if not isinstance(value, int | float):
                cells.append({"value": "–", "own": False, "grown": ""})
                continue
            cells.append({"value": f"{value:,.3g}", "own": is_own, "grown": f"x {value / own[task]:.2f}" if task in own else ""})
            if is_own:
                own[task] = value
        if scores:
            rows.append({"name": place.name, "cells": cells})
    return rows
