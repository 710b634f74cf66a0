"""From labelled images to token shards, with every copy of a training item.

The work is cut into units (`listing.py`): some items of one (split, task) with all their copies, so that an image is read once
for all of them. A unit (`tokenize_unit.py`) writes one part per copy and then its record; a unit with a record is not done again
after a kill. When all units have records the manifest is written, and the records go.

    FOLDER/.units/{split}-{task}-{part:05d}.json    a finished unit: its files, its bad items

Items that cannot be used are set aside with their reasons in `bad_items.jsonl`, in every copy. More of them than `max_bad` allows
stop the run as soon as they are known.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow.fs

from lvm_ray.config import Recipe
from lvm_ray.data.listing import UNITS, Survey, Unit, copies_of, survey, tasks_of, units_of, write_units
from lvm_ray.data.shards import (
    PART,
    REMAINS,
    Manifest,
    count_rows,
    read_manifest,
    require_tokenised,
    write_manifest,
)
from lvm_ray.data.tokenize_unit import Job, UnitTokenizer
from lvm_ray.errors import UserError
from lvm_ray.placement import options, place_of, require, room, share
from lvm_ray.progress import Bar, say
from lvm_ray.storage import changing, file_size, join, open_folder, read_file, write_file
from lvm_ray.tasks.base import SPLITS
from lvm_ray.tokenizer import Tokenizer, load_tokenizer

RESTARTS = 2  # after actors that died
PAUSE = 5.0  # seconds in which Ray forgets an actor whose node is gone
RECORD_KEYS = {"settings", "split", "task", "versions", "covered", "files", "bad"}


def tokenize(recipe: Recipe, bar: Bar, load: Callable[[str], Tokenizer] = load_tokenizer) -> Manifest:
    """Make the recipe's shards out of its tasks' items and its tokenizer folder. Does nothing where they are finished.

    `bar` counts items times copies. `compute.workers` x threads actors of Ray work; one alone works in this process, without Ray.
    Raises UserError where a task has no training items, where a task's items are unusable (all of them, or a larger part
    than `max_bad`), and where the tokenizer is not the recipe's.
    """
    tokenizer = load(recipe.tokenizer_folder)
    _require_recipe_tokenizer(recipe, tokenizer)
    found = survey(recipe, tokenizer.hash)
    units = units_of(recipe, found.counts)
    folder, total = recipe.shard_folder, _versions(recipe, units)
    bar.total = total
    finished = _finished(folder, found.settings)
    if finished:
        bar.set(total, note="as before")
        return finished
    require_tokenised(folder)
    for remark in found.remarks:
        say(remark)
    records = _clear(folder, found.settings)
    write_units(recipe, found)
    pending = [unit for unit in units if unit.record not in records]
    progress = _Progress(bar, recipe, found, total - _versions(recipe, pending), records)
    with closing(_run(Job(recipe, load, found.settings), pending, tokenizer)) as results:
        for name, record in results:
            records[name] = record
            progress.add(record)
    return _finish(recipe, found, tokenizer, [records[unit.record] for unit in units])


class _Progress:
    """Moves the bar by finished units: versions done, items set aside. Stops the run where those are too many."""

    def __init__(self, bar: Bar, recipe: Recipe, found: Survey, done: int, records: dict[str, dict[str, Any]]) -> None:
        self._bar = bar
        self._recipe = recipe
        self._found = found
        self._done = done
        self._bad: list[dict[str, Any]] = []
        self._counts: Counter[tuple[str, str]] = Counter()  # by task and split
        self._reasons: dict[str, str] = {}  # each task's first
        for record in records.values():
            self._note(record["bad"])
        self._show()

    def add(self, record: dict[str, Any]) -> None:
        self._done += record["versions"]
        self._note(record["bad"])
        self._show()

    def _note(self, bad: list[dict[str, Any]]) -> None:
        self._bad += bad
        self._counts.update((entry["task"], entry["split"]) for entry in bad)
        for entry in bad:
            self._reasons.setdefault(entry["task"], entry["reason"])

    def _show(self) -> None:
        self._bar.bad = len(self._bad)
        self._bar.set(self._done, note=f"{len(self._bad)} items set aside" if self._bad else "")
        self._refuse_bad_sources()

    def _refuse_bad_sources(self) -> None:
        """Raises UserError, and keeps the list of bad items, where a task has more of them than `max_bad` allows."""
        folder, max_bad = self._recipe.shard_folder, self._recipe.max_bad
        for task, splits in self._found.counts.items():
            mine, total = sum(self._counts[task, split] for split in splits), sum(splits.values())
            if mine and (self._counts[task, "train"] == splits["train"] or mine > max_bad * total):
                _write_bad_items(folder, self._bad)
                raise UserError(
                    f"task {task}: {mine} of {total} items cannot be used, for example {self._reasons[task]}: mend or remove "
                    f"them (they are listed in {join(folder, 'bad_items.jsonl')}), or raise max_bad, now {max_bad:g}"
                )


def _run(job: Job, units: list[Unit], tokenizer: Tokenizer) -> Generator[tuple[str, dict[str, Any]]]:
    """Do the units, in any order: each one's record name and record as it is finished."""
    actors = min(_actors(job.recipe), len(units))
    if not actors or (actors == 1 and not place_of(job.recipe, "tokenize").chooses):
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

    place = place_of(job.recipe, "tokenize")
    places = room(require(job.recipe, "tokenize", actors, least=1), share(place))
    # One CPU stays free for Ray Data's own tasks.
    actors = max(1, min(actors, places, int(ray.cluster_resources().get("CPU", 2)) - 1))  # type: ignore[no-untyped-call]
    job = replace(job, gpu="GPU" in place.resources)
    packed = ray.data.from_items([{"unit": json.dumps(asdict(unit))} for unit in units], override_num_blocks=len(units))
    with warnings.catch_warnings(action="ignore", category=RayDeprecationWarning):  # of max_restarts, until Ray 2.64
        records = packed.map_batches(
            UnitTokenizer,
            batch_size=1,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(job,),
            # Ray's own restarts warn on the terminal at every start, so a dead actor ends the stream and a new one goes on.
            max_restarts=0,
            **options(place),
        )
    for row in records.iter_rows():
        if row["complaint"]:
            raise UserError(row["complaint"])
        yield row["name"], json.loads(row["record"])


