"""Balancing tasks of different sizes: a strategy is two numbers a task, its share of the rows and its distinct copies.

    none                 shares as the pairs fall, originals alone
    repeat               equal shares, originals alone: small tasks are seen more often (the paper's re-sampling)
    downsample           equal shares of equally many originals: every task is cut to the smallest one's number of pairs
    temperature          shares ~ pairs^alpha, originals alone: alpha 0 is repeat, 1 is none
    augment              equal shares over augmented copies: small tasks are seen in more versions (the paper's augmentation)
    augment+temperature  shares ~ pairs^alpha over augmented copies

Pure functions of the recipe's `balance` section and the manifest's row counts. Steps and tokens of a run are the
recipe's: a strategy divides them and never adds to them. Beside the strategy, `balance.weights` weigh the tasks' losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvm_ray.config import Recipe, teacher_recipe
from lvm_ray.data.sentences import sentence_count, sentence_length
from lvm_ray.data.shards import PAIR, Manifest
from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import BalanceSection

Rows = Mapping[str, Mapping[int, int]]  # {task: {copy: training pairs}}


@dataclass(frozen=True)
class Share:
    """A task's part in the plan.

    share   part of the plan's rows, the tasks' sum to 1; of a schedule the mean over the steps
    copies  distinct versions of each original that those rows draw on; a fraction admits a part of the next copy, and below 1
            a part of the originals
    """

    share: float
    copies: float


def strategy(balance: BalanceSection, rows: Rows, pictures: Mapping[str, int]) -> dict[str, Share]:
    """Every task's share and copies, in the order of `rows`; of each task a row holds so many `pictures`.

    Raises UserError where a task has no pairs, where more copies are asked for than were tokenised, or where the recipe
    sets shares for some tasks only or none above 0.
    """
    for task, copies in rows.items():
        if not copies.get(0):
            raise UserError(f"task {task}: no training pairs among the shards: give it images, or remove it from the recipe")
    sizes = {task: rows[task][0] * pictures[task] / PAIR for task in rows}
    shares = _shares(balance, sizes)
    smallest = min(sizes[task] for task, share in shares.items() if share)
    if balance.strategy == "downsample":
        return {task: Share(share, min(1.0, smallest / sizes[task])) for task, share in shares.items()}
    return {task: Share(share, _copies(balance, task, len(rows[task]))) for task, share in shares.items()}


def admitted(sentences: int, copies: float) -> int:
    """Sentences of one epoch of a task with so many a copy: all of the whole copies and a prefix of the next, at least one."""
    return max(1, math.floor(sentences * copies + 1e-9))


def loss_weights(balance: BalanceSection, shares: Mapping[str, Share]) -> dict[str, float] | None:
    """Each task's weight in the loss, scaled so that the plan's rows weigh 1 in the mean; None where all weigh the same.

    Raises UserError where every task that has rows weighs 0.
    """
    weights = {task: balance.weights.get(task, 1.0) for task in shares}
    different = {weights[task] for task, share in shares.items() if share.share}
    if different == {0.0}:
        raise UserError("balance.weights: every task of the plan weighs 0: give at least one task more")
    if len(different) == 1:
        return None
    mean = sum(shares[task].share * weight for task, weight in weights.items())
    return {task: weight / mean for task, weight in weights.items()}


def training_rows(manifest: Manifest, recipe: Recipe) -> dict[str, dict[int, int]]:
    """Pairs by copy of each of the recipe's tasks. Raises UserError naming a task that was not tokenised."""
    rows = manifest.rows.get("train", {})
    missing = [task for task in recipe.tasks if task not in rows]
    if missing:
        raise UserError(f"{recipe.shard_folder}: holds no training pairs of task {missing[0]}: run lvm-ray tokenize")
    return {task: rows[task] for task in recipe.tasks}


def balance_table(manifest: Manifest, recipe: Recipe) -> list[dict[str, Any]]:
    """What the strategy does, one row a task, as plain values for the printed table, the report and JSON.

    strategy      the recipe's
    pairs         training rows: originals with their labels, or what else a row of the task holds
    copies        distinct versions of each that the plan draws on; below 1 the part of the originals
    tokens        tokens of those versions
    share_before  the task's part of all pictures
    share_after   its part of the plan's rows
    rows          sentences of the plan that are the task's
    seen          how often the run shows each original that it draws on, in any version
    epochs        how often it shows each version
    pixel_seen    how often it shows a pixel of such an original; None where the manifest does not know what copies show
    weight        of the task's loss; None where all weigh the same
    warning       one line where a training of the recipe repeats each version more than `balance.most_repeats` times, else None
    """
    rows = training_rows(manifest, recipe)
    shares = strategy(recipe.balance, rows, manifest.images_per_row)
    weights = loss_weights(recipe.balance, shares)
    total = sum(rows[task][0] * manifest.images_per_row[task] for task in rows)
    table = []
    for task, share in shares.items():
        pairs, planned = rows[task][0], share.share * _planned(recipe)
        pictures = manifest.images_per_row[task]
        length = sentence_length(recipe.pairs, pictures, task)
        seen = planned * length / (pairs * min(1.0, share.copies))
        covered = _covered(manifest, task, share.copies)
        epochs = planned / admitted(sentence_count(pairs, length), share.copies)
        table.append(
            {
                "task": task,
                "strategy": recipe.balance.strategy,
                "pairs": pairs,
                "copies": share.copies,
                "tokens": round(pairs * share.copies * pictures * manifest.image_tokens),
                "share_before": pairs * pictures / total,
                "share_after": share.share,
                "rows": round(planned),
                "seen": seen,
                "epochs": epochs,
                "pixel_seen": None if covered is None else seen * covered,
                "weight": weights[task] if weights else None,
                "warning": _warning(recipe, task, len(rows[task]), share.copies, epochs),
            }
        )
    return table


