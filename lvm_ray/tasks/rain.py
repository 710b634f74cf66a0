"""Rain for clean photos: streaks of one direction per image, several densities, lengths and depths, and a veil of haze."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from lvm_ray.tasks.base import Picture

OVERSAMPLE = 3  # streaks are drawn finer and averaged down, so that their edges are soft


def add_rain(clean: Picture, rng: np.random.Generator) -> Picture:
    """A rainy version of a clean picture [H, W, 3]: light streaks are mixed in, then contrast is veiled slightly.

    The direction, density, length, width and brightness of the streaks are drawn from `rng`.
    """
    height, width = clean.shape[:2]
    direction = math.radians(rng.uniform(-40, 40))
    density = rng.uniform(0.02, 0.06)  # streaks per pixel
    length = rng.uniform(0.12, 0.3) * min(height, width, 160)
    brightness = rng.uniform(0.4, 0.9)
    canvas = Image.new("L", (width * OVERSAMPLE, height * OVERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(density * height * width)):
        x, y = rng.uniform(-0.1, 1.1) * width, rng.uniform(-0.2, 1.0) * height
        reach = length * rng.uniform(0.5, 1.3)
        lean = direction + math.radians(rng.normal(0, 2))
        end = x + reach * math.sin(lean), y + reach * math.cos(lean)
        light = int(255 * min(1.0, brightness * rng.uniform(0.5, 1.1)))
        line = [x * OVERSAMPLE, y * OVERSAMPLE, end[0] * OVERSAMPLE, end[1] * OVERSAMPLE]
        pen.line(line, fill=light, width=int(rng.integers(2, 5)))
    streaks = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float32)[..., None] / 255
    veil = rng.uniform(0.0, 0.3)
    veiled = clean * (1 - veil) + 200 * veil
    rainy = veiled * (1 - streaks) + 235 * streaks
    return rainy.round().clip(0, 255).astype(np.uint8)
