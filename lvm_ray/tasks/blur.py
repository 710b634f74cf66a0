"""Motion blur for sharp photos: the mean of what a shaken camera sees while its shutter is open."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, shift

from lvm_ray.tasks.base import Picture

GAMMA = 2.2  # light adds up, pixel values do not
MOMENTS = 13  # at which the picture is taken; GoPro's pairs are the mean of 7 to 13 frames (Nah et al. 2017)


def add_motion_blur(clean: Picture, rng: np.random.Generator) -> Picture:
    """A blurred version of a sharp picture [H, W, 3]: its mean along a path of the camera drawn from `rng`.

    Paths are smooth, between 2 and 12 % of the picture's shorter side long, and centred, so that the picture stays in place.
    """
    path = shake(rng, rng.uniform(0.02, 0.12) * min(clean.shape[:2]))
    light = (clean / 255.0) ** GAMMA
    mean = np.mean([shift(light, (y, x, 0), order=1, mode="nearest") for y, x in path], axis=0)
    return np.asarray((255 * mean ** (1 / GAMMA)).round().clip(0, 255), np.uint8)


def shake(rng: np.random.Generator, length: float) -> NDArray[np.float64]:
    """A smooth random path [MOMENTS, 2] of y, x in pixels, `length` long, with its mean at 0."""
    heading = rng.uniform(0, 2 * math.pi) + np.cumsum(gaussian_filter1d(rng.normal(0, 0.8, MOMENTS), 2))
    steps = np.stack([np.sin(heading), np.cos(heading)], axis=1)
    path = np.cumsum(steps, axis=0) * (length / MOMENTS)
    return np.asarray(path - path.mean(axis=0))