@contextmanager
def _survived_actor_death() -> Iterator[None]:
    """Swallows the death of a process or its machine, and nothing that the code in it raises.

    Ray Data keeps an actor of its own on the node of the first command that used it, the head as a rule. When that node is lost,
    commands on others find the actor's name without a place for it, until Ray forgets it.
    """
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayActorError:
        pass
    except ray.exceptions.ActorUnschedulableError:
        time.sleep(PAUSE)


def _actors(recipe: Recipe) -> int:
    """Actors that use the recipe's workers x threads, one thread each: reading and drawing is Python, which has no more."""
    if not recipe.compute.most_workers:
        return 0
    return recipe.compute.most_workers * (recipe.compute.threads or max(1, (os.cpu_count() or 1) // recipe.compute.most_workers))


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
    """Remove what other settings or a kill left in the folder. The records of units that these settings have finished."""
    filesystem, root = open_folder(folder)
    with changing(folder):
        if file_size(join(folder, "manifest.json")) is not None:
            filesystem.delete_file(f"{root}/manifest.json")  # first: from here on this is no data set
        kept: dict[str, dict[str, Any]] = {}
        for info in filesystem.get_file_info(pyarrow.fs.FileSelector(f"{root}/{UNITS}", allow_not_found=True)):
            name = f"{UNITS}/{info.base_name}"
            record = _read_record(folder, name) if name.endswith(".json") else None
            if record is not None and record["settings"] == settings and _files_are_whole(folder, record):
                kept[name] = record
            elif info.type == pyarrow.fs.FileType.File:
                filesystem.delete_file(f"{root}/{name}")
        whole = {path for record in kept.values() for path in record["files"]}
        for path in _parts(filesystem, root):
            if path not in whole:
                filesystem.delete_file(f"{root}/{path}")
    return kept


def _parts(filesystem: pyarrow.fs.FileSystem, root: str) -> Iterator[str]:
    """The parts in a folder, and what is left of parts whose writing was killed. Whatever else lies there is not ours."""
    folders: list[str] = list(SPLITS)
    for _ in ("task", "copy"):
        folders = [path for path, kind in _listed(filesystem, root, folders) if kind == pyarrow.fs.FileType.Directory]
    for path, kind in _listed(filesystem, root, folders):
        if kind == pyarrow.fs.FileType.File and (PART.fullmatch(path) or REMAINS.fullmatch(path)):
            yield path


def _listed(filesystem: pyarrow.fs.FileSystem, root: str, folders: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(path below the root, kind) of what lies in some folders below it."""
    for folder in folders:
        for info in filesystem.get_file_info(pyarrow.fs.FileSelector(f"{root}/{folder}", allow_not_found=True)):
            with suppress(UnicodeDecodeError):  # a name of bytes that are not UTF-8 is none of ours
                yield f"{folder}/{info.base_name}", info.type


def _read_record(folder: str, name: str) -> dict[str, Any] | None:
    """A unit's record; None where the file is none, or names files that are no parts."""
    try:
        record = json.loads(read_file(folder, name) or b"")
    except ValueError:
        return None
    if not isinstance(record, dict) or not record.keys() >= RECORD_KEYS or not isinstance(record["files"], dict):
        return None
    return record if all(PART.fullmatch(path) for path in record["files"]) else None


def _files_are_whole(folder: str, record: dict[str, Any]) -> bool:
    for path, entry in record["files"].items():
        content = read_file(folder, path)
        if content is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return False
    return True


def _finish(recipe: Recipe, found: Survey, tokenizer: Tokenizer, records: list[dict[str, Any]]) -> Manifest:
    """Write the list of what was set aside and the manifest, which takes the records' file lists; then remove the records."""
    folder = recipe.shard_folder
    bad = [entry for record in records for entry in record["bad"]]
    _write_bad_items(folder, bad)
    files: dict[str, dict[str, Any]] = {}
    for record in records:
        files |= record.pop("files")
    rows, set_aside = count_rows(files), Counter(entry["task"] for entry in bad)
    manifest = Manifest(
        size=recipe.size,
        patch=tokenizer.patch,
        image_tokens=recipe.image_tokens,
        tokenizer=tokenizer.hash,
        codes=tokenizer.codes,
        seed=recipe.seed,
        settings=found.settings,
        rows=rows,
        files=files,
        bad={task: set_aside[task] for task in found.counts},
        images_per_row={task: tasks_of(recipe)[task].pictures for task in found.counts},
        covered=_covered(records, rows),
    )
    write_manifest(folder, manifest)
    filesystem, root = open_folder(folder)
    with changing(folder):
        filesystem.delete_dir(f"{root}/{UNITS}")
    return manifest


def _covered(records: list[dict[str, Any]], rows: dict[str, dict[str, dict[int, int]]]) -> dict[str, dict[str, list[float]]]:
    """Of each copy the mean part of the original's pixels that it shows, over all rows."""
    sums: dict[tuple[str, str], Any] = {}
    for record in records:
        key = record["split"], record["task"]
        sums[key] = np.add(sums.get(key, 0.0), record["covered"])
    means = {
        (split, task): [round(float(sums[split, task][copy]) / count, 4) for copy, count in copies.items()]
        for split, tasks in rows.items()
        for task, copies in tasks.items()
    }
    return {split: {task: means[split, task] for task in tasks} for split, tasks in rows.items()}


def _write_bad_items(folder: str, bad: Sequence[dict[str, Any]]) -> None:
    ordered = sorted(bad, key=lambda entry: (entry["task"], entry["split"], entry["item"]))
    write_file(folder, "bad_items.jsonl", "".join(json.dumps(entry) + "\n" for entry in ordered).encode())


def _require_recipe_tokenizer(recipe: Recipe, tokenizer: Tokenizer) -> None:
    for field, found in (("patch", tokenizer.patch), ("codes", tokenizer.codes)):
        wanted = getattr(recipe.tokenizer, field)
        if found != wanted:
            raise UserError(
                f"{recipe.tokenizer_folder}: a tokenizer of {field} {found}, the recipe's tokenizer.{field} is {wanted}: "
                f"set tokenizer.{field} to {found}, or remove the folder to train another"
            )


def _versions(recipe: Recipe, units: Sequence[Unit]) -> int:
    return sum(unit.items * copies_of(recipe, unit.task, unit.split) for unit in units)
