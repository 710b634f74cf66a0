"""Validation: a few fixed sentences of held-out pairs, scored at each checkpoint.

They are the first sentences that the pairs of the validation split make, copy 0 in grouping 0 by the data set's own seed: the
same for every recipe of the data. A task has as many as its pairs fill, and none where they do not fill one. Scoring changes
nothing that the training computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lvm_ray.config import Recipe
from lvm_ray.data.sentences import sentence_length, sentences
from lvm_ray.data.shards import Shards, open_shards
from lvm_ray.data.stream import Batch

if TYPE_CHECKING:
    from lvm_ray.train.engine import Engine

SPLIT = "validation"


class Validation:
    """A recipe's validation sentences, and their scoring by all workers together.

    even  whether each task's sentences are no pairs; None: all are pairs
    """

    def __init__(self, recipe: Recipe, even: Sequence[bool] | None = None) -> None:
        self._tasks = tuple(recipe.tasks)
        self._even = even
        self._micro_batch = recipe.train.micro_batch
        self._sentences = read_validation(recipe)

    def scores(self, engine: Engine) -> dict[str, Any]:
        """The journal's part of a validation, `validation_loss` and `validation`; empty where there are no sentences."""
        losses = self._losses(engine) if len(self._sentences["task"]) else {}
        return {"validation_loss": losses, "validation": round(sum(losses.values()) / len(losses), 6)} if losses else {}

    def _losses(self, engine: Engine) -> dict[str, float]:
        """Mean cross-entropy of each task's label tokens in nats, of tasks that have sentences. All workers call it together."""
        import torch

        task_R = self._sentences["task"]
        workers, worker = torch.distributed.get_world_size(), torch.distributed.get_rank()
        sums = torch.zeros(2, len(self._tasks), dtype=torch.float64)
        places_KWB = shared_out(len(task_R), workers, self._micro_batch)
        for place_B in places_KWB[:, worker]:
            row_B, counted_B = place_B % len(task_R), place_B < len(task_R)
            task_B = torch.from_numpy(task_R[row_B])
            tokens_BT = torch.from_numpy(self._sentences["tokens"][row_B].astype(np.int64))
            extra = {} if self._even is None else {"even_B": torch.tensor(self._even)[task_B]}
            target_B = engine.score(tokens_BT, extra).double().cpu()
            counted = torch.from_numpy(counted_B).double()
            sums.index_add_(1, task_B, torch.stack([target_B * counted, counted]))
        torch.distributed.all_reduce(sums)
        totals, counts = sums.tolist()
        scored = zip(self._tasks, totals, counts, strict=True)
        return {task: round(total / count, 6) for task, total, count in scored if count}


def read_validation(recipe: Recipe) -> Batch:
    """The sentences of all tasks, tokens uint16 [R, T] and task int64 [R], in the recipe's order of tasks; R may be 0."""
    shards = open_shards(recipe.shard_folder)
    found = [_of_task(shards, task, recipe.pairs, recipe.train.validation) for task in recipe.tasks]
    none = np.empty((0, recipe.sentence_tokens), np.uint16)
    task = np.repeat(np.arange(len(found)), [len(tokens_RT) for tokens_RT in found])
    return {"tokens": np.concatenate([none, *found]), "task": task}


def _of_task(shards: Shards, task: str, pairs: int, most: int) -> NDArray[np.uint16]:
    """A task's first sentences of its validation pairs: uint16 [R, T], R in 0..most."""
    none = np.empty((0, 2 * pairs * shards.manifest.image_tokens), np.uint16)
    if not most or not shards.manifest.rows.get(SPLIT, {}).get(task, {}).get(0):
        return none
    originals = shards.originals(SPLIT, task)
    length = sentence_length(pairs, shards.manifest.images_per_row[task], task)
    if len(set(originals)) < length:
        return none
    members_RP = sentences(len(originals), length, shards.manifest.seed, task, 0, 0, originals)[:most]
    places, member_of = np.unique(members_RP, return_inverse=True)
    _, tokens = shards.take(SPLIT, task, 0, places.tolist())
    return tokens[member_of.reshape(members_RP.shape)].reshape(len(members_RP), -1)


def shared_out(rows: int, workers: int, most: int) -> NDArray[np.int64]:
    """Places [calls, workers, batch <= most] that cover 0..rows-1 once and go on beyond: every worker makes as many calls.

    (Under ZeRO-3 a forward gathers weights from all workers.)
    """
    batch = min(most, -(-rows // workers))
    calls = -(-rows // (workers * batch))
    return np.arange(calls * workers * batch).reshape(calls, workers, batch)
