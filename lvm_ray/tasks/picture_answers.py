"""Answers that are pictures: what tasks share whose label is a picture already, and those that need no more than images.

A task of `FromImages` makes its query out of the answer: it takes something away from an image (its colours, a half of it), and
the answer is the image. So any folder of images is its data, test images too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from lvm_ray.sources.base import Source
from lvm_ray.sources.folders import ImageFolder
from lvm_ray.sources.webdataset import WebdatasetTars
from lvm_ray.tasks.base import Item, MeanScored, Picture, Sample, Split, View
from lvm_ray.tasks.geometry import part_of, see_image, whole


class PictureAnswers(MeanScored):
    """One label is a picture [H, W, 3]. It is drawn as it is, and an answer is scored as it is drawn, at the picture's size."""

    ending: ClassVar[str]  # of the files that answers are saved as

    def draw(self, label: Picture, size: int) -> Picture:
        return label

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Picture:
        return pictures[0]

    def save(self, answer: Picture, sample: Sample, stem: str) -> list[str]:
        """STEM-ENDING.png, at the image's size."""
        path = Path(f"{stem}-{self.ending}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.finished(resized(answer, sample.image), sample.image)).save(path)
        return [str(path)]

    def finished(self, answer: Picture, image: Picture) -> Picture:
        """What is saved of an answer at its image's size: all of it, unless the image itself knows a part better."""
        return answer


class FromImages(PictureAnswers):
    """One label is the image; the query is what `query` leaves of it."""

    sources: ClassVar[tuple[type[Source], ...]] = (ImageFolder, WebdatasetTars)

    smallest_crop: float = Field(0.4, gt=0, le=1, description="smallest part of the image that an augmented copy shows")

    def load(self, item: Item, split: Split) -> Sample:
        image = super().load(item, split).image
        return Sample(image, image)

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        return part_of(sample.image, rng, self.smallest_crop, turn=0, hue=0)

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        seen = see_image(sample.label, view, size)
        return Sample(self.query(seen), seen)


def seen_whole(image: Picture, size: int) -> Picture:
    """All of an image at the size of answers: [size, size, 3]."""
    return see_image(image, whole(image), size)


def resized(picture: Picture, image: Picture) -> Picture:
    """A picture at an image's size, bicubic."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def mean_picture(training: Sequence[Sample]) -> Picture:
    """The mean of the training labels [size, size, 3]."""
    return np.asarray(np.mean([sample.label for sample in training], axis=0).round(), np.uint8)
