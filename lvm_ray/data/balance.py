"""Balancing tasks of different sizes: a strategy is two numbers a task, its share of the rows and its distinct copies.

    none     shares as the pairs fall, originals alone
    repeat   equal shares, originals alone: small tasks are seen more often (the paper's re-sampling)
    augment  equal shares over augmented copies: small tasks are seen in more versions (the paper's augmentation)

Pure functions of the recipe's `balance` section and the manifest's row counts. Steps and tokens of a run are the
recipe's: a strategy divides them and never adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lvm_ray.config import BalanceSection, Recipe
from lvm_ray.data.sentences import sentence_count, sentence_length
from lvm_ray.data.shards import Manifest
from lvm_ray.errors import UserError

Rows = Mapping[str, Mapping[int, int]]  # {task: {copy: training pairs}}


@dataclass(frozen=True)
class Share:
    """A task's part in the plan.

    share   part of the plan's rows, the tasks' sum to 1
    copies  distinct versions of each original that those rows draw on; a fraction admits a part of the next copy
    """

    share: float
    copies: float


def strategy(balance: BalanceSection, rows: Rows) -> dict[str, Share]:
    """Every task's share and copies, in the order of `rows`.

    Raises UserError where a task has no pairs, where more copies are asked for than were tokenised, or where the recipe
    sets shares for some tasks only or none above 0.
    """
    for task, copies in rows.items():
        if not copies.get(0):
            raise UserError(f"task {task}: no training pairs among the shards: give it images, or remove it from the recipe")
    return {task: Share(share, _copies(balance, task, len(rows[task]))) for task, share in _shares(balance, rows).items()}


def training_rows(manifest: Manifest, recipe: Recipe) -> dict[str, dict[int, int]]:
    """Pairs by copy of each of the recipe's tasks. Raises UserError naming a task that was not tokenised."""
    rows = manifest.rows.get("train", {})
    missing = [task for task in recipe.tasks if task not in rows]
    if missing:
        raise UserError(f"{recipe.shard_folder}: holds no training pairs of task {missing[0]}: run lvm-ray tokenize")
    return {task: rows[task] for task in recipe.tasks}


def balance_table(manifest: Manifest, recipe: Recipe) -> list[dict[str, Any]]:
    """What the strategy does, one row a task, as plain values for the printed table, the report and JSON.

    pairs         training pairs, that is originals with their labels
    copies        distinct versions of each that the plan draws on
    tokens        tokens of those versions
    share_before  the task's part of all pairs
    share_after   its part of the plan's rows
    rows          sentences of the plan that are the task's
    seen          how often the run shows each original, in any version
    epochs        how often it shows each version
    """
    rows = training_rows(manifest, recipe)
    shares = strategy(recipe.balance, rows)
    total = sum(copies[0] for copies in rows.values())
    return [_table_row(task, rows[task][0], total, shares[task], manifest, recipe) for task in rows]


def _table_row(task: str, pairs: int, total: int, share: Share, manifest: Manifest, recipe: Recipe) -> dict[str, Any]:
    planned = share.share * recipe.train.steps * recipe.train.batch
    pictures = manifest.images_per_row[task]
    length = sentence_length(recipe.pairs, pictures, task)
    return {
        "task": task,
        "pairs": pairs,
        "copies": share.copies,
        "tokens": round(pairs * share.copies * pictures * manifest.image_tokens),
        "share_before": pairs / total,
        "share_after": share.share,
        "rows": round(planned),
        "seen": planned * length / pairs,
        "epochs": planned / (sentence_count(pairs, length) * share.copies),
    }


def _shares(balance: BalanceSection, rows: Rows) -> dict[str, float]:
    if balance.shares:
        missing = [task for task in rows if task not in balance.shares]
        if missing:
            raise UserError(f"balance.shares: names no share for {missing[0]}: give every task one, 0 leaves it out")
        weights = {task: balance.shares[task] for task in rows}
        wrong = [task for task, weight in weights.items() if weight < 0]
        if wrong:
            raise UserError(f"balance.shares.{wrong[0]}: found {weights[wrong[0]]}: a share is 0 or more")
    elif balance.strategy == "none":
        weights = {task: float(copies[0]) for task, copies in rows.items()}
    else:
        weights = dict.fromkeys(rows, 1.0)
    total = sum(weights.values())
    if total <= 0:
        raise UserError("balance.shares: every share is 0: give at least one task more")
    return {task: weight / total for task, weight in weights.items()}


def _copies(balance: BalanceSection, task: str, tokenised: int) -> float:
    if balance.strategy != "augment":
        return 1.0
    copies = balance.ratios.get(task, float(tokenised))
    if not copies >= 1:
        raise UserError(f"balance.ratios.{task}: found {copies}: a ratio is 1 (the originals alone) or more")
    if copies > tokenised:
        raise UserError(
            f"balance.ratios.{task}: found {copies:g}, but {tokenised} copies were tokenised: "
            f"set tasks.{task}.copies to {-(-copies // 1):g} and run lvm-ray tokenize, or lower the ratio"
        )
    return copies
