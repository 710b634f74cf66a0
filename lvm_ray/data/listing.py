"""The listing: what there is to tokenise, as streams, so that a hundred million items are never in memory.

Two passes over the sources, which read no picture. The first counts the items, fingerprints all that the tokens depend on and
finds ids that stand twice; the second cuts each (split, task) into units of work and writes each unit's items into a file:

    FOLDER/.units/{split}-{task}-{part:05d}.items    JSON lines, one an item

A unit is a fixed list whatever the workers. Whoever tokenises it reads its file; nothing else travels.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import cast

import numpy as np

from lvm_ray.config import Recipe, to_dict
from lvm_ray.data.shards import SCHEMA
from lvm_ray.errors import UserError
from lvm_ray.seeds import stable_hash
from lvm_ray.storage import file_size, is_uri, join, list_sizes, read_file, split_name, write_file
from lvm_ray.tasks.base import SPLITS, Item, Split, Task

UNITS = ".units"
UNIT_PAIRS = 512  # about; less than this a unit costs more to hand out than to do
UNIT_ITEMS = (32, 256)  # fewest and most items of a unit, the rows of one part, of a data set that needs no larger ones
MOST_UNITS = 20_000  # of one (split, task): beyond, units grow


@dataclass(frozen=True)
class Unit:
    """Some items of a split of a task: they become part number `part` of every copy."""

    split: Split
    task: str
    part: int
    items: int

    @property
    def record(self) -> str:
        """Where a finished unit's record lies, below the data set's folder."""
        return f"{UNITS}/{self.split}-{self.task}-{self.part:05d}.json"

    @property
    def listing(self) -> str:
        return f"{UNITS}/{self.split}-{self.task}-{self.part:05d}.items"


@dataclass(frozen=True)
class Survey:
    """What the first pass finds.

    settings  sixteen hex digits that change with anything that the tokens depend on, the files' sizes included
    counts    {task: {split: items}}
    twice     {(task, split): hashes of ids that stand more than once}
    remarks   what people should know, such as images that stand in two splits
    """

    settings: str
    counts: dict[str, dict[Split, int]]
    twice: dict[tuple[str, Split], frozenset[int]]
    remarks: tuple[str, ...]


def survey(recipe: Recipe, tokenizer: str) -> Survey:
    """The first pass. `tokenizer` is the tokenizer's hash.

    Raises UserError where a source is unusable or a task has no training items.
    """
    digest = hashlib.sha256()
    head = [SCHEMA, recipe.size, recipe.seed, tokenizer, to_dict(recipe)["tasks"]]
    digest.update(json.dumps(head, sort_keys=True).encode())
    counts: dict[str, dict[Split, int]] = {}
    twice: dict[tuple[str, Split], frozenset[int]] = {}
    remarks: list[str] = []
    size_of = _sizes()
    for name, task in tasks_of(recipe).items():
        files: dict[Split, array[int]] = {}
        for split in SPLITS:
            ids, files[split] = array("Q"), array("Q")
            for item in task.items(split):
                line = json.dumps([name, split, *asdict(item).values(), [size_of(path) for path in item.paths]], sort_keys=True)
                digest.update(line.encode())
                ids.append(stable_hash(item.id))
                files[split].append(stable_hash(item.original, item.paths[0]))
            counts.setdefault(name, {})[split] = len(ids)
            found, times = np.unique(np.asarray(ids, np.uint64), return_counts=True)
            twice[name, split] = frozenset(found[times > 1].tolist())
        if not counts[name]["train"]:
            raise UserError(f"tasks.{name}.train: names no images: give the task a training source, or remove it")
        remarks += _shared_files(name, task, files)
    return Survey(digest.hexdigest()[:16], counts, twice, tuple(remarks))


def units_of(recipe: Recipe, counts: dict[str, dict[Split, int]]) -> list[Unit]:
    """All work, the largest units first so that the actors end together."""
    units = []
    for task, splits in counts.items():
        for split, count in splits.items():
            length = unit_length(count, copies_of(recipe, task, split))
            units += [Unit(split, task, k, min(length, count - k * length)) for k in range(-(-count // length))]
    return sorted(units, key=lambda unit: -unit.items * copies_of(recipe, unit.task, unit.split))


def unit_length(items: int, copies: int) -> int:
    """Items of a unit of one (split, task)."""
    fewest, most = UNIT_ITEMS
    return max(fewest, min(most, UNIT_PAIRS // copies), -(-items // MOST_UNITS))


def write_units(recipe: Recipe, found: Survey) -> None:
    """The second pass: every unit's items into its file. An id that stands twice is a problem of its second item.

    Raises UserError where the sources have changed since the first pass.
    """
    for name, task in tasks_of(recipe).items():
        for split in SPLITS:
            count = found.counts[name][split]
            stream = _unique(task.items(split), found.twice[name, split])
            length = unit_length(count, copies_of(recipe, name, split))
            for part in range(-(-count // length)):
                items = list(islice(stream, length))
                unit = Unit(split, name, part, len(items))
                if len(items) != min(length, count - part * length):
                    raise UserError(f"tasks.{name}.{split}: its files changed while they were listed: run lvm-ray tokenize again")
                write_file(recipe.shard_folder, unit.listing, "".join(json.dumps(asdict(item)) + "\n" for item in items).encode())


def read_unit(folder: str, unit: Unit) -> list[Item]:
    """The items of a unit."""
    content = read_file(folder, unit.listing)
    assert content is not None, f"{join(folder, unit.listing)} is missing"
    values = [json.loads(line) for line in content.splitlines()]
    return [Item(**{**value, "paths": tuple(value["paths"])}) for value in values]


def tasks_of(recipe: Recipe) -> dict[str, Task]:
    """The recipe's tasks, as the tasks that its validation made of its sections."""
    return cast("dict[str, Task]", recipe.tasks)


