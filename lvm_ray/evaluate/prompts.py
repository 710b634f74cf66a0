"""Which training pairs stand before a query: a pure function of (seed, task, item), the same for every model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lvm_ray.errors import UserError
from lvm_ray.seeds import stable_hash


def choose_examples(seed: int, task: str, item: str, original: str, originals: Sequence[str], examples: int) -> list[int]:
    """The places of `examples` training pairs of different originals, none of them the item's own.

    `originals` names every training pair's original image. Raises UserError where there are too few.
    """
    rng = np.random.default_rng([seed, stable_hash(task, "examples", item)])
    chosen: list[int] = []
    taken = {original}
    for place in rng.permutation(len(originals)).tolist():
        if len(chosen) == examples:
            break
        if originals[place] not in taken:
            taken.add(originals[place])
            chosen.append(place)
    if len(chosen) < examples:
        raise UserError(
            f"tasks.{task}.train: {len(chosen)} originals can stand before {item}, and {examples} examples are wanted: "
            "add training pairs or lower evaluate.examples"
        )
    return chosen


def prompt_tokens(examples_E2N: NDArray[np.uint16], query_N: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The prompt [(2E + 1) N]: each example's image and label tokens, then the query's image tokens."""
    return np.concatenate([examples_E2N.reshape(-1), query_N])
