"""A space file: what a sweep varies and how it searches, read and checked before anything starts.

    from ray import tune

    space = {"distill.temperature": tune.loguniform(0.5, 8.0), "distill.weight": tune.choice([0.5, 1.0, 2.0])}
    trials = 12  # this and all else that `Space` has is optional

Keys are paths into the student's recipe. Values are Ray Tune's: uniform, loguniform, randint, lograndint, their quantised forms,
choice and grid_search; a plain value holds for all trials. The file is code: it is run only where a command line names it.
"""

from __future__ import annotations
import __future__

import difflib
import json
import math
import runpy
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.storage import is_uri
from lvm_ray.tune.domains import Grid, checked, ends, is_list, is_varied, text_of

SEARCHES = ("random", "grid", "tpe", "population")
OBJECTIVES = ("target_perplexity", "majority_cost", "parameters")
SECTIONS = ("balance", "distill", "model", "train")  # whose keys leave tokens, tokenizer and sentences as they are
THE_PAPERS = {"distill.temperature": 1.0, "distill.weight": 1.0}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Space:
    """What a space file says.

    values      {key path: Grid, domain of Ray Tune, or plain value}, in the file's order
    search      random: drawn; grid: every combination; tpe: Optuna's tree-structured Parzen estimator, round by round;
                population: of so many trials the worst go on from the best, with other shares
    trials      how many are drawn (with a grid_search among the values: for each of its combinations); of a grid as many as it
                has
    round       tpe: trials that are chosen at once, from what the rounds before have found
    generations population: parts of the training after each of which that happens
    stopping    asha: at growing steps a trial stops that is not among the best third; None: every trial runs to its end
    objectives  target_perplexity: exp of the mean validation loss of the tasks; majority_cost: the same of the task with the most
                pairs; parameters: of the model. All are to be small; the first one names the winner
    best        how many of the best are trained again with new seeds before one is named
    repeats     how many new seeds that are
    reference   the settings that the winner is compared with; default: the paper's T=1 and weight 1, without distillation the
                recipe as it is
    """

    path: str
    values: dict[str, Any]
    search: str
    trials: int
    round: int = 4
    generations: int = 4
    stopping: str | None = None
    objectives: tuple[str, ...] = ("target_perplexity",)
    best: int = 3
    repeats: int = 3
    reference: Settings | None = None

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @property
    def fixed(self) -> Settings:
        """What holds for all trials."""
        return {key: value for key, value in self.values.items() if not is_varied(value)}

    @property
    def varied(self) -> dict[str, Any]:
        return {key: value for key, value in self.values.items() if is_varied(value)}

    @property
    def at_once(self) -> int:
        """Trials of the largest round of the search."""
        return min(self.trials, self.round) if self.search == "tpe" else self.trainings

    @property
    def number(self) -> int:
        """Trials of the whole search."""
        return self.trainings * (self.generations if self.search == "population" else 1)

    @property
    def trainings(self) -> int:
        """Whole trainings that the search comes to, if nobody is stopped."""
        grids = math.prod(len(value.values) for value in self.values.values() if isinstance(value, Grid))
        return self.trials * grids

    def reference_of(self, recipe: Recipe) -> Settings:
        """The settings that the winner is compared with."""
        if self.reference is not None:
            return self.reference
        return {key: value for key, value in THE_PAPERS.items() if recipe.distill or "distill" in "".join(self.values)}

    def described(self) -> dict[str, Any]:
        """All that the file says, as plain values."""
        values = {key: text_of(value) for key, value in self.values.items()}
        rest = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("path", "values")}
        return json.loads(json.dumps({"values": values, **rest}))  # type: ignore[no-any-return]


def read_space(path: str) -> Space:
    """Run a space file. Raises UserError, one line with the file's path, where it cannot be run or says what cannot be."""
    if is_uri(path) or not Path(path).is_file():
        raise UserError(f"{path}: no such file here: a space is a Python file of this machine, as tune_spaces/kd_temperature.py")
    try:
        found = runpy.run_path(path)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno if not isinstance(error, SyntaxError) else error.lineno
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        raise UserError(f"{path}: line {own[-1] if own else line}: {type(error).__name__}: {error}") from None
    values = {name: value for name, value in found.items() if not name.startswith("_") and not _is_imported(value)}
    try:
        return _space(path, values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _is_imported(value: Any) -> bool:
    return callable(value) or hasattr(value, "__spec__") or isinstance(value, __future__._Feature)


def _space(path: str, found: dict[str, Any]) -> Space:
    known = ["space", *(field.name for field in fields(Space) if field.name not in ("path", "values"))]
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{name}: a space file has no such value; "
                + (
                    f"did you mean {close[0]!r}?"
                    if close
                    else f"there are {', '.join(known)}, and names of one's own begin with _"
                )
            )
    space = found.pop("space", None)
    if not isinstance(space, dict) or not space or not all(isinstance(key, str) for key in space):
        raise ValueError('space: missing: write it as space = {"distill.temperature": tune.loguniform(0.5, 8.0)}')
    values = {key: checked(key, value) for key, value in space.items()}
    if not any(map(is_varied, values.values())):
        raise ValueError("space: nothing varies: give a key one of Ray Tune's domains, as tune.uniform(0.5, 8.0)")
    _check_types(found)
    found["search"] = found.get("search") or (
        "grid" if all(isinstance(v, Grid) for v in values.values() if is_varied(v)) else "random"
    )
    _check_search(values, found)
    if found["search"] == "grid":
        values = {key: Grid(value.categories) if hasattr(value, "categories") else value for key, value in values.items()}
    found["objectives"] = tuple(found.get("objectives", OBJECTIVES[:1]))
    found.setdefault("trials", {"grid": 1, "population": 8}.get(found["search"], 12))
    return Space(path, values, **found)