def warnings(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a balance table about tasks that are repeated too often."""
    return [row["warning"] for row in table if row["warning"]]


def _planned(recipe: Recipe) -> int:
    """Rows of a training."""
    return recipe.train.steps * recipe.train.batch


def _covered(manifest: Manifest, task: str, copies: float) -> float | None:
    """The mean part of an original's pixels that the admitted versions show; None where the manifest does not tell."""
    known = manifest.covered.get("train", {}).get(task, [])
    if len(known) < copies:  # imported tokens say nothing of it
        return None
    admitted_part = [min(1.0, max(0.0, copies - copy)) for copy in range(len(known))]
    return sum(part * weight for part, weight in zip(known, admitted_part, strict=True)) / sum(admitted_part)


def _warning(recipe: Recipe, task: str, tokenised: int, copies: float, epochs: float) -> str | None:
    """What is seen too often in the recipe's longest training, and what would help."""
    balance, name, rows = recipe.balance, "the training", _planned(recipe)
    if recipe.teacher and (longer := _planned(teacher_recipe(recipe))) > rows:
        name, rows = "the teacher's training", longer
    repeats = epochs * rows / _planned(recipe)
    if repeats <= balance.most_repeats:
        return None
    enough = math.ceil(copies * repeats / balance.most_repeats)
    if enough <= 1:
        more = "a balance.strategy that draws on all of its pairs"
    else:
        key = f"balance.ratios.{task}" if enough <= tokenised else f"tasks.{task}.copies"
        more = f"{key} of {enough}" if balance.augments else f"balance.strategy augment with {key} of {enough}"
    return (
        f"{task}: {name} shows each version {repeats:.0f} times, and beyond {balance.most_repeats:g} (balance.most_repeats) "
        f"repeats teach little: {more}, fewer steps or a smaller share would help"
    )


def _shares(balance: BalanceSection, sizes: Mapping[str, float]) -> dict[str, float]:
    if balance.schedule:
        parts = scheduled(balance, list(sizes))
        ends = [*(start for start, _ in parts[1:]), 1.0]
        spans = [(end - start, shares) for (start, shares), end in zip(parts, ends, strict=True)]
        return {task: sum(span * shares[task] for span, shares in spans) for task in sizes}
    if balance.shares:
        return _normalised("balance.shares", balance.shares, sizes)
    power = {"none": 1.0, "temperature": balance.alpha, "augment+temperature": balance.alpha}.get(balance.strategy, 0.0)
    weights = {task: size**power for task, size in sizes.items()}
    return {task: weight / sum(weights.values()) for task, weight in weights.items()}


def scheduled(balance: BalanceSection, tasks: Sequence[str]) -> list[tuple[float, dict[str, float]]]:
    """(part of the steps from which they hold, shares of all tasks) of a schedule, in order."""
    return [
        (part.start, _normalised(f"balance.schedule.{number}.shares", part.shares, tasks))
        for number, part in enumerate(balance.schedule)
    ]


def _normalised(place: str, shares: Mapping[str, float], tasks: Iterable[str]) -> dict[str, float]:
    """Shares of all tasks that sum to 1."""
    missing = [task for task in tasks if task not in shares]
    if missing:
        raise UserError(f"{place}: names no share for {missing[0]}: give every task one, 0 leaves it out")
    weights = {task: shares[task] for task in tasks}
    wrong = [task for task, weight in weights.items() if weight < 0]
    if wrong:
        raise UserError(f"{place}.{wrong[0]}: found {weights[wrong[0]]}: a share is 0 or more")
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"{place}: every share is 0: give at least one task more")
    return {task: weight / total for task, weight in weights.items()}


def _copies(balance: BalanceSection, task: str, tokenised: int) -> float:
    if not balance.augments:
        return 1.0
    copies = balance.ratios.get(task, float(tokenised))
    if not copies > 0:
        raise UserError(f"balance.ratios.{task}: found {copies}: a ratio is above 0; 1 stands for the originals alone")
    if copies > tokenised:
        raise UserError(
            f"balance.ratios.{task}: found {copies:g}, but {tokenised} copies were tokenised: "
            f"set tasks.{task}.copies to {-(-copies // 1):g} and run lvm-ray tokenize, or lower the ratio"
        )
    return copies
