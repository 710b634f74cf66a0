"""From labelled images to token shards, with every copy of a training pair.

The work is cut into units: a group of items of one (split, task) with all their copies, so that an image is read once for
all of them. A unit is a fixed list, whatever the workers; its pictures pass the tokenizer in batches of one fixed size on
one thread, so tokens never depend on who computed them. A unit writes one part per copy and then its record; a unit with
a record is not done again after a kill. When all units have records the manifest is written, and the records go.

    FOLDER/.units/{split}-{task}-{part:05d}.json    a finished unit: its files, its bad items

Items that cannot be used are set aside with their reasons in `bad_items.jsonl`, in every copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import pyarrow.fs

from lvm_ray.config import Recipe, to_dict
from lvm_ray.data.shards import (
    SCHEMA,
    Manifest,
    Tokens,
    count_rows,
    read_manifest,
    require_tokenised,
    write_manifest,
    write_part,
)
from lvm_ray.errors import BadItem, UserError
from lvm_ray.seeds import stable_hash
from lvm_ray.storage import open_folder, read_file, write_file
from lvm_ray.tasks.base import SPLITS, Item, Picture, Split, Task
from lvm_ray.threads import one_thread
from lvm_ray.tokenizer import Tokenizer, load_tokenizer

ENCODED_AT_ONCE = 32  # pictures
UNIT_PAIRS = 512  # about; less than this a unit costs more to hand out than to do
UNIT_ITEMS = (32, 256)  # fewest and most items of a unit: the rows of one part
RESTARTS = 2  # after actors that died
RECORDS = ".units"


class Bar(Protocol):
    """The part of `progress.Bar` that tokenizing moves."""

    total: float | None

    def set(self, done: float, note: str = "") -> None: ...


@dataclass(frozen=True)
class Unit:
    """Some items of a split of a task: they become part number `part` of every copy."""

    split: Split
    task: str
    part: int
    items: tuple[Item, ...]

    @property
    def record(self) -> str:
        return f"{RECORDS}/{self.split}-{self.task}-{self.part:05d}.json"


@dataclass(frozen=True)
class Job:
    """All that an actor needs beside its units: a plain value that travels to it."""

    recipe: Recipe
    load: Callable[[str], Tokenizer]
    settings: str


def tokenize(recipe: Recipe, bar: Bar, load: Callable[[str], Tokenizer] = load_tokenizer) -> Manifest:
    """Make the recipe's shards out of its tasks' items and its tokenizer folder. Does nothing where they are finished.

    `bar` counts pairs. `compute.workers` x threads actors of Ray work; one alone works in this process, without Ray.
    Raises UserError where a task has no training items, where a task's items are unusable (all of them, or a larger part
    than `max_bad`), and where the tokenizer is not the recipe's.
    """
    tokenizer = load(recipe.tokenizer_folder)
    _require_recipe_tokenizer(recipe, tokenizer)
    items = list_items(recipe)
    settings = settings_fingerprint(recipe, items, tokenizer.hash)
    folder, total = recipe.shard_folder, _count_pairs(recipe, items)
    bar.total = total
    finished = _finished(folder, settings)
    if finished:
        bar.set(total, note="as before")
        return finished
    require_tokenised(folder)
    records = _clear(folder, settings)
    units = make_units(recipe, items)
    pending = [unit for unit in units if unit.record not in records]
    progress = _Progress(bar, total - _count_units(recipe, pending), records)
    for name, record in _run(Job(recipe, load, settings), pending, tokenizer):
        records[name] = record
        progress.add(record)
    return _finish(recipe, items, tokenizer, settings, [records[unit.record] for unit in units])


def list_items(recipe: Recipe) -> dict[str, dict[Split, list[Item]]]:
    """Every task's items by split. Raises UserError naming a task without training items."""
    listing = {name: {split: list(task.items(split)) for split in SPLITS} for name, task in _tasks(recipe).items()}
    for name, splits in listing.items():
        if not splits["train"]:
            raise UserError(f"tasks.{name}.train: names no images: give the task a training source, or remove it")
    return listing


