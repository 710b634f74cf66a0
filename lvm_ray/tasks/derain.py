"""Deraining: rainy photos to clean ones. With clean images alone rain is drawn on them (`rain.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from scipy.ndimage import median_filter

from lvm_ray.sources.base import Source
from lvm_ray.sources.folders import ImageFolder, RainFolders
from lvm_ray.sources.lmdb_pairs import PairLmdb
from lvm_ray.sources.webdataset import WebdatasetTars
from lvm_ray.tasks.base import Picture, Sample, TrivialAnswer
from lvm_ray.tasks.rain import add_rain
from lvm_ray.tasks.restoration import Restoration


class Derain(Restoration):
    """One label is the photo without rain [H, W, 3]."""

    name: ClassVar[str] = "derain"
    sources: ClassVar[tuple[type[Source], ...]] = (RainFolders, PairLmdb, ImageFolder, WebdatasetTars)

    def degrade(self, clean: Picture, rng: np.random.Generator) -> Picture:
        return add_rain(clean, rng)

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """The query median-filtered, 3x3 and 5x5."""

        def median(side: int) -> TrivialAnswer:
            return TrivialAnswer(f"median {side}x{side}", lambda sample: median_filter(sample.image, (side, side, 1)))

        return [median(3), median(5)]
