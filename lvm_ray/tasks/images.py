"""Unlabelled images: single pictures that belong to nothing, for the model to learn what images look like (the paper's LAION).

Data: folders of images, or webdataset tars. A row of tokens is one picture; a sentence is as many as fit. Not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from lvm_ray.sources.base import Source
from lvm_ray.sources.folders import ImageFolder
from lvm_ray.sources.webdataset import WebdatasetTars
from lvm_ray.tasks.base import Sample, Seen, Task
from lvm_ray.tasks.geometry import augmented, see_image, square_around


class Images(Task):
    """One item is one picture: its middle square, or of a copy a part of that."""

    name: ClassVar[str] = "images"
    sources: ClassVar[tuple[type[Source], ...]] = (ImageFolder, WebdatasetTars)
    pictures: ClassVar[int] = 1

    smallest_crop: float = Field(0.4, gt=0, le=1, description="smallest part of the middle square that an augmented copy shows")
    hue: float = Field(20.0, ge=0, le=180, description="degrees by which a copy's hues are turned at most; 0 keeps all colours")

    def see(self, sample: Sample, copy: int, seed: Sequence[int], size: int) -> Seen:
        height, width = sample.image.shape[:2]
        view = square_around(width / 2, height / 2, min(height, width))
        if copy:
            view = augmented(view, np.random.default_rng([*seed, copy]), self.smallest_crop, 0, self.hue)
        return Seen((see_image(sample.image, view, size),), view.covered(sample.image))