def make_units(recipe: Recipe, items: dict[str, dict[Split, list[Item]]]) -> list[Unit]:
    """All work, the largest units first so that the actors end together."""
    units = []
    for task, splits in items.items():
        for split, listed in splits.items():
            fewest, most = UNIT_ITEMS
            length = max(fewest, min(most, UNIT_PAIRS // _copies(recipe, task, split)))
            for part, start in enumerate(range(0, len(listed), length)):
                units.append(Unit(split, task, part, tuple(listed[start : start + length])))
    return sorted(units, key=lambda unit: -len(unit.items) * _copies(recipe, unit.task, unit.split))


def settings_fingerprint(recipe: Recipe, items: dict[str, dict[Split, list[Item]]], tokenizer: str) -> str:
    """Sixteen hex digits that change with anything that the tokens depend on, the files' sizes included."""
    digest = hashlib.sha256()
    head = [SCHEMA, recipe.size, recipe.seed, tokenizer, to_dict(recipe)["tasks"]]
    digest.update(json.dumps(head, sort_keys=True).encode())
    for task, splits in items.items():
        for split, listed in splits.items():
            for item in listed:
                sizes = [os.path.getsize(path) if os.path.isfile(path) else None for path in item.paths]
                line = [task, split, item.id, item.original, item.paths, item.extra, sizes]
                digest.update(json.dumps(line, sort_keys=True).encode())
    return digest.hexdigest()[:16]


class UnitTokenizer:
    """What an actor runs: it loads the tokenizer once and turns units into parts and records."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None) -> None:
        self._job = job
        self._tokenizer = tokenizer or job.load(job.recipe.tokenizer_folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """As Ray Data calls it: a batch of one packed unit becomes its record's name and content."""
        unit = _unpack(batch["unit"][0])
        return {"name": [unit.record], "record": [json.dumps(self.work(unit))]}

    def work(self, unit: Unit) -> dict[str, Any]:
        """Write a unit's parts, then its record; the record."""
        recipe = self._job.recipe
        copies = _copies(recipe, unit.task, unit.split)
        good: list[Item] = []
        bad: list[dict[str, Any]] = []
        with one_thread():
            tokens = encode(self._tokenizer, self._pictures(unit, copies, good, bad), recipe.image_tokens)
        files = {}
        if good:
            tokens_PCN = tokens.reshape(len(good), copies, _tasks(recipe)[unit.task].pictures * recipe.image_tokens)
            ids, originals = [item.id for item in good], [item.original for item in good]
            for copy in range(copies):
                part = np.ascontiguousarray(tokens_PCN[:, copy])
                path, entry = write_part(recipe.shard_folder, unit.split, unit.task, copy, unit.part, ids, originals, part)
                files[path] = entry
        record = {"settings": self._job.settings, "pairs": len(unit.items) * copies, "files": files, "bad": bad}
        write_file(recipe.shard_folder, unit.record, json.dumps(record).encode())
        return record

    def _pictures(self, unit: Unit, copies: int, good: list[Item], bad: list[dict[str, Any]]) -> Iterator[Picture]:
        """Image and label picture of each copy of each usable item; `good` and `bad` fill up on the way."""
        recipe = self._job.recipe
        task = _tasks(recipe)[unit.task]
        for item in unit.items:
            seed = (recipe.seed, stable_hash(unit.task, unit.split, item.id))
            try:
                sample = task.load(item, unit.split)
                pairs = [task.see(sample, copy, seed, recipe.size).pictures for copy in range(copies)]
            except BadItem as error:
                place = {"split": unit.split, "task": unit.task, "item": item.id, "paths": list(item.paths)}
                bad.append({**place, "reason": str(error)})
                continue
            good.append(item)
            for pair in pairs:
                yield from pair


def encode(tokenizer: Tokenizer, pictures: Iterable[Picture], image_tokens: int) -> Tokens:
    """Pictures to tokens uint16 [P, N], in batches of one fixed size: the last one is filled up and cut again."""
    stream = iter(pictures)
    parts = [np.zeros((0, image_tokens), np.uint16)]
    while chunk := list(islice(stream, ENCODED_AT_ONCE)):
        padded = chunk + [chunk[-1]] * (ENCODED_AT_ONCE - len(chunk))
        parts.append(tokenizer.encode(np.stack(padded))[: len(chunk)])
    return np.concatenate(parts)


class _Progress:
    """Moves the bar by finished units: pairs done, items set aside."""

    def __init__(self, bar: Bar, done: int, records: dict[str, dict[str, Any]]) -> None:
        self._bar = bar
        self._done = done
        self._bad = sum(len(record["bad"]) for record in records.values())
        self._show()

    def add(self, record: dict[str, Any]) -> None:
        self._done += record["pairs"]
        self._bad += len(record["bad"])
        self._show()

    def _show(self) -> None:
        self._bar.set(self._done, note=f"{self._bad} items set aside" if self._bad else "")


def _run(job: Job, units: list[Unit], tokenizer: Tokenizer) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do the units, in any order: each one's record name and record as it is finished."""
    actors = min(_actors(job.recipe), len(units))
    if actors <= 1:
        here = UnitTokenizer(job, tokenizer)
        for unit in units:
            yield unit.record, here.work(unit)
        return
    left = {unit.record: unit for unit in units}
    for _ in range(RESTARTS):
        with _survived_actor_death():
            for name, record in _run_on_ray(job, list(left.values()), actors):
                del left[name]
                yield name, record
            return
    yield from _run_on_ray(job, list(left.values()), actors)


def _run_on_ray(job: Job, units: list[Unit], actors: int) -> Iterator[tuple[str, dict[str, Any]]]:
    from lvm_ray import ray_session

    ray_session.start(job.recipe)
    import ray
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    # One CPU stays free for Ray Data's own tasks.
    actors = max(1, min(actors, int(ray.cluster_resources().get("CPU", 2)) - 1))  # type: ignore[no-untyped-call]
    packed = ray.data.from_items([{"unit": _pack(unit)} for unit in units], override_num_blocks=len(units))
    with warnings.catch_warnings(action="ignore", category=RayDeprecationWarning):  # of max_restarts, until Ray 2.64
        records = packed.map_batches(
            UnitTokenizer,
            batch_size=1,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(job,),
            # Ray's own restarts warn on the terminal at every start, so a dead actor ends the stream and a new one goes on.
            max_restarts=0,
        )
    for row in records.iter_rows():
        yield row["name"], json.loads(row["record"])


@contextmanager
def _survived_actor_death() -> Iterator[None]:
    """Swallows the death of a process or its machine, and nothing that the code in it raises."""
    import ray.exceptions

    with suppress(ray.exceptions.RayActorError):
        yield


def _actors(recipe: Recipe) -> int:
    """Actors that use the recipe's workers x threads, one thread each: reading and drawing is Python, which has no more."""
    if not recipe.compute.workers:
        return 0
    return recipe.compute.workers * (recipe.compute.threads or max(1, (os.cpu_count() or 1) // recipe.compute.workers))


def _finished(folder: str, settings: str) -> Manifest | None:
    """The manifest of a finished data set of the same settings whose files are all there."""
    filesystem, root = open_folder(folder)
    try:
        manifest = read_manifest(folder)
    except UserError:
        return None
    found = filesystem.get_file_info([f"{root}/{path}" for path in manifest.files])
    whole = all(info.type == pyarrow.fs.FileType.File for info in found)
    return manifest if manifest.settings == settings and whole else None


def _clear(folder: str, settings: str) -> dict[str, dict[str, Any]]:
    """Remove what other settings left in the folder. The records of units that these settings have finished."""
    filesystem, root = open_folder(folder)
    stale: set[str] = set()
    with suppress(UserError):  # no manifest, or one that says nothing about files
        stale |= set(read_manifest(folder).files)
    if filesystem.get_file_info(f"{root}/manifest.json").type == pyarrow.fs.FileType.File:
        filesystem.delete_file(f"{root}/manifest.json")  # first: from here on this is no data set
    kept: dict[str, dict[str, Any]] = {}
    for info in filesystem.get_file_info(pyarrow.fs.FileSelector(f"{root}/{RECORDS}", allow_not_found=True)):
        name = f"{RECORDS}/{info.base_name}"
        record = _read_record(folder, name)
        if record is not None and record["settings"] == settings and _files_are_whole(folder, record):
            kept[name] = record
        else:
            stale |= {name, *(record["files"] if record else ())}
    stale -= {path for record in kept.values() for path in record["files"]}
    # Only files that a manifest or a record of ours names: whatever else lies in the folder is not ours.
    for path in stale:
        if filesystem.get_file_info(f"{root}/{path}").type == pyarrow.fs.FileType.File:
            filesystem.delete_file(f"{root}/{path}")
    return kept


def _read_record(folder: str, name: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(read_file(folder, name) or b"")
        return record
    except ValueError:
        return None


def _files_are_whole(folder: str, record: dict[str, Any]) -> bool:
    for path, entry in record["files"].items():
        content = read_file(folder, path)
        if content is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return False
    return True


def _finish(
    recipe: Recipe,
    items: dict[str, dict[Split, list[Item]]],
    tokenizer: Tokenizer,
    settings: str,
    records: list[dict[str, Any]],
) -> Manifest:
    """Judge the items that were set aside, then write the manifest and remove the records."""
    folder = recipe.shard_folder
    bad = sorted((entry for record in records for entry in record["bad"]), key=lambda e: (e["task"], e["split"], e["item"]))
    write_file(folder, "bad_items.jsonl", "".join(json.dumps(entry) + "\n" for entry in bad).encode())
    _refuse_bad_sources(recipe, items, bad)
    files = {path: entry for record in records for path, entry in record["files"].items()}
    manifest = Manifest(
        size=recipe.size,
        patch=tokenizer.patch,
        image_tokens=recipe.image_tokens,
        tokenizer=tokenizer.hash,
        codes=tokenizer.codes,
        seed=recipe.seed,
        settings=settings,
        rows=count_rows(files),
        files=files,
        bad={task: sum(entry["task"] == task for entry in bad) for task in items},
        images_per_row={task: _tasks(recipe)[task].pictures for task in items},
    )
    write_manifest(folder, manifest)
    filesystem, root = open_folder(folder)
    filesystem.delete_dir(f"{root}/{RECORDS}")
    return manifest


def _refuse_bad_sources(recipe: Recipe, items: dict[str, dict[Split, list[Item]]], bad: list[dict[str, Any]]) -> None:
    for task, splits in items.items():
        mine = [entry for entry in bad if entry["task"] == task]
        total = sum(len(listed) for listed in splits.values())
        training = sum(entry["split"] == "train" for entry in mine)
        if mine and (training == len(splits["train"]) or len(mine) > recipe.max_bad * total):
            raise UserError(
                f"task {task}: {len(mine)} of {total} items cannot be used, for example {mine[0]['reason']}: mend or remove them "
                f"(all of them are in {recipe.shard_folder}/bad_items.jsonl), or raise max_bad, now {recipe.max_bad:g}"
            )


def _require_recipe_tokenizer(recipe: Recipe, tokenizer: Tokenizer) -> None:
    for field, found in (("patch", tokenizer.patch), ("codes", tokenizer.codes)):
        wanted = getattr(recipe.tokenizer, field)
        if found != wanted:
            raise UserError(
                f"{recipe.tokenizer_folder}: a tokenizer of {field} {found}, the recipe's tokenizer.{field} is {wanted}: "
                f"set tokenizer.{field} to {found}, or remove the folder to train another"
            )


def _count_pairs(recipe: Recipe, items: dict[str, dict[Split, list[Item]]]) -> int:
    return sum(len(listed) * _copies(recipe, task, split) for task, splits in items.items() for split, listed in splits.items())


def _count_units(recipe: Recipe, units: list[Unit]) -> int:
    return sum(len(unit.items) * _copies(recipe, unit.task, unit.split) for unit in units)


def _copies(recipe: Recipe, task: str, split: Split) -> int:
    return _tasks(recipe)[task].copies if split == "train" else 1


def _pack(unit: Unit) -> str:
    return json.dumps(asdict(unit))


def _unpack(packed: str) -> Unit:
    values = json.loads(packed)
    items = tuple(Item(item["id"], item["original"], tuple(item["paths"]), item["extra"]) for item in values["items"])
    return Unit(values["split"], values["task"], values["part"], items)


def _tasks(recipe: Recipe) -> dict[str, Task]:
    # The recipe validates its sections as the registry's tasks, and says no more than that they are sections.
    return cast("dict[str, Task]", recipe.tasks)