def copies_of(recipe: Recipe, task: str, split: Split) -> int:
    """Versions of each item: only training items are augmented."""
    return tasks_of(recipe)[task].copies if split == "train" else 1


def _unique(items: Iterator[Item], twice: frozenset[int]) -> Iterator[Item]:
    seen: set[str] = set()
    for item in items:
        if twice and stable_hash(item.id) in twice:
            if item.id in seen:
                item = replace(item, problem=item.problem or f"{item.paths[0]}: another item is called {item.id!r} as well")
            seen.add(item.id)
        yield item


def _shared_files(name: str, task: Task, files: dict[Split, array[int]]) -> list[str]:
    """A remark for each two splits of a task that share images."""
    remarks = []
    pairs: tuple[tuple[Split, Split], ...] = (("train", "test"), ("train", "validation"), ("validation", "test"))
    for first, second in pairs:
        shared = np.intersect1d(np.asarray(files[first], np.uint64), np.asarray(files[second], np.uint64))
        if len(shared):
            hashes = frozenset(shared.tolist())
            items = (item for item in task.items(second) if stable_hash(item.original, item.paths[0]) in hashes)
            remarks.append(
                f"tasks.{name}.{second}: {next(items).paths[0]} is in tasks.{name}.{first} as well ({len(shared)} such images): "
                "scores on training images say nothing; give each split images of its own, or use hold_out"
            )
    return remarks


def _sizes() -> Callable[[str], int | None]:
    """What gives the bytes of a file, None where there is none. It remembers the last few, since a tar has many items, and
    of URIs whole folders, since a request for every file would take hours; so it serves one survey and no more."""
    size, listed = lru_cache(maxsize=4)(file_size), lru_cache(maxsize=4)(list_sizes)

    def of_uri(path: str) -> int | None:
        folder, name = split_name(path)
        return listed(folder).get(name)

    return lambda path: of_uri(path) if is_uri(path) else size(path)
