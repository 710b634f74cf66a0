"""From the plan to micro batches: one pure read, and two ways of carrying it to the training loop.

    local   `local_batches`: this process reads, without Ray
    Ray     `training_dataset` + `data_config` for Ray Train, and `worker_batches` inside each of its workers

Both hand out the same dict of arrays a micro batch:

    tokens    uint16 [B, T], T = pairs x 2 x N: image, label, image, label, ... (of other tasks picture after picture)
    task      int32 [B], index in the order of the recipe's tasks
    row       int64 [B], the row's number in the plan
    states_N  uint16 [B, S x D]: what teacher N says to each sentence, where its answers are read from a cache

A global batch is the next workers x micro_batch x accumulation rows of the plan. Workers take turns of one micro batch,
so every global batch holds the same set of rows for any number of workers, from any position.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lvm_ray.config import Recipe
from lvm_ray.data.plan import Plan, Rows, make_plan
from lvm_ray.data.sentences import sentence_length, sentences
from lvm_ray.data.shards import Shards, open_shards
from lvm_ray.data.teacher_cache import open_cache
from lvm_ray.errors import UserError

if TYPE_CHECKING:
    import ray.data
    import ray.train

Batch = dict[str, NDArray[Any]]

UNIT_TOKENS = 256 * 1024  # least work of one read: consuming a unit costs Ray Data 18 ms, whatever its size
UNIT_BYTES = 64 * 2**20  # most of one read, where teachers' answers make it larger than its tokens
MOST_UNITS = 10_000  # listing a unit costs 1 ms at every start of the workers


class Source(NamedTuple):
    """What a reader in another process opens. The plan's fingerprint tells data sets apart that replaced each other there."""

    folder: str
    plan: str
    tasks: tuple[str, ...]
    pairs: int
    seed: int
    caches: tuple[str | None, ...]


class SentenceReader:
    """Reads rows of a plan out of shards, and of teachers' answers out of `caches`, a folder or None for each teacher.

    Permutations and tables are kept, so that one reader serves a whole run.
    """

    def __init__(self, shards: Shards, tasks: tuple[str, ...], pairs: int, seed: int, caches: Sequence[str | None] = ()) -> None:
        self._shards = shards
        self._caches = {f"states_{number}": open_cache(folder) for number, folder in enumerate(caches) if folder is not None}
        self._tasks = tasks
        self._pairs = pairs
        self._seed = seed
        self._sentences: dict[tuple[str, int, int], NDArray[np.int64]] = {}

    def read(self, rows: Rows) -> Batch:
        """The rows as a batch: a pure function of the rows and the data set."""
        tokens_BT = np.empty((len(rows), self._pairs * 2 * self._shards.manifest.image_tokens), np.uint16)
        groups = np.stack([rows.task, rows.copy, rows.grouping], axis=1)
        for task, copy, grouping in np.unique(groups, axis=0).tolist():
            chosen = np.all(groups == np.array([task, copy, grouping]), axis=1)
            name = self._tasks[task]
            members = self._members(name, copy, grouping)[rows.index[chosen]]
            tokens_BT[chosen] = self._shards.tokens("train", name, copy)[members].reshape(len(members), -1)
        states = {name: cache.read(self._tasks, rows) for name, cache in self._caches.items()}
        return {"tokens": tokens_BT, "task": rows.task, "row": rows.row, **states}

    def _members(self, task: str, copy: int, grouping: int) -> NDArray[np.int64]:
        key = (task, copy, grouping)
        if key not in self._sentences:
            originals = self._shards.originals("train", task)
            length = sentence_length(self._pairs, self._shards.manifest.images_per_row[task], task)
            self._sentences[key] = sentences(len(originals), length, self._seed, task, copy, grouping, originals)
        return self._sentences[key]


def read_rows(recipe: Recipe, plan: Plan, start: int, stop: int) -> Batch:
    """Rows start..stop-1 of a plan as one batch, read in this process."""
    return _local_reader(recipe, plan).read(plan.rows(start, stop))


def _local_reader(recipe: Recipe, plan: Plan) -> SentenceReader:
    return SentenceReader(open_shards(recipe.shard_folder), plan.tasks, recipe.pairs, recipe.seed, caches_of(recipe))


def caches_of(recipe: Recipe) -> tuple[str | None, ...]:
    """Where the answers of each of a run's teachers are kept; None of those that are asked in every step."""
    return tuple(one.cache for one in recipe.teachers.values())


def accumulation(recipe: Recipe, workers: int) -> int:
    """Micro batches that each worker passes in one step.

    Raises UserError, with the numbers that would fit, where the workers cannot share the global batch evenly.
    """
    workers = max(1, workers)
    _require_even(recipe, range(workers, workers + 1))
    return recipe.train.batch // (workers * recipe.train.micro_batch)


def require_even_batch(recipe: Recipe) -> None:
    """Raises UserError, with the numbers that would fit, where any of the recipe's numbers of workers cannot share the global
    batch evenly: with [min, max] each of them may come."""
    compute = recipe.compute
    _require_even(recipe, range(max(1, compute.least_workers), max(1, compute.most_workers) + 1))


