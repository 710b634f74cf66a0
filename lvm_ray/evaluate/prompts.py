"""Which training pairs stand before a query: a function of the data, the seed, the task and the item, the same for every model.

    random   pairs drawn for each item
    fixed    the same pairs for all items (another one in the place of a pair of the item's own original)
    nearest  the pairs whose images are most like the query, the nearest one last: the distance is that of the vectors of their
             codes, place by place

Several prompts of one item (votes) have pairs of different originals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lvm_ray.errors import UserError
from lvm_ray.seeds import stable_hash

# Of an item's name, its original and its image tokens the places of the examples of each prompt.
Chooser = Callable[[str, str, NDArray[np.uint16] | None], list[list[int]]]

CANDIDATES = 1024  # pairs that a query is compared with: 0.3 GB of vectors at full size


def choose_examples(
    seed: int, task: str, item: str, original: str, originals: Sequence[str], examples: int, others: Sequence[str] = ()
) -> list[int]:
    """The places of `examples` training pairs of different originals, none of them the item's own or one of `others`.

    `originals` names every training pair's original image. Raises UserError where there are too few.
    """
    rng = np.random.default_rng([seed, stable_hash(task, "examples", item)])
    chosen: list[int] = []
    taken = {original, *others}
    for place in rng.permutation(len(originals)).tolist():
        if len(chosen) == examples:
            break
        if originals[place] not in taken:
            taken.add(originals[place])
            chosen.append(place)
    if len(chosen) < examples:
        raise UserError(
            f"tasks.{task}.train: {len(chosen)} originals can stand before {item}, and {examples} examples are wanted: "
            "add training pairs, or lower evaluate.examples or evaluate.votes"
        )
    return chosen


def choose_prompts(
    choose: Literal["random", "fixed"],
    votes: int,
    seed: int,
    task: str,
    item: str,
    original: str,
    originals: Sequence[str],
    examples: int,
) -> list[list[int]]:
    """The places of the examples of each of an item's prompts, drawn."""
    name = item if choose == "random" else "fixed"
    chosen: list[list[int]] = []
    for vote in range(votes):
        shown = [originals[place] for places in chosen for place in places]
        drawn = f"{name}, vote {vote}" if vote else name
        chosen.append(choose_examples(seed, task, drawn, original, originals, examples, shown))
    return chosen


class Likeness:
    """The training pairs of a task by how much their images are like a query.

    images_PN    their image tokens, uint16
    originals    their originals
    codebook_VE  a vector for each code

    Of more than CANDIDATES pairs so many are drawn, evenly over all.
    """

    def __init__(
        self, images_PN: NDArray[np.uint16], originals: Sequence[str], codebook_VE: NDArray[np.float32], seed: int, task: str
    ) -> None:
        rng = np.random.default_rng([seed, stable_hash(task, "candidates")])
        self._places = np.sort(rng.permutation(len(images_PN))[:CANDIDATES])
        self._originals = [originals[place] for place in self._places]
        self._codebook_VE = np.asarray(codebook_VE, np.float32)
        self._vectors_PF = self._vectors(images_PN[self._places])
        self._task = task

    def choose(self, query_N: NDArray[np.uint16], original: str, examples: int, votes: int) -> list[list[int]]:
        """The places of the examples of each prompt: the nearest of all before the query of the first prompt, and so on.

        Raises UserError where there are too few pairs of different originals.
        """
        away_P = np.square(self._vectors_PF - self._vectors(query_N[None])).sum(axis=1)
        chosen: list[int] = []
        taken = {original}
        for candidate in np.argsort(away_P, kind="stable").tolist():
            if self._originals[candidate] not in taken:
                taken.add(self._originals[candidate])
                chosen.append(int(self._places[candidate]))
            if len(chosen) == examples * votes:
                return [chosen[start : start + examples][::-1] for start in range(0, len(chosen), examples)]
        raise UserError(
            f"tasks.{self._task}.train: {len(chosen)} originals can stand before a query, and {examples * votes} examples are "
            "wanted (evaluate.examples x votes): add training pairs, or lower either"
        )

    def _vectors(self, tokens_PN: NDArray[np.uint16]) -> NDArray[np.float32]:
        return self._codebook_VE[tokens_PN].reshape(len(tokens_PN), -1)


def chooser(
    choose: Literal["random", "fixed", "nearest"],
    votes: int,
    examples: int,
    seed: int,
    task: str,
    originals: Sequence[str],
    images_PN: NDArray[np.uint16],
    codebook_VE: NDArray[np.float32] | None,
) -> Chooser:
    """What gives the places of the examples of each of an item's prompts, out of training pairs with these originals and image
    tokens; `nearest` needs the codebook. Of an item whose tokens nobody has, pairs are drawn."""
    if choose != "nearest":
        return lambda item, original, query: choose_prompts(choose, votes, seed, task, item, original, originals, examples)
    assert codebook_VE is not None
    likeness = Likeness(images_PN, originals, codebook_VE, seed, task)

    def nearest(item: str, original: str, query_N: NDArray[np.uint16] | None) -> list[list[int]]:
        if query_N is None:
            return choose_prompts("random", votes, seed, task, item, original, originals, examples)
        return likeness.choose(query_N, original, examples, votes)

    return nearest


def prompt_tokens(examples_E2N: NDArray[np.uint16], query_N: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The prompt [(2E + 1) N]: each example's image and label tokens, then the query's image tokens."""
    return np.concatenate([examples_E2N.reshape(-1), query_N])
