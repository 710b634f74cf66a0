"""Prompts as a variable: one trained run, asked in every way that some settings of its recipe allow: `lvm-ray study RUN`.

    RUN/study/{settings}/    an evaluation of its own: evaluation.json, items.parquet, gallery, answered/
    RUN/study.json           the ways that were crossed, their scores, and their differences from the run's own way

All ways are asked of the same items, so each is compared with the run's own item by item. Of many ways the best looks better than
it is: they are crossed on the validation split, and the one that is chosen has its score from the test split.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.data.tokenize import tokenize
from lvm_ray.errors import UserError
from lvm_ray.evaluate.compare import paired, read_items
from lvm_ray.evaluate.run import evaluate_runs
from lvm_ray.evaluate.statistics import rounded
from lvm_ray.progress import Bar
from lvm_ray.storage import write_file
from lvm_ray.tasks.base import PairTask, Split
from lvm_ray.tokenizer import Tokenizer, load_tokenizer
from lvm_ray.train.job import tokenizer_folder

FILE = "study.json"
FOLDER = "study"
OWN = "as the run has it"
ASKED = ("evaluate.", "tasks.")  # what may be crossed: how a model is asked, not what it is
NOT_ASKED = ("evaluate.split", "evaluate.items", "evaluate.resamples", "evaluate.batch", "evaluate.reference_minutes")


@dataclass(frozen=True)
class Way:
    """One way to ask.

    settings  {recipe path: value}; empty: the run's own way
    name      those that are not the run's own, as a folder's name
    redrawn   its pictures are not those of the run's shards
    """

    settings: Mapping[str, Any]
    name: str
    recipe: Recipe
    redrawn: bool


def ways(run: str, over: Sequence[str], split: Split) -> list[Way]:
    """The run's own way, and every combination of `over`, each `key.path=[value, ...]`; those that are the own way are left out.

    Without `over`: 1 up to as many examples as sentences have room for, each drawn, fixed and nearest. Raises UserError where a
    setting cannot be crossed, and where a combination is no recipe.
    """
    path = f"{run}/config.yaml"
    own = config.load(path, [f"evaluate.split={split}"])
    grid = [_values(text) for text in over] or [
        ("evaluate.examples", list(range(1, own.pairs))),
        ("evaluate.choose", ["random", "fixed", "nearest"]),
    ]
    found = [Way({}, "own", own, False)]
    for values in itertools.product(*(values for _, values in grid)):
        settings = dict(zip((path for path, _ in grid), values, strict=True))
        texts = [f"{path}={yaml.safe_dump(value, default_flow_style=True)}" for path, value in settings.items()]
        recipe = config.load(path, [*texts, f"evaluate.split={split}"])
        if recipe != own:
            changed = {
                path: value for path, value in settings.items() if config.value_at(recipe, path) != config.value_at(own, path)
            }
            found.append(Way(settings, _name(changed), recipe, recipe.tasks != own.tasks))
    return found


def study(
    run: str, over: Sequence[str], split: Split, bar: Bar, load: Callable[[str], Tokenizer] = load_tokenizer
) -> dict[str, Any]:
    """Ask a trained run in every way, and say by what each differs from its own.

    {"split", "ways": [{"settings", "tasks": {task: {metric: entry}}, "against": {task: {metric: entry of `paired`}}}]}, the own
    way first; also as RUN/study.json. What was asked before is not asked again.
    """
    crossed = ways(run, over, split)
    rows: list[dict[str, Any]] = []
    own_items: dict[str, dict[str, Any]] = {}
    bar.total = len(crossed)
    for place, way in enumerate(crossed):
        folder = f"{run}/{FOLDER}/{split}/{way.name}"
        recipe = way.recipe.model_copy(update={"benchmarks": {}})
        if way.redrawn:
            recipe = _with_own_shards(recipe, folder, load)
        [evaluation] = evaluate_runs([run], recipe, Bar(way.name, None, "answers"), load, [folder])
        items = read_items(folder)
        own_items = own_items or items
        tasks = {name: cast(PairTask, recipe.tasks[name]) for name in items}
        against = {name: _against(task, own_items[name], items[name], recipe.seed) for name, task in tasks.items()}
        rows.append({"settings": dict(way.settings), "tasks": evaluation["tasks"], "against": against if place else {}})
        bar.set(place + 1, note=way.name)
    found: dict[str, Any] = rounded({"split": split, "ways": rows})
    write_file(run, FILE, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
    return found


def best_way(found: Mapping[str, Any], task: str, metric: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The way whose metric is best of those that are better than the run's own, and the difference; None where none is."""
    best = None
    for way in found["ways"][1:]:
        entry = way["against"][task][metric]
        gain = entry["difference"] if entry["higher_is_better"] else -entry["difference"]
        if gain > 0 and (best is None or gain > best[0]):
            best = gain, way["settings"], entry
    return best and (best[1], best[2])


def words(settings: Mapping[str, Any]) -> str:
    """Settings for people: `examples 2, choose nearest`."""
    return ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in settings.items()) or OWN


def _name(settings: Mapping[str, Any]) -> str:
    return re.sub(r"[^\w=,.-]+", "-", ",".join(f"{path.rpartition('.')[2]}={value}" for path, value in settings.items()))


def _values(text: str) -> tuple[str, list[Any]]:
    path, equals, values = text.partition("=")
    if not equals or not path.startswith(ASKED) or path in NOT_ASKED:
        raise UserError(f"--over {text}: write it as evaluate.examples=[1, 2, 3], of a setting below evaluate or tasks")
    try:
        found = yaml.safe_load(values)
    except yaml.YAMLError:
        raise UserError(f"--over {text}: {values!r} is not a YAML value") from None
    if not isinstance(found, list) or not found:
        raise UserError(f"--over {text}: found {values!r}: name the values as a list, as {path}=[1, 2, 3]")
    return path, found


def _with_own_shards(recipe: Recipe, folder: str, load: Callable[[str], Tokenizer]) -> Recipe:
    """The recipe with shards of its own tasks, by the run's tokenizer: originals alone, which are what stands in prompts."""
    tokenizer = Path(tokenizer_folder(recipe))
    tasks = {name: task.model_copy(update={"copies": 1}) for name, task in recipe.tasks.items()}
    changes = {"tasks": tasks, "shards": f"{folder}/data/shards"}
    tokenize(recipe.model_copy(update={**changes, "run": str(tokenizer.parent)}), Bar("tokenize", None, "pairs"), load)
    return recipe.model_copy(update=changes)


def _against(
    task: PairTask, own: Mapping[str, dict[str, Any]], other: Mapping[str, dict[str, Any]], seed: int
) -> dict[str, dict[str, Any]]:
    common = sorted(own.keys() & other.keys())
    return paired(task, [own[item] for item in common], [other[item] for item in common], tokens=True, seed=seed)
