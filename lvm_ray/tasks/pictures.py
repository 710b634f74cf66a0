"""Pictures: any task whose label is a picture already (depth, edges, colours, styles): an image in, its picture out.

Data: a folder of images and a folder of pictures of the same names. Scores: `psnr` over RGB at native size, and `mae`, the mean
absolute error in grey levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from lvm_ray.sources.base import Source
from lvm_ray.sources.folders import PictureFolders
from lvm_ray.tasks.base import Picture, Sample, TrivialAnswer, View
from lvm_ray.tasks.geometry import part_of, see_image
from lvm_ray.tasks.picture_answers import PictureAnswers, mean_picture, resized
from lvm_ray.tasks.quality import psnr


class Pictures(PictureAnswers):
    """One label is a picture [H, W, 3] of its image's size. Its colours are never changed: they may mean something."""

    name: ClassVar[str] = "pictures"
    sources: ClassVar[tuple[type[Source], ...]] = (PictureFolders,)
    metrics: ClassVar[dict[str, bool]] = {"psnr": True, "mae": False}
    ending: ClassVar[str] = "picture"

    smallest_crop: float = Field(0.4, gt=0, le=1, description="smallest part of the image that an augmented copy shows")
    turn: float = Field(10.0, ge=0, le=180, description="degrees by which an augmented copy is turned at most, to either side")

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        return part_of(sample.image, rng, self.smallest_crop, self.turn, hue=0)

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        return Sample(see_image(sample.image, view, size), see_image(sample.label, view, size))

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Picture:
        return resized(pictures[0], sample.image)

    def measure(self, answer: Picture, sample: Sample) -> dict[str, Any]:
        error = np.abs(answer.astype(np.float64) - sample.label)
        return {"psnr": psnr(answer, sample.label), "mae": float(error.mean())}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """The mean training picture."""
        mean = mean_picture(training)
        return [TrivialAnswer("mean picture", lambda sample: resized(mean, sample.image))]
