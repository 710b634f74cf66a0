"""What is scored under a name: a task of the recipe on its own test items, or a benchmark on its data.

Both are asked, measured and compared by the same code; they differ in where test items and the pairs before a query come from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from lvm_ray import benchmarks
from lvm_ray.benchmarks import Benchmark
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.tasks.base import Item, PairTask, Split


@dataclass(frozen=True)
class Subject:
    """One task or benchmark that is scored.

    name       of its units, items and pictures: the task's, or NAME@VERSION of a benchmark
    task       loads, draws, reads back and measures its items
    training   the task whose training items its floors are learnt from
    pairs_of   the recipe's task whose training pairs stand before a query; None: other items of its own
    benchmark  what it is, of a benchmark
    seed       of the choice of pairs
    draws      answers drawn to each prompt, 0: the greedy one
    split      whose items are asked
    items      how many of them, the first by id; None: all
    """

    name: str
    task: PairTask
    training: PairTask
    pairs_of: str | None
    benchmark: Benchmark | None
    examples: int
    choose: Literal["random", "fixed", "nearest"]
    votes: int
    seed: int
    draws: int
    split: Split
    items: int | None

    @property
    def described(self) -> list[Any]:
        """All that it asks, as plain values; what is asked of a longer list of items is the same for those at its start."""
        section = json.loads(self.task.model_dump_json())
        protocol = self.benchmark and self.benchmark.protocol
        return [self.name, section, protocol, self.pairs_of, self.examples, self.choose, self.votes, self.seed, self.split]

    @property
    def asked_as(self) -> str:
        """What of it an evaluation may vary, in words."""
        return f"{self.name}, {self.split}: {self.votes} x {self.examples} {self.choose} pairs"


def subjects(recipe: Recipe) -> dict[str, Subject]:
    """The pair tasks of a recipe and its benchmarks, by name."""
    tasks = {name: _of_task(recipe, name, task) for name, task in recipe.tasks.items() if isinstance(task, PairTask)}
    return tasks | {found.name: found for found in (_of_benchmark(recipe, name) for name in recipe.benchmarks)}


def listed(recipe: Recipe, subject: Subject) -> list[Item]:
    """The items that are asked. Raises UserError naming what is missing, of a benchmark with the layout of its data; a benchmark
    without any item is one."""
    if subject.benchmark is None:
        return list(islice(subject.task.items(subject.split), subject.items))
    name = subject.name.partition("@")[0]
    layout = subject.benchmark.layout(recipe.benchmarks[name])
    try:
        found = list(islice(subject.task.items(subject.split), subject.items))
    except UserError as error:
        problem = str(error).replace(f"tasks.{subject.task.name}.test", f"benchmarks.{name}", 1)
        raise UserError(f"{problem} (it expects {layout})") from None
    if not found:
        raise UserError(f"benchmarks.{name}: no item in {recipe.benchmarks[name]} (it expects {layout})")
    return found


def benchmark_lines(recipe: Recipe) -> list[str]:
    """What the recipe's benchmarks would ask, a line each. Raises UserError as `listed`."""
    lines = []
    for subject in subjects(recipe).values():
        if subject.benchmark is not None:
            pairs = f"{subject.examples} pairs of {subject.pairs_of or 'its own'} before each"
            metrics = ", ".join(subject.benchmark.metrics)
            lines.append(f"benchmark {subject.name}: {len(listed(recipe, subject)):,} items, {pairs}; {metrics}")
    return lines


def _of_task(recipe: Recipe, name: str, task: PairTask) -> Subject:
    section = recipe.evaluate
    return Subject(
        name=name,
        task=task,
        training=task,
        pairs_of=name,
        benchmark=None,
        examples=section.examples,
        choose=section.choose,
        votes=section.votes,
        seed=recipe.seed,
        draws=section.draws.get(name, 0),
        split=section.split,
        items=section.items,
    )


def _of_benchmark(recipe: Recipe, name: str) -> Subject:
    benchmark = benchmarks.read(name)
    task = benchmarks.task_of(name, recipe.benchmarks[name], recipe.tasks, recipe.pairs)
    own = benchmark.pairs == "own"
    training = task if own else recipe.tasks[benchmark.task]
    assert isinstance(training, PairTask)
    return Subject(
        name=f"{name}@{benchmark.version}",
        task=task,
        training=training,
        pairs_of=None if own else benchmark.task,
        benchmark=benchmark,
        examples=benchmark.examples,
        choose="random",
        votes=1,
        seed=benchmarks.SEED,
        draws=recipe.evaluate.draws.get(benchmark.task, 0),
        split="test",
        items=benchmark.items,
    )
