"""Training a reference network: on the views that the shards hold, for so many core-seconds and no longer.

The views are those of the token shards before they became tokens: the same pairs, in the same copies, through the same views.
They are made before the clock starts, as the shards were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvm_ray.config import Recipe
from lvm_ray.data.balance import admitted, strategy, training_rows
from lvm_ray.data.sentences import sentence_count, sentence_length, sentences
from lvm_ray.data.shards import Shards
from lvm_ray.errors import BadItem, UserError
from lvm_ray.reference.heads import Head
from lvm_ray.reference.networks import UNet
from lvm_ray.seeds import stable_hash
from lvm_ray.tasks.base import PairTask

MOST_BYTES = 1 << 30  # of views in memory: where there are more, copies are left out first, then pairs
BATCH = 16
WIDTHS = ((60, 8), (600, 16), (math.inf, 32))  # (core-seconds, width): of a budget below; the narrow one learns more in 25
WARMUP = 0.05  # part of the budget over which the rate rises
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
CLIP = 1.0

Report = Callable[[float], None]


@dataclass(frozen=True)
class Views:
    """What a network learns from: pictures uint8 [V, S, S, 3], their targets [V, ...], and of how many pairs they are."""

    pictures: NDArray[np.uint8]
    targets: NDArray[Any]
    pairs: int


@dataclass(frozen=True)
class Trained:
    """A network, its steps, and the core-seconds that they took."""

    network: UNet
    steps: int
    seconds: float


def drawn_on(recipe: Recipe, shards: Shards, task: str) -> dict[str, int]:
    """The training pairs of a task that the recipe's plan draws on: {id: its copies}, as the strategy admits them."""
    manifest = shards.manifest
    share = strategy(recipe.balance, training_rows(manifest, recipe), manifest.images_per_row)[task]
    ids, originals = shards.rows("train", task, 0)[0], shards.originals("train", task)
    whole = int(share.copies + 1e-9)
    copies = dict.fromkeys(ids, whole)
    length = sentence_length(recipe.pairs, manifest.images_per_row[task], task)
    count = sentence_count(len(ids), length)
    rest = admitted(count, share.copies) - whole * count
    if rest > 0:  # a part of the next copy: the first of its sentences
        members_RP = sentences(len(ids), length, recipe.seed, task, whole, 0, originals)[:rest]
        for place in np.unique(members_RP).tolist():
            copies[ids[place]] += 1
    return {name: number for name, number in copies.items() if number}


def make_views(recipe: Recipe, name: str, head: Head, copies: Mapping[str, int], most_bytes: int = MOST_BYTES) -> Views:
    """The views of the pairs of a task that `copies` names, of each so many. Raises UserError where none can be read."""
    task = recipe.tasks[name]
    assert isinstance(task, PairTask)
    copies = _thinned(copies, max(1, most_bytes // (6 * recipe.size**2)))
    pictures, targets, pairs = [], [], 0
    for item in task.items("train"):
        if item.id not in copies:
            continue
        try:
            sample = task.load(item, "train")
            seed = (recipe.seed, stable_hash(name, "train", item.id))  # as of the pair in the shards
            seen = [task.version(sample, copy, seed, recipe.size)[0] for copy in range(copies[item.id])]
        except BadItem:
            continue  # as tokenizing has set it aside
        pictures += [part.image for part in seen]
        targets += [head.target(part, recipe.size) for part in seen]
        pairs += 1
    if not pictures:
        raise UserError(f"tasks.{name}.train: none of its images can be read, which a reference network learns from")
    return Views(np.stack(pictures), np.stack(targets), pairs)


def _thinned(copies: Mapping[str, int], most: int) -> dict[str, int]:
    """At most so many views: fewer copies of each pair; where even one is too many, pairs spread evenly over all."""
    if sum(copies.values()) <= most:
        return dict(copies)
    names = list(copies)
    kept = np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)).tolist()
    each = max(1, most // len(names))
    return {names[place]: min(copies[names[place]], each) for place in kept}


def fit(head: Head, views: Views, seconds: float, rate: float, seed: int, report: Report = lambda spent: None) -> Trained:
    """A network trained with AdamW for so many core-seconds of this process: the rate rises to `rate`, then falls as a cosine of
    the part of the budget that is spent. `report` hears what is. Ends within a step of the budget; needs no number of steps."""
    began, spent, steps = time.process_time(), 0.0, 0
    torch.manual_seed(seed)
    network = UNet(head.channels, width_of(seconds)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    order, rng = np.zeros(0, np.int64), np.random.default_rng(seed)
    while spent < seconds:
        while len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(len(views.pictures))])
        chosen, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_part(spent / seconds)
        pixels_B3SS = pixels_of(views.pictures[chosen])
        loss = head.loss(network(pixels_B3SS), pixels_B3SS, torch.from_numpy(views.targets[chosen]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        steps, spent = steps + 1, time.process_time() - began
        report(spent)
    return Trained(network, steps, spent)


def width_of(seconds: float) -> int:
    """How wide a network may be for so short a training."""
    return next(width for most, width in WIDTHS if seconds < most)


def rate_part(spent: float) -> float:
    """The rate as a part of its peak, when this part of the budget is spent."""
    return min(1.0, (spent + 0.1 * WARMUP) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))


def pixels_of(pictures_BSS3: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in -1..1."""
    return torch.from_numpy(pictures_BSS3).permute(0, 3, 1, 2).float() / 127.5 - 1
