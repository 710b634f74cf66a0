"""A teacher's answers to the sentences of a plan, kept on disk: training from them runs no teacher.

    CACHE/cache.json               whose answers they are
    CACHE/head.safetensors         the teacher's head, `weight` [V, D]
    CACHE/part-{number:05d}.arrow  a row a sentence: task, copy, grouping, index (its name), state

A state is the teacher's last normed hidden state in bf16 at each of the S places that count: S x D numbers, out of which the
head makes the logits, so that every temperature and every divergence can be had. Or it is sparse (`train/sparse.py`): likely
tokens of each place alone, which is smaller where the teacher is wide. Sentences have the same names whatever the strategy, so
one cache serves a whole sweep of ratios; sentences that it lacks can be added. A part is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.ipc
from numpy.typing import NDArray

from lvm_ray.config import Recipe
from lvm_ray.data.plan import Plan, Rows
from lvm_ray.data.shards import Manifest, open_shards
from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import OneTeacherSection, most_of
from lvm_ray.storage import join, new_file, open_folder, read_file, write_file

if TYPE_CHECKING:
    import torch

FACTS, HEAD = "cache.json", "head.safetensors"
PART = re.compile(r"part-(\d{5,})\.arrow", re.ASCII)
COLUMNS = ("task", "copy", "grouping", "index")
# What a sentence's name is packed into: 63 bits.
BITS = {"task": 10, "copy": 12, "grouping": 10, "index": 31}

States = NDArray[np.uint16]  # the bits of bf16 numbers


@dataclass(frozen=True)
class Facts:
    """Whose answers a cache holds, and to what: two caches of the same facts can be used for each other.

    teacher         hash of the teacher's weights
    codebook        hash of the tokenizer
    data            digest of the shards
    pairs, seed     which decide which pairs make a sentence
    tasks           names that a part's column `task` counts
    places          S, and whether they are the labels' alone
    width           D; of sparse answers the numbers that a place takes
    sparse          what sparse answers keep
    """

    teacher: str
    codebook: str
    data: str
    pairs: int
    seed: int
    tasks: tuple[str, ...]
    places: int
    labels_only: bool
    width: int
    sparse: dict[str, int] | None = None

    def with_tasks(self, tasks: Sequence[str]) -> Facts:
        """These, with further tasks after those that parts count already."""
        return replace(self, tasks=(*self.tasks, *(task for task in tasks if task not in self.tasks)))

    @property
    def state_bytes(self) -> int:
        """Of one sentence."""
        return 2 * self.places * self.width


class TeacherCache:
    """An opened cache. Raises UserError where there is none, or a part cannot be read."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.facts = read_facts(folder)
        self._states: list[States] = []
        names, parts, rows = [], [], []
        for path in part_names(folder):
            table = _read_part(folder, path)
            columns = (np.asarray(table[name]) for name in COLUMNS)
            names.append(_packed(*columns))
            cells = table["state"].chunk(0)
            width = self.facts.places * self.facts.width
            states = np.frombuffer(cells.buffers()[1], "<u2", count=len(cells) * width, offset=cells.offset * width * 2)
            parts.append(np.full(len(table), len(self._states), np.int32))
            rows.append(np.arange(len(table), dtype=np.int64))
            self._states.append(states.reshape(len(cells), width))
        all_names = np.concatenate([*names, np.zeros(0, np.int64)])
        order = np.argsort(all_names, kind="stable")
        self._names = all_names[order]
        self._parts = np.concatenate([*parts, np.zeros(0, np.int32)])[order]
        self._rows = np.concatenate([*rows, np.zeros(0, np.int64)])[order]

    def __len__(self) -> int:
        return len(self._names)

    def lacks(self, tasks: Sequence[str], rows: Rows) -> NDArray[np.bool_]:
        """Which of a plan's rows have no answer here: bool [R]. `tasks` are the names that the rows' `task` counts."""
        return self._find(tasks, rows) < 0

    def read(self, tasks: Sequence[str], rows: Rows) -> States:
        """The states of a plan's rows: uint16 [R, S x D]. Raises UserError where one is missing."""
        places = self._find(tasks, rows)
        if (places < 0).any():
            raise UserError(self._complaint(tasks, rows, places < 0))
        states = np.empty((len(rows), self.facts.places * self.facts.width), np.uint16)
        for out, place in enumerate(places):
            states[out] = self._states[self._parts[place]][self._rows[place]]
        return states

    def require(self, facts: Facts, plan: Plan) -> None:
        """Raises UserError where the answers are of another teacher, codebook or data set, or lack a sentence of the plan."""
        require_same(self.folder, self.facts, facts)
        lacking = self.lacks(plan.tasks, plan.columns)
        if lacking.any():
            raise UserError(self._complaint(plan.tasks, plan.columns, lacking))

    def _complaint(self, tasks: Sequence[str], rows: Rows, lacking: NDArray[np.bool_]) -> str:
        first = int(np.flatnonzero(lacking)[0])
        name = f"{tasks[rows.task[first]]}, copy {rows.copy[first]}, grouping {rows.grouping[first]}, index {rows.index[first]}"
        return (
            f"{self.folder}: has no answer to {int(lacking.sum()):,} of {len(rows):,} rows of the plan, the first of sentence "
            f"({name}): run `lvm-ray cache` with this recipe, which adds what is missing"
        )

    def _find(self, tasks: Sequence[str], rows: Rows) -> NDArray[np.int64]:
        """Where each row's sentence stands among the names; -1: nowhere."""
        known = {task: number for number, task in enumerate(self.facts.tasks)}
        task = np.array([known.get(name, -1) for name in tasks], np.int64)[rows.task]
        names = np.where(task < 0, -1, _packed(np.maximum(task, 0), rows.copy, rows.grouping, rows.index))
        places = np.searchsorted(self._names, names)
        found = np.append(self._names, -2)[places] == names
        return np.where(found, places, -1)


