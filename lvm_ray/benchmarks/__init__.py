"""Benchmarks as data: one file NAME.yaml beside this one says what is asked, of whose images, and what is scored.

To add one: write its file; its fields are those of `Benchmark`. Whatever changes a score raises `version`, so that two numbers of
one name and version are answers to the same questions. A recipe names benchmarks with the folders of their data:

    benchmarks: {camvid: data/camvid, pascal5i: data/VOCdevkit/VOC2012}

`{data}` in a file's test source stands for that folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from pydantic import Field, ValidationError, model_validator

from lvm_ray.section import NestedProblem, Section, first_problem

if TYPE_CHECKING:
    from lvm_ray.tasks.base import PairTask

SEED = 0  # of every draw of a benchmark's pairs, whatever the recipe's
DATA = "{data}"
FOLDER = Path(__file__).parent


class Benchmark(Section):
    """One benchmark: a task with settings of its own, its test items, and the pairs that are shown before each."""

    version: int = Field(ge=1)
    says: str = Field(description="whose protocol it is, what is scored, and where ours differs")
    task: str = Field(description="the task that draws, reads back and measures")
    settings: dict[str, Any] = Field({}, description="of the task's section; what is left out is the run's own, or the default")
    test: dict[str, Any] = Field(description="the test source, with `{data}` for the folder of its data")
    pairs: Literal["run", "own"] = Field(description="run: training pairs of the run's task; own: other items of the benchmark")
    alike: str | None = Field(None, description="own: what an item and its pairs have in common, a key of the items' `extra`")
    items: int | None = Field(None, ge=1, description="how many are asked, and shown of its own: the first by id; null: all")
    examples: int = Field(ge=1, description="pairs before each query")
    metrics: list[str] = Field(min_length=1, description="what is reported, the main one first")

    @model_validator(mode="after")
    def _known(self) -> Benchmark:
        from lvm_ray.evaluate.statistics import MORE_TOKEN_METRICS, TOKEN_METRICS
        from lvm_ray.tasks import TASKS, PairTask

        task = TASKS.get(self.task)
        if task is None or not issubclass(task, PairTask):
            raise ValueError(f"task: found {self.task!r}, which is no task with labels")
        known = [*task.metrics, *TOKEN_METRICS, *MORE_TOKEN_METRICS]
        unknown = next((name for name in self.metrics if name not in known), None)
        if unknown is not None:
            raise ValueError(f"metrics: no metric of {self.task} is called {unknown!r}: there are {', '.join(known)}")
        return self

    def source(self, data: str) -> dict[str, Any]:
        """The test source in a folder of data."""
        return {key: _below(value, data) for key, value in self.test.items()}

    def layout(self, data: str) -> str:
        """Where a folder of data should hold what, for messages."""
        return ", ".join(f"{key} in {_below(value, data)}" for key, value in self.test.items() if value != _below(value, data))

    @property
    def protocol(self) -> dict[str, Any]:
        """What decides a score, as plain values without a path."""
        fields = {"says", "settings", "test", "pairs", "alike", "items", "examples"}
        return {**self.model_dump(include=fields), "seed": SEED}


def names() -> list[str]:
    """The benchmarks that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def read(name: str) -> Benchmark:
    """A benchmark by name. Raises ValueError naming those that there are, and what is wrong with its file."""
    if name not in names():
        raise ValueError(f"no benchmark is called {name!r}: there are {', '.join(names())}")
    path = FOLDER / f"{name}.yaml"
    try:
        return Benchmark.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {first_problem(error, Benchmark)}") from None


def task_of(name: str, data: str, tasks: Mapping[str, Section], pairs: int) -> PairTask:
    """The task that asks a benchmark's items in the folder `data`, of a run with these tasks and sentences of so many pairs.

    Raises ValueError where there is no such benchmark, and where the run cannot be asked it.
    """
    from lvm_ray.tasks import TASKS

    benchmark = read(name)
    if benchmark.examples >= pairs:
        raise NestedProblem(
            f"{name}: it shows {benchmark.examples} pairs before a query, "
            f"and sentences of {pairs} pairs take at most {pairs - 1}: "
            f"train with pairs: {benchmark.examples + 1}, or leave it out"
        )
    test = benchmark.source(data)
    if benchmark.pairs == "own":
        values = benchmark.settings | {"train": test, "test": test}
    else:
        values = _of_run(name, benchmark, tasks) | benchmark.settings | {"test": test}
    try:
        return cast("PairTask", TASKS[benchmark.task].model_validate(values))
    except ValidationError as error:
        raise NestedProblem(f"{name}: {first_problem(error, TASKS[benchmark.task])}") from None


def scoring_task(name: str) -> PairTask:
    """The task that scores measured items of a benchmark, without a source."""
    from lvm_ray.tasks import TASKS

    return cast("PairTask", TASKS[read(name).task].model_validate(read(name).settings))


def _of_run(name: str, benchmark: Benchmark, tasks: Mapping[str, Section]) -> dict[str, Any]:
    """The values of the run's own section, whose training pairs are shown. Raises ValueError where their labels mean something
    else than the benchmark's."""
    from lvm_ray.tasks.base import PairTask

    section = tasks.get(benchmark.task)
    if not isinstance(section, PairTask):
        raise NestedProblem(
            f"{name}: it shows training pairs of {benchmark.task}, which is not among the tasks {', '.join(tasks)}: leave it out"
        )
    for key in section.meaning:
        wanted, found = benchmark.settings.get(key, getattr(section, key)), getattr(section, key)
        if wanted != found:
            raise NestedProblem(f"{name}: it asks for tasks.{benchmark.task}.{key}: {wanted}, found {found}: leave it out")
    values: dict[str, Any] = json.loads(section.model_dump_json())
    return values


def _below(value: Any, data: str) -> Any:
    return value.replace(DATA, data.rstrip("/") or "/") if isinstance(value, str) else value
