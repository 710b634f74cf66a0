"""Objects: class-free segmentation, every object in a colour of its own on a background (the paper's SA-1B task).

Data: SA-1B tars, or COCO instances without their classes. The largest objects of an image are painted, the largest first, and
colours go by that rank, so that no colour stands for two objects and none is a sum of colours. Score: `object_iou`, of each true
object the best IoU with any object of the answer, the mean over all objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lvm_ray.sources.base import Source
from lvm_ray.sources.coco import CocoInstances
from lvm_ray.sources.sa1b import Sa1bTars
from lvm_ray.tasks.base import Item, PairTask, Picture, Sample, Split, TrivialAnswer, View
from lvm_ray.tasks.colours import BACKGROUNDS, Background, distances, palette
from lvm_ray.tasks.files import save_mask
from lvm_ray.tasks.geometry import part_of, see_image, see_mask, unsee_mask, whole
from lvm_ray.tasks.regions import paint

Mask = NDArray[np.uint8]  # [H, W]: 0 nothing, i + 1 the object of rank i by area


class Objects(PairTask):
    """One label is a mask [H, W] of the ranks of objects."""

    name: ClassVar[str] = "objects"
    sources: ClassVar[tuple[type[Source], ...]] = (Sa1bTars, CocoInstances)
    metrics: ClassVar[dict[str, bool]] = {"object_iou": True}
    meaning: ClassVar[tuple[str, ...]] = ("most",)

    most: int = Field(18, ge=1, le=60, description="objects of an image that are painted, the largest ones")
    background_colour: Background = Field("black", description="colour of what is no object: black, white or grey")
    smallest_crop: float = Field(0.4, gt=0, le=1, description="smallest part of the image that an augmented copy shows")
    turn: float = Field(10.0, ge=0, le=180, description="degrees by which an augmented copy is turned at most, to either side")
    hue: float = Field(20.0, ge=0, le=180, description="degrees by which a copy's hues are turned at most; 0 keeps all colours")

    def load(self, item: Item, split: Split) -> Sample:
        sample = super().load(item, split)
        largest = sorted(sample.label, key=lambda region: -region.area)[: self.most]
        height, width = sample.image.shape[:2]
        return Sample(sample.image, paint(largest, height, width, lambda rank, region: rank + 1))

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        return part_of(sample.image, rng, self.smallest_crop, self.turn, self.hue)

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        return Sample(see_image(sample.image, view, size), see_mask(sample.label, view, size, outside=0))

    def draw(self, label: Mask, size: int) -> Picture:
        return self._colours()[label]

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Mask:
        mask = distances(pictures[0], self._colours()).argmin(-1).astype(np.uint8)
        return _unsee(mask, views[0], sample)

    def measure(self, answer: Mask, sample: Sample) -> dict[str, Any]:
        """Of every true object the best IoU with an object of the answer."""
        count = self.most + 1
        both = np.bincount(sample.label.astype(np.int64).ravel() * count + answer.ravel(), minlength=count * count)
        overlap = both.reshape(count, count).astype(np.float64)
        union = overlap.sum(1)[1:, None] + overlap.sum(0)[None, 1:] - overlap[1:, 1:]
        best = (overlap[1:, 1:] / np.maximum(union, 1)).max(1)
        return {"best": best[overlap[1:].sum(1) > 0].tolist()}

    def shows_nothing(self, answer: Mask) -> bool:
        return not answer.any()

    def score(self, measures: Sequence[dict[str, Any]]) -> dict[str, float]:
        everything = np.arange(len(measures))[None]
        return {name: float(values[0]) for name, values in self.resampled_scores(measures, everything).items()}

    def resampled_scores(self, measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        sums, counts = np.array([sum(m["best"]) for m in measures]), np.array([len(m["best"]) for m in measures])
        return {"object_iou": sums[draws].sum(1) / np.maximum(counts[draws].sum(1), 1)}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """One object that is everything, and the most frequent rank of every pixel of the training masks."""
        masks = np.stack([sample.label for sample in training])
        frequent = np.stack([(masks == i).sum(0) for i in range(self.most + 1)]).argmax(0).astype(np.uint8)

        def usual(sample: Sample) -> Mask:
            return _unsee(frequent, whole(sample.image), sample)

        everything = TrivialAnswer("one object", lambda sample: np.ones_like(sample.label))
        return [everything, TrivialAnswer("most frequent rank", usual)]

    def save(self, answer: Mask, sample: Sample, stem: str) -> list[str]:
        """STEM-objects.png: an indexed PNG of the objects' ranks in the drawing's colours."""
        return [save_mask(answer, self._colours(), f"{stem}-objects.png")]

    def _colours(self) -> NDArray[np.uint8]:
        return np.insert(palette(self.most), 0, BACKGROUNDS[self.background_colour], axis=0)


def _unsee(mask: Mask, view: View, sample: Sample) -> Mask:
    height, width = sample.image.shape[:2]
    return unsee_mask(mask, view, height, width, outside=0)