def open_cache(folder: str) -> TeacherCache:
    """A cache, opened once in a process for as long as it holds the same parts."""
    return _opened(folder, tuple(part_names(folder)))


@lru_cache(maxsize=4)
def _opened(folder: str, parts: tuple[str, ...]) -> TeacherCache:
    return TeacherCache(folder)


def facts_of(recipe: Recipe, manifest: Manifest, one: OneTeacherSection, even: bool) -> Facts:
    """What a cache of a teacher must say to serve a single run.

    `even`: whether a task's sentences are no pairs, so that all places count. Raises UserError where the teacher has no model.
    """
    from lvm_ray.model.folder import read_shape, read_tokenizer

    folder = Path(str(one.teacher)) / "model"
    found = read_tokenizer(folder)
    labels_only = only_labels_count(recipe, even)
    return Facts(
        teacher=_hash(folder / "model.safetensors"),
        codebook=found["hash"],
        data=manifest.digest,
        pairs=recipe.pairs,
        seed=recipe.seed,
        tasks=tuple(recipe.tasks),
        places=recipe.sentence_tokens // 2 if labels_only else recipe.sentence_tokens - 1,
        labels_only=labels_only,
        width=numbers_of_a_place(one, read_shape(folder, found).width),
        sparse=one.sparse.model_dump() if one.sparse else None,
    )


def only_labels_count(recipe: Recipe, even: bool) -> bool:
    """Whether no place of an image counts in a run's loss."""
    return not most_of(recipe.train.image_weight) and not even


def numbers_of_a_place(one: OneTeacherSection, width: int) -> int:
    """Numbers of two bytes that are kept of a place: the hidden state of a model of this width, or ids and logits of likely
    tokens and a sum of four bytes."""
    return 2 * (one.sparse.top + one.sparse.tail) + 2 if one.sparse else width


def require_same(folder: str, found: Facts, wanted: Facts) -> None:
    """Raises UserError naming the first fact in which a cache is not what a run needs."""
    says = {
        "teacher": "of another teacher",
        "codebook": "of a teacher with another codebook",
        "data": "to the sentences of other shards",
        "pairs": "to sentences of another number of pairs",
        "seed": "to sentences of another seed",
        "places": "of other places of a sentence (train.image_weight is 0 in one of the two)",
        "labels_only": "of other places of a sentence (train.image_weight is 0 in one of the two)",
        "sparse": "of another form",
        "width": "of another width",
    }
    for field, text in says.items():
        have, want = getattr(found, field), getattr(wanted, field)
        if have != want:
            raise UserError(
                f"{folder}: answers {text} ({field} {have}, {want} is wanted): name another folder as distill.cache, and run "
                "`lvm-ray cache`"
            )


