"""The work of an evaluation: test items in units of a fixed size, with the examples that stand before each query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from lvm_ray.config import Recipe
from lvm_ray.data.shards import Shards
from lvm_ray.errors import UserError
from lvm_ray.evaluate.prompts import Likeness, choose_prompts
from lvm_ray.evaluate.score import Unit
from lvm_ray.tasks.base import Item, PairTask


def test_items(recipe: Recipe) -> dict[str, list[Item]]:
    """The test items that are scored, by pair task: the first `evaluate.items` by id; other tasks have no answers to score.

    Raises UserError where no pair task has any.
    """
    tasks = {name: task for name, task in recipe.tasks.items() if isinstance(task, PairTask)}
    if not tasks:
        raise UserError(
            f"tasks: {', '.join(recipe.tasks)}: none of them has labels, so no answer can be scored: add one that has"
        )
    listed = {name: list(islice(task.items("test"), recipe.evaluate.items)) for name, task in tasks.items()}
    found = {name: items for name, items in listed.items() if items}
    if not found:
        raise UserError(f"tasks.{next(iter(tasks))}.test: missing: evaluation needs a test source for at least one task")
    return found


def answer_counts(shards: Shards, task: str) -> NDArray[np.int64]:
    """How often each code stands in the task's training answers (copy 0), int64 [V]."""
    _, tokens_P2N = shards.pairs("train", task, 0)
    return np.bincount(tokens_P2N[:, shards.manifest.image_tokens :].reshape(-1), minlength=shards.manifest.codes)


def make_units(
    recipe: Recipe,
    items: dict[str, list[Item]],
    shards: Shards,
    missing: Sequence[str],
    runs: int,
    codebook: NDArray[np.float32] | None,
) -> list[Unit]:
    """The work: `evaluate.batch` items of a task each, with their examples out of the shards, asked of all runs.

    `missing` names the tasks whose references are still to be computed; `codebook` is the tokenizer's, where the nearest
    examples are wanted.
    """
    size = recipe.evaluate.batch
    units = []
    for task, listed in items.items():
        originals = shards.originals("train", task)
        _, tokens_P2N = shards.pairs("train", task, 0)
        counts_V = answer_counts(shards, task) if task in missing else None
        choose = _chooser(recipe, task, shards, originals, tokens_P2N, codebook)
        for number, start in enumerate(range(0, len(listed), size)):
            part = listed[start : start + size]
            chosen = [choose(item) for item in part]
            units.append(Unit(task, number, tuple(part), tokens_P2N[np.array(chosen)], counts_V, tuple(range(runs))))
    return units


def _chooser(
    recipe: Recipe,
    task: str,
    shards: Shards,
    originals: list[str],
    tokens_P2N: NDArray[np.uint16],
    codebook: NDArray[np.float32] | None,
) -> Callable[[Item], list[list[int]]]:
    """A function of a test item that gives the places of the examples of each of its prompts."""
    section = recipe.evaluate
    choose, votes, examples = section.choose, section.votes, section.examples
    if choose != "nearest":
        return lambda item: choose_prompts(choose, votes, recipe.seed, task, item.id, item.original, originals, examples)
    assert codebook is not None
    image_tokens = shards.manifest.image_tokens
    likeness = Likeness(tokens_P2N[:, :image_tokens], originals, codebook, recipe.seed, task)
    ids, queries_Q2N = shards.pairs("test", task, 0)
    rows = {name: row for row, name in enumerate(ids)}

    def nearest(item: Item) -> list[list[int]]:
        if item.id not in rows:  # it could not be used when the others were tokenised, so it will hardly be now
            return choose_prompts("random", votes, recipe.seed, task, item.id, item.original, originals, examples)
        return likeness.choose(queries_Q2N[rows[item.id], :image_tokens], item.original, examples, votes)

    return nearest