def _check_types(found: Mapping[str, Any]) -> None:
    for name, least in (("trials", 1), ("round", 1), ("generations", 2), ("best", 1), ("repeats", 0)):
        value = found.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: found {value!r}: give a whole number from {least}")
    for name, choices in (("search", SEARCHES), ("stopping", (None, "asha"))):
        if name in found and found[name] not in choices:
            raise ValueError(f"{name}: found {found[name]!r}: there are {', '.join(map(repr, choices))}")
    objectives = found.get("objectives", OBJECTIVES[:1])
    if not isinstance(objectives, list | tuple) or not objectives:
        raise ValueError(f"objectives: found {objectives!r}: give a list of {', '.join(OBJECTIVES)}")
    for name in objectives:
        if name not in OBJECTIVES:
            raise ValueError(f"objectives: found {name!r}: there are {', '.join(OBJECTIVES)}")
    if objectives[0] == "parameters" or len(set(objectives)) < len(objectives):
        raise ValueError(f"objectives: found {list(objectives)}: name each once, and a quality first: it decides who wins")
    reference = found.get("reference")
    if reference is not None and not isinstance(reference, dict):
        raise ValueError(f"reference: found {reference!r}: give settings as a dictionary, {{}} for the recipe as it is")


def _check_search(values: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    search = found["search"]
    if search == "grid":
        if "trials" in found:
            raise ValueError("trials: a grid has as many trials as combinations: leave trials out")
        other = next((key for key, value in values.items() if is_varied(value) and not is_list(value)), None)
        if other is not None:
            raise ValueError(f"{other}: a grid takes single values: write tune.grid_search([...])")
    if search == "tpe":
        grid = next((key for key, value in values.items() if isinstance(value, Grid)), None)
        if grid is not None:
            raise ValueError(f"{grid}: tpe chooses values by what it has seen: write tune.choice([...])")
    if search == "population":
        other = next(
            (
                key
                for key, value in values.items()
                if is_varied(value) and (is_list(value) or not key.startswith("balance.shares."))
            ),
            None,
        )
        if other is not None:
            raise ValueError(f"{other}: a population finds a schedule of shares alone: give balance.shares.TASK ranges")
        if found.get("trials", 8) < 2 or found.get("stopping"):
            raise ValueError("search: a population has at least two trials, and none of them is stopped: leave stopping out")
    if found.get("stopping") and len(found.get("objectives", ())) > 1:
        raise ValueError("stopping: asha goes by a single objective: leave it out, or all objectives but one")


def check_keys(space: Space, recipe: Recipe) -> None:
    """Raises UserError where the student's recipe has no such key, or cannot have a value of a choice or an end of a range."""
    for settings in [*corners(space), space.fixed | space.reference_of(recipe)]:
        config.changed(recipe, settings, space.path)
    for key in [*space.values, *(space.reference or {})]:
        section = key.split(".")[0]
        if section not in SECTIONS and key != "compute.workers":
            raise UserError(
                f"{space.path}: {key}: a trial changes its training alone ({', '.join(SECTIONS)}): all trials share tokens and "
                "sentences; for other ones make another pipeline"
            )
        if key.endswith((".cache", ".init")):
            raise UserError(f"{space.path}: {key}: a folder is none of a sweep's settings: set it in the recipe")
    _check_places(space, recipe)
    if space.search == "population":
        _check_population(space, recipe)


def corners(space: Space) -> list[Settings]:
    """Settings in which each value of a choice and each end of a range is set in turn, while the others stand at their first."""
    first = {key: ends(value)[0] if is_varied(value) else value for key, value in space.values.items()}
    return [{**first, key: end} for key, value in space.varied.items() for end in ends(value)]


def _check_population(space: Space, recipe: Recipe) -> None:
    """Raises UserError where members would not share their plans up to where their schedules part."""
    steps = space.fixed.get("train.steps", recipe.train.steps)
    if steps % space.generations:
        raise UserError(f"{space.path}: generations: {steps} steps (train.steps) are not {space.generations} equal parts")
    missing = next((task for task in recipe.tasks if f"balance.shares.{task}" not in space.values), None)
    if missing:
        raise UserError(f"{space.path}: balance.shares.{missing}: missing: a schedule says the share of every task")
    if recipe.balance.weights:
        raise UserError(f"{space.path}: balance.weights: they are scaled by the whole schedule: leave them out of the recipe")


def _check_places(space: Space, recipe: Recipe) -> None:
    """Raises UserError where one cache cannot serve all trials: whether images' places are in it depends on their weight."""
    from lvm_ray.recipe_sections import most_of

    recipes = [config.changed(recipe, settings, space.path) for settings in corners(space)]
    weighed = {bool(most_of(one.train.image_weight)) for one in recipes if one.distill}
    if len(weighed) > 1:
        raise UserError(
            f"{space.path}: train.image_weight: 0 and more in one sweep need two caches of the teacher's answers: leave 0 out"
        )
