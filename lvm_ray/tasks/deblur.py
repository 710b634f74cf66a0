"""Deblurring: photos blurred by motion to sharp ones. With clean images alone they are blurred here (`blur.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from scipy.ndimage import gaussian_filter

from lvm_ray.sources.base import Source
from lvm_ray.sources.folders import BlurFolders, ImageFolder
from lvm_ray.sources.lmdb_pairs import PairLmdb
from lvm_ray.sources.webdataset import WebdatasetTars
from lvm_ray.tasks.base import Picture, Sample, TrivialAnswer
from lvm_ray.tasks.blur import add_motion_blur
from lvm_ray.tasks.restoration import Restoration


class Deblur(Restoration):
    """One label is the sharp photo [H, W, 3]."""

    name: ClassVar[str] = "deblur"
    sources: ClassVar[tuple[type[Source], ...]] = (BlurFolders, PairLmdb, ImageFolder, WebdatasetTars)

    def degrade(self, clean: Picture, rng: np.random.Generator) -> Picture:
        return add_motion_blur(clean, rng)

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """The query sharpened: its difference from a Gaussian blur added once more, at two scales."""

        def sharpened(deviation: float) -> TrivialAnswer:
            return TrivialAnswer(f"unsharp mask {deviation:g}", lambda sample: _unsharp(sample.image, deviation))

        return [sharpened(1), sharpened(2)]


def _unsharp(image: Picture, deviation: float) -> Picture:
    smooth = gaussian_filter(image.astype(np.float32), (deviation, deviation, 0))
    return np.asarray((2 * image - smooth).round().clip(0, 255), np.uint8)