def read_facts(folder: str) -> Facts:
    """Raises UserError where a folder is no cache."""
    content = read_file(folder, FACTS)
    if content is None:
        raise UserError(f"{folder}: no {FACTS}, so no answers of a teacher: run `lvm-ray cache` with this recipe")
    try:
        values = json.loads(content)
        return Facts(**values | {"tasks": tuple(values["tasks"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{join(folder, FACTS)}: not readable ({error}): remove the folder and run `lvm-ray cache` again"
        ) from None


def write_facts(folder: str, facts: Facts) -> None:
    write_file(folder, FACTS, json.dumps(asdict(facts), indent=1, sort_keys=True).encode())


def save_head(folder: str, teacher: str) -> None:
    """Keep the head of a teacher's run beside its answers."""
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(Path(teacher) / "model" / "model.safetensors", "pt") as file:
        weight = file.get_tensor("lm_head.weight")
    write_file(folder, HEAD, save({"weight": weight}))


def load_head(folder: str) -> torch.Tensor:
    """The head of a cache's teacher [V, D], in the precision that it was saved in."""
    from safetensors.torch import load

    content = read_file(folder, HEAD)
    if content is None:
        raise UserError(f"{folder}: no {HEAD}: run `lvm-ray cache` with this recipe")
    return load(content)["weight"]


def part_names(folder: str) -> list[str]:
    filesystem, root = open_folder(folder)
    found = filesystem.get_file_info(pa.fs.FileSelector(root, allow_not_found=True))
    return sorted(info.base_name for info in found if PART.fullmatch(info.base_name))


def write_part(folder: str, number: int, rows: Rows, states: States) -> None:
    """Answers to sentences, by the names of a plan over the cache's own tasks: states uint16 [R, S x D]."""
    assert len(rows) == len(states) and states.dtype == np.uint16 and states.flags.c_contiguous
    columns = [pa.array(getattr(rows, name), pa.int32()) for name in COLUMNS]
    width = states.shape[1] * states.itemsize
    cells = pa.Array.from_buffers(pa.binary(width), len(states), [None, pa.py_buffer(states.astype("<u2", copy=False))])
    batch = pa.record_batch([*columns, cells], names=[*COLUMNS, "state"])
    with new_file(folder, f"part-{number:05d}.arrow") as stream, pa.ipc.new_file(stream, batch.schema) as writer:
        writer.write_batch(batch)


def unique_sentences(plan: Plan) -> Rows:
    """Every sentence that a plan names, once, in the order of its names."""
    rows = plan.columns
    _, first = np.unique(_packed(rows.task, rows.copy, rows.grouping, rows.index), return_index=True)
    return take(rows, first)


def take(rows: Rows, places: NDArray[np.int64]) -> Rows:
    return Rows(rows.row[places], rows.task[places], rows.copy[places], rows.grouping[places], rows.index[places])


def require_caches(recipe: Recipe, plan: Plan, even: bool) -> None:
    """Raises UserError where a run cannot train from one of the caches that it names."""
    manifest = open_shards(recipe.shard_folder).manifest
    for one in recipe.teachers.values():
        if one.cache is not None and one.teacher is not None:
            open_cache(one.cache).require(facts_of(recipe, manifest, one, even), plan)


def _packed(*columns: NDArray[np.int32]) -> NDArray[np.int64]:
    """Names of sentences as one number each."""
    packed = np.zeros(len(columns[0]), np.int64)
    for column, bits in zip(columns, BITS.values(), strict=True):
        assert len(column) == 0 or (column.min() >= 0 and column.max() < 2**bits)
        packed = packed << bits | column
    return packed


def _read_part(folder: str, name: str) -> pa.Table:
    filesystem, root = open_folder(folder)
    try:
        local = isinstance(filesystem, pa.fs.LocalFileSystem)
        source = pa.memory_map(f"{root}/{name}") if local else filesystem.open_input_file(f"{root}/{name}")
        return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{join(folder, name)}: cannot be read ({reason}): remove it and run `lvm-ray cache` again") from None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
