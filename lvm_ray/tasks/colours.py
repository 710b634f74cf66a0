"""Colours that stay apart after a tokenizer's round trip, and reading them back."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lvm_ray.tasks.base import Picture

Background = Literal["black", "white", "grey"]
BACKGROUNDS: dict[Background, tuple[int, int, int]] = {"black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128)}


@cache
def palette(count: int) -> NDArray[np.uint8]:
    """`count` bright RGB colours [count, 3], far from every background and each other: farthest points of a grid, one by one.

    The first ones stay the same when more are asked for, so a class keeps its colour when classes are added (up to 18).
    """
    levels = np.linspace(0, 255, 3 if count <= 18 else 6 if count <= 80 else 11).round().astype(np.int64)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    grid = grid[grid.max(1) == 255]
    assert count < len(grid), f"{count} colours from a grid of {len(grid)}"
    chosen = [np.zeros(3, dtype=np.int64), np.full(3, 255)]
    nearest = ((grid - chosen[0]) ** 2).sum(1)
    for _ in range(count):
        nearest = np.minimum(nearest, ((grid - chosen[-1]) ** 2).sum(1))
        chosen.append(grid[int(nearest.argmax())])
    return np.array(chosen[2:], dtype=np.uint8)


def distances(picture: Picture, colours: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Squared RGB distance of every pixel to every colour: [H, W, C]."""
    difference = picture[:, :, None].astype(np.float32) - colours.astype(np.float32)
    return np.asarray((difference**2).sum(-1))
