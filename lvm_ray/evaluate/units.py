"""The work of an evaluation: items in units of a fixed size, with the examples that stand before each query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm_ray.config import Recipe
from lvm_ray.data.shards import Shards
from lvm_ray.errors import UserError
from lvm_ray.evaluate.prompts import choose_examples, chooser
from lvm_ray.evaluate.score import Unit
from lvm_ray.evaluate.subjects import Subject, listed, subjects
from lvm_ray.tasks.base import Item, Split


def test_items(recipe: Recipe) -> dict[str, list[Item]]:
    """The items that are scored: by pair task the first `evaluate.items` of `evaluate.split` by id, by benchmark all. Other
    tasks have no answers to score.

    Raises UserError where there are none.
    """
    tasks = subjects(recipe)
    if not tasks:
        raise UserError(
            f"tasks: {', '.join(recipe.tasks)}: none of them has labels, so no answer can be scored: add one that has"
        )
    found = {name: items for name, subject in tasks.items() if (items := listed(recipe, subject))}
    if not found:
        split = recipe.evaluate.split
        raise UserError(f"tasks.{next(iter(tasks))}.{split}: missing: evaluation needs a {split} source for at least one task")
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
    """The work: `evaluate.batch` items of a task or benchmark each, asked of all runs, with their examples: out of the shards, or
    other items of its own.

    `missing` names those whose references are still to be computed; `codebook` is the tokenizer's, where the nearest
    examples are wanted.
    """
    size = recipe.evaluate.batch
    units = []
    known = subjects(recipe)
    for name, asked in items.items():
        if known[name].pairs_of is None:
            make = _of_its_own(known[name], asked)
        else:
            make = _out_of_shards(known[name], shards, codebook, name in missing)
        for number, start in enumerate(range(0, len(asked), size)):
            part = tuple(asked[start : start + size])
            unit = Unit(name, number, part, None, (), None, name in missing, tuple(range(runs)))
            units.append(make(unit))
    return units


def _out_of_shards(
    subject: Subject, shards: Shards, codebook: NDArray[np.float32] | None, counted: bool
) -> Callable[[Unit], Unit]:
    """What gives a unit the tokens of training pairs of the run's task."""
    task = subject.pairs_of
    assert task is not None
    originals = shards.originals("train", task)
    _, tokens_P2N = shards.pairs("train", task, 0)
    counts_V = answer_counts(shards, task) if counted else None
    images_PN, ways = tokens_P2N[:, : shards.manifest.image_tokens], (subject.choose, subject.votes, subject.examples)
    choose = chooser(*ways, subject.seed, task, originals, images_PN, codebook)
    queries = _query_tokens(shards, subject.split, task) if subject.choose == "nearest" else {}

    def make(unit: Unit) -> Unit:
        # An item without tokens could not be used when the others were tokenised, so it will hardly be now.
        chosen = np.array([choose(item.id, item.original, queries.get(item.id)) for item in unit.items])
        return replace(unit, examples_IVE2N=tokens_P2N[chosen], counts_V=counts_V)

    return make


def _of_its_own(subject: Subject, asked: list[Item]) -> Callable[[Unit], Unit]:
    """What gives a unit other items of the benchmark, of other originals and alike in what it says."""
    assert subject.benchmark is not None
    alike = subject.benchmark.alike

    def kind(item: Item) -> Any:
        return item.extra[alike] if alike else None

    pools: dict[Any, list[Item]] = {}
    for item in asked:
        if item.problem is None:
            pools.setdefault(kind(item), []).append(item)

    def choose(item: Item) -> tuple[Item, ...]:
        if item.problem is not None:
            return ()
        pool = pools[kind(item)]
        others = len({one.original for one in pool} - {item.original})
        if others < subject.examples:
            which = f" of {alike} {kind(item)}" if alike else ""
            raise UserError(
                f"benchmarks.{subject.name}: {others} other items{which} can stand before {item.id}, and it shows "
                f"{subject.examples}: its data are not whole"
            )
        originals = [one.original for one in pool]
        places = choose_examples(subject.seed, subject.name, item.id, item.original, originals, subject.examples)
        return tuple(pool[place] for place in places)

    return lambda unit: replace(unit, shown=tuple(choose(item) for item in unit.items))


def _query_tokens(shards: Shards, split: Split, task: str) -> dict[str, NDArray[np.uint16]]:
    """The image tokens of a split's items by id."""
    ids, tokens_P2N = shards.pairs(split, task, 0)
    return dict(zip(ids, tokens_P2N[:, : shards.manifest.image_tokens], strict=True))