def _require_even(recipe: Recipe, counts: range) -> None:
    batch, micro_batch = recipe.train.batch, recipe.train.micro_batch
    uneven = [workers for workers in counts if batch % (workers * micro_batch)]
    if not uneven:
        return
    unit = math.lcm(*counts) * micro_batch
    batches = [size for size in (batch // unit * unit, (batch // unit + 1) * unit) if size]
    micro_batches = [size for size in range(1, batch + 1) if not any(batch % (workers * size) for workers in counts)]
    fitting = [workers for workers in range(1, batch // micro_batch + 1) if batch % (workers * micro_batch) == 0]
    choices = [
        _choice("train.batch", batches),
        _choice("train.micro_batch", _nearest(micro_batches, micro_batch)),
        _choice("compute.workers", _nearest(fitting, uneven[0])),
    ]
    of_range = f" of compute.workers {[counts[0], counts[-1]]}" if len(counts) > 1 else ""
    raise UserError(
        f"train.batch: {batch} sentences cannot be shared out evenly to {uneven[0]} {'worker' if uneven[0] == 1 else 'workers'}"
        f"{of_range} in train.micro_batch {micro_batch}: these would fit: {'; '.join(filter(None, choices))}"
    )


def _choice(field: str, values: list[int]) -> str:
    """`train.batch 8 or 16`, or nothing where no value fits."""
    return f"{field} {' or '.join(map(str, values))}" if values else ""


def _nearest(values: list[int], wanted: int, most: int = 4) -> list[int]:
    return sorted(sorted(values, key=lambda value: abs(value - wanted))[:most])


def local_batches(recipe: Recipe, plan: Plan, position: int = 0) -> Iterator[Batch]:
    """The micro batches of a single worker from a position (rows consumed) to the plan's end, without Ray."""
    accumulation(recipe, 1)
    reader = _local_reader(recipe, plan)
    for start in range(position, len(plan), recipe.train.micro_batch):
        yield reader.read(plan.rows(start, start + recipe.train.micro_batch))


def training_dataset(recipe: Recipe, position_of: Callable[[], int]) -> Callable[[], ray.data.Dataset]:
    """What Ray Train takes as `datasets={"train": ...}`.

    Train calls it at every start of its workers, in its own process, and it asks `position_of` for the rows consumed by
    the last checkpoint: after a crash the stream goes on where the weights do.
    """
    # That process may run in another directory.
    recipe = recipe.model_copy(update={"shards": _absolute(recipe.shard_folder)})

    def dataset() -> ray.data.Dataset:
        manifest = open_shards(recipe.shard_folder).manifest
        return ray_dataset(recipe, make_plan(manifest, recipe), position_of())

    return dataset


def data_config() -> ray.train.DataConfig:
    """How Ray Train must split the stream: without it, rows change places between batches."""
    import ray.train

    return ray.train.DataConfig(execution_options=_execution_options(), enable_shard_locality=False)


def ray_dataset(recipe: Recipe, plan: Plan, position: int = 0) -> ray.data.Dataset:
    """The rows of a plan from a position on, as a stream of blocks of exactly one micro batch, in order."""
    import ray.data

    states = sum(open_cache(folder).facts.state_bytes for folder in caches_of(recipe) if folder is not None)
    units = _units(plan, position, recipe.train.micro_batch, recipe.sentence_tokens, states)
    read: Any = _read_unit  # Ray's type of a batch has no room for a dict of arrays of mixed types
    source = Source(_absolute(recipe.shard_folder), plan.fingerprint, plan.tasks, recipe.pairs, recipe.seed, caches_of(recipe))
    dataset = (
        ray.data.from_items(units, override_num_blocks=len(units))
        .map_batches(read, batch_size=1, fn_args=(source,))
        # The splitter hands out whole blocks in turn: of any other size, and rows would change batches with the workers.
        .repartition(target_num_rows_per_block=recipe.train.micro_batch, strict=True)
    )
    dataset.context.execution_options = _execution_options()
    return dataset


def worker_batches(shard: ray.data.DataIterator, micro_batch: int) -> Iterator[Batch]:
    """One training worker's micro batches, out of `ray.train.get_dataset_shard("train")`."""
    for batch in shard.iter_batches(batch_size=micro_batch, batch_format="numpy", prefetch_batches=2):
        yield dict(batch)


def _absolute(folder: str) -> str:
    return folder if "://" in folder else os.path.abspath(folder)


def _execution_options() -> Any:
    from ray.data import ExecutionOptions

    return ExecutionOptions(preserve_order=True)


def _units(plan: Plan, position: int, micro_batch: int, sentence_tokens: int, state_bytes: int) -> list[dict[str, bytes]]:
    """The rest of the plan cut into reads. Each carries its rows, so that a reader needs no plan."""
    wanted = -(-UNIT_TOKENS // sentence_tokens)
    if state_bytes:
        wanted = min(wanted, max(1, UNIT_BYTES // state_bytes))
    rows = max(wanted, -(-(len(plan) - position) // MOST_UNITS))
    rows = -(-rows // micro_batch) * micro_batch  # whole micro batches: no block is glued from two units
    # A plan that is used up is one unit without rows: workers that crashed after their last step start once more.
    starts = range(position, len(plan), rows) or [position]
    return [{"rows": pack(plan.rows(start, min(start + rows, len(plan))))} for start in starts]


def _read_unit(unit: dict[str, NDArray[Any]], source: Source) -> Batch:
    """One unit as Ray Data calls it: a batch of one packed cell becomes a block of rows."""
    (packed,) = unit["rows"]
    return _reader(source).read(unpack(packed))


@lru_cache(maxsize=2)
def _reader(source: Source) -> SentenceReader:
    # Ray keeps a worker process for many units: tables and permutations are read once in each.
    return SentenceReader(open_shards(source.folder), source.tasks, source.pairs, source.seed, source.caches)


def pack(rows: Rows) -> bytes:
    """Rows as bytes, for a cell of a table."""
    columns = (rows.row, rows.task, rows.copy, rows.grouping, rows.index)
    return np.stack([column.astype(np.int64) for column in columns]).tobytes()


def unpack(packed: bytes) -> Rows:
    row, task, copy, grouping, index = np.frombuffer(packed, np.int64).reshape(5, -1)
    return Rows(row, *(column.astype(np.int32) for column in (task, copy, grouping, index)))
