"""The plan: the order of sentences for a whole run.

A pure function of the manifest, the strategy, the seeds and the batch, whoever reads it with however many workers. The
position in it is one number, the rows consumed. More steps make the plan longer and change nothing that came before.

- Every global batch holds, of each task, the floor or the ceiling of share x batch; the tasks furthest behind their
  share get the leftovers, so the shares of the whole run are exact to one sentence.
- A task's sentences come in epochs: each admitted sentence once, in a new order. Epoch e uses grouping e mod G. A copy that is
  admitted in part keeps to grouping 0, so that its pairs are the same in every epoch.
- Rows are shuffled inside their batch.
- With a schedule each part of the steps has shares of its own; a plan is that of its earlier parts as far as they go.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm_ray.config import Recipe
from lvm_ray.data.balance import Share, admitted, scheduled, strategy, training_rows
from lvm_ray.data.sentences import sentence_count, sentence_length
from lvm_ray.data.shards import Manifest
from lvm_ray.errors import UserError
from lvm_ray.seeds import stable_hash


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a plan as columns [R]: the row's number and the sentence's name. `task` indexes the recipe's tasks."""

    row: NDArray[np.int64]
    task: NDArray[np.int32]
    copy: NDArray[np.int32]
    grouping: NDArray[np.int32]
    index: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.row)

    def cut(self, start: int, stop: int) -> Rows:
        """Rows start..stop-1 of these, without a copy."""
        part = slice(start, stop)
        return Rows(self.row[part], self.task[part], self.copy[part], self.grouping[part], self.index[part])


@dataclass(frozen=True)
class Plan:
    """All rows of a run.

    tasks        names, in the recipe's order: what `task` indexes
    batch        rows of a global batch
    fingerprint  sixteen hex digits: plans of the same fingerprint agree on every row that both have
    columns      the whole plan's columns
    """

    tasks: tuple[str, ...]
    batch: int
    fingerprint: str
    columns: Rows

    def __len__(self) -> int:
        return len(self.columns)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start..stop-1."""
        return self.columns.cut(start, stop)


def make_plan(manifest: Manifest, recipe: Recipe, shares: Mapping[str, Share] | None = None) -> Plan:
    """The plan of a recipe's training over a data set. `shares` defaults to the recipe's own strategy.

    Raises UserError where the strategy cannot be had from these shards, and where their pictures are not the recipe's.
    """
    _require_same_pictures(manifest, recipe)
    pairs = training_rows(manifest, recipe)
    stages = stages_of(recipe) if shares is None else []
    shares = strategy(recipe.balance, pairs, manifest.images_per_row) if shares is None else shares
    tasks = tuple(recipe.tasks)
    steps, batch, groupings = recipe.train.steps, recipe.train.batch, recipe.balance.groupings
    seed = recipe.training_seed
    even = [(0, [shares[task].share for task in tasks])]
    ends = [*(start for start, _ in stages[1:]), steps]
    counts_ST = np.concatenate(
        [batch_counts(parts, end - start, batch) for (start, parts), end in zip(stages or even, ends, strict=True)]
    )

    # First in the order of (batch, task), then shuffled inside each batch.
    task_R = np.repeat(np.tile(np.arange(len(tasks), dtype=np.int32), steps), counts_ST.ravel())
    columns = np.zeros((3, len(task_R)), np.int32)
    for number, task in enumerate(tasks):
        length = sentence_length(recipe.pairs, manifest.images_per_row[task], task)
        sentences_of_copy = sentence_count(pairs[task][0], length)
        total = int(counts_ST[:, number].sum())
        columns[:, task_R == number] = _stream(task, sentences_of_copy, shares[task].copies, groupings, seed, total)
    order = _shuffled_batches(steps, batch, seed)
    copy, grouping, index = columns[:, order]
    rows = Rows(np.arange(len(order), dtype=np.int64), task_R[order], copy, grouping, index)
    return Plan(tasks, batch, _fingerprint(manifest, shares, stages, recipe), rows)


def stages_of(recipe: Recipe) -> list[tuple[int, list[float]]]:
    """(first step, shares of the recipe's tasks) of each part of a schedule that has steps; [] where shares never change.

    Up to a part's first step the plan is that of any schedule that begins alike.
    """
    parts = scheduled(recipe.balance, list(recipe.tasks))
    by_step = {round(start * recipe.train.steps): [shares[task] for task in recipe.tasks] for start, shares in parts}
    return sorted((step, shares) for step, shares in by_step.items() if step < recipe.train.steps)


def batch_counts(shares: Sequence[float], steps: int, batch: int) -> NDArray[np.int64]:
    """Rows of each task in each global batch: int64 [steps, tasks]; every row sums to `batch`."""
    wanted = np.asarray(shares) * batch
    # A share of 1/3 of 3 rows is one row, whatever the last bit says.
    whole = np.floor(wanted + 1e-9).astype(np.int64)
    part = np.clip(wanted - whole, 0, 1)
    leftover = batch - int(whole.sum())
    counts = np.tile(whole, (steps, 1))
    if leftover == 0:
        return counts
    takers = np.flatnonzero(part > 1e-9)
    behind = np.zeros(len(takers))
    for step in range(steps):
        behind += part[takers]
        chosen = np.argsort(-behind, kind="stable")[:leftover]
        behind[chosen] -= 1
        counts[step, takers[chosen]] += 1
    return counts


def _require_same_pictures(manifest: Manifest, recipe: Recipe) -> None:
    for key, wanted, found in (("size", recipe.size, manifest.size), ("tokenizer.patch", recipe.tokenizer.patch, manifest.patch)):
        if wanted != found:
            raise UserError(
                f"{key}: found {wanted}, but the tokens in {recipe.shard_folder} are of {key} {found}: set it to {found}"
            )


def _stream(task: str, sentences: int, copies: float, groupings: int, seed: int, length: int) -> NDArray[np.int32]:
    """A task's first `length` sentences: int32 [3, length] of copy, grouping, index.

    `sentences` of each copy; all of copies 0..floor(copies)-1 and a prefix of the next one are admitted.
    """
    distinct = admitted(sentences, copies)
    epochs = -(-length // distinct)
    rng = np.random.default_rng([seed, stable_hash("epoch", task)])
    # One generator shuffles epoch after epoch, so a longer run begins with the same epochs.
    order = rng.permuted(np.tile(np.arange(distinct, dtype=np.int32), (epochs, 1)), axis=1).ravel()[:length]
    grouping = (np.arange(length) // distinct % groupings).astype(np.int32)
    grouping[order >= int(copies + 1e-9) * sentences] = 0  # the same sentences, so the same pairs, whatever the epoch
    return np.stack([order // sentences, grouping, order % sentences])


def _shuffled_batches(steps: int, batch: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng([seed, stable_hash("batch")])
    within = np.argsort(rng.random((steps, batch)), axis=1, kind="stable")
    return (within + np.arange(steps)[:, None] * batch).ravel()


def _fingerprint(manifest: Manifest, shares: Mapping[str, Share], stages: Sequence[object], recipe: Recipe) -> str:
    parts: dict[str, Any] = {
        "data": manifest.digest,
        "shares": [[task, shares[task].share, shares[task].copies] for task in recipe.tasks],
        "seed": recipe.seed,
        "batch": recipe.train.batch,
        "pairs": recipe.pairs,
        "groupings": recipe.balance.groupings,
    }
    # What a recipe does not have leaves its fingerprint as it was.
    if recipe.train.seed is not None:
        parts["train_seed"] = recipe.train.seed
    if stages:
        parts["schedule"] = stages
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
