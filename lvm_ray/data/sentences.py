"""Visual sentences: which rows of the shards stand together.

Every sentence has 2 x `pairs` pictures. A row of the shards is the pictures that one item became, for most tasks a pair, so
a sentence takes `pairs` rows; of unlabelled images it takes twice as many, and a clip of a video is a sentence by itself.

A sentence is named (task, copy, grouping, index). What it holds follows from the pairs of its task and the seed alone,
never from ratio, strategy, workers or epoch: a sweep over strategies tokenises nothing, and a teacher's logits that are
kept by sentence serve every student.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lvm_ray.errors import UserError
from lvm_ray.seeds import stable_hash


def sentence_length(pairs: int, pictures: int, task: str) -> int:
    """Rows of `pictures` pictures that a sentence of `pairs` pairs takes.

    Raises UserError naming the task where they do not fill it exactly.
    """
    length, rest = divmod(2 * pairs, pictures)
    if rest:
        raise UserError(
            f"task {task}: a row of its tokens holds {pictures} pictures, which do not divide a sentence of {2 * pairs} "
            f"pictures: set `pairs`, now {pairs}, so that 2 x pairs is a multiple of {pictures}"
        )
    return length


def sentence_count(pairs: int, length: int) -> int:
    """Sentences of one (copy, grouping): every pair stands in at least one."""
    return -(-pairs // length)


def sentences(
    pairs: int, length: int, seed: int, task: str, copy: int, grouping: int, originals: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """The pairs of every sentence of one (task, copy, grouping): int64 [ceil(pairs / length), length] of pair indices.

    A seeded permutation of all pairs, cut; the last sentence is filled up from the permutation's start. `originals` names
    the image behind each pair where several pairs share one: pairs are then exchanged between sentences until no sentence
    holds an original twice. (An original with more pairs than there are sentences must stand twice in one.)

    Raises UserError where the task has fewer pairs, or fewer originals, than one sentence takes.
    """
    available = pairs if originals is None else len(set(originals))
    if available < length:
        kind = "pairs" if originals is None else "original images"
        raise UserError(f"task {task}: {available} training {kind}, but one sentence takes {length}: add images to the task")
    rng = np.random.default_rng([seed, stable_hash("sentence", task), copy, grouping])
    order = rng.permutation(pairs)
    rows = np.resize(order, (sentence_count(pairs, length), length))
    if originals is not None and available < pairs:
        _, group = np.unique(np.asarray(originals), return_inverse=True)
        _separate(rows, group)
    return rows


def _separate(rows: NDArray[np.int64], group: NDArray[np.int64]) -> None:
    """Exchange pairs between rows, in place, until every row's groups differ. Deterministic; few rows need it."""
    sorted_groups = np.sort(group[rows], axis=1)
    for row in np.flatnonzero((sorted_groups[:, 1:] == sorted_groups[:, :-1]).any(axis=1)):
        for column in range(1, rows.shape[1]):
            if group[rows[row, column]] in group[rows[row, :column]]:
                _exchange(rows, group, int(row), column)


def _exchange(rows: NDArray[np.int64], group: NDArray[np.int64], row: int, column: int) -> None:
    """Swap one pair with the first one, from the next row on, that leaves both rows without a new repetition."""
    mine = group[rows[row, column]]
    others = np.delete(group[rows[row]], column)
    for step in range(1, len(rows)):
        partner = (row + step) % len(rows)
        theirs = group[rows[partner]]
        for place, candidate in enumerate(theirs):
            if candidate not in others and mine not in np.delete(theirs, place):
                rows[row, column], rows[partner, place] = rows[partner, place], rows[row, column]
                return
