"""Detection of one object: its box as a filled rectangle on a background, as Bar et al. 2022 have it.

Data: a folder of images and a folder of masks, COCO instances, or VOC's images of a single object; of several objects the largest
is meant. Score: `box_iou`, the IoU of the true box and the bounding rectangle of the answer's foreground, the mean over items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lvm_ray.errors import BadItem
from lvm_ray.sources.base import Source
from lvm_ray.sources.coco import CocoInstances
from lvm_ray.sources.folders import MaskFolders
from lvm_ray.sources.voc import VocBoxes
from lvm_ray.tasks.base import Item, MeanScored, Picture, Sample, Split, TrivialAnswer, View
from lvm_ray.tasks.colours import BACKGROUNDS, Background, distances
from lvm_ray.tasks.geometry import crop_that_keeps, random_tint, see_image, see_points, unsee_points, whole
from lvm_ray.tasks.regions import paint

Outline = NDArray[np.float64]  # [K, 2]: the corners of the outermost pixels of every row of an object
Box = NDArray[np.float64]  # left, top, right, bottom: pixel edges


class Detect(MeanScored):
    """One label is the object's outline, so that the box of a turned object is its own; an answer is a box, or None."""

    name: ClassVar[str] = "detect"
    sources: ClassVar[tuple[type[Source], ...]] = (MaskFolders, CocoInstances, VocBoxes)
    metrics: ClassVar[dict[str, bool]] = {"box_iou": True}
    meaning: ClassVar[tuple[str, ...]] = ("ignore",)

    background_colour: Background = Field(
        "black", description="colour of what is no object: black, white or grey; the box is white, on white black"
    )
    ignore: int = Field(255, ge=1, le=255, description="id of a mask's pixels that are neither object nor background, which is 0")
    most_covered: float = Field(
        1.0, gt=0, le=1, description="part of the image that a box covers at most; larger ones are set aside; Bar et al.: 0.5"
    )
    smallest_crop: float = Field(
        0.4, gt=0, le=1, description="smallest part of the image that an augmented copy shows; the object is always in it"
    )
    turn: float = Field(10.0, ge=0, le=180, description="degrees by which an augmented copy is turned at most, to either side")
    hue: float = Field(20.0, ge=0, le=180, description="degrees by which a copy's hues are turned at most; 0 keeps all colours")

    def load(self, item: Item, split: Split) -> Sample:
        sample = super().load(item, split)
        height, width = sample.image.shape[:2]
        if self.source_of(split).label == "regions":
            largest = max(sample.label, key=lambda region: region.area)
            mask = paint([largest], height, width, lambda rank, region: 1)
        else:
            mask = self._largest(sample.label, item)
        points = outline(mask)
        part = area(bounds(points)) / (height * width)
        if part > self.most_covered:
            raise BadItem(f"{item.paths[-1]}: {item.original}: the box covers {part:.2f} of the image, more than most_covered")
        return Sample(sample.image, points)

    def _largest(self, ids: NDArray[np.uint8], item: Item) -> NDArray[np.uint8]:
        """The mask of the id with most pixels."""
        counts = np.bincount(ids.ravel(), minlength=256)
        counts[[0, self.ignore]] = 0
        if not counts.any():
            raise BadItem(f"{item.paths[-1]}: no object in this mask")
        return np.asarray(ids == counts.argmax(), np.uint8)

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        view = whole(sample.image)
        if rng is None:
            return view
        view = crop_that_keeps(sample.label, view, rng, self.smallest_crop, self.turn)
        return random_tint(view, rng, self.hue) if self.hue else view

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        return Sample(see_image(sample.image, view, size), see_points(sample.label, view, size))

    def draw(self, label: Outline, size: int) -> Picture:
        """At whole pixels, and at least one of them."""
        background, foreground = self._colours()
        picture = np.full((size, size, 3), background, np.uint8)
        left, top, right, bottom = bounds(label).round().astype(int).clip(0, size).tolist()
        left, top = min(left, size - 1), min(top, size - 1)
        picture[top : max(bottom, top + 1), left : max(right, left + 1)] = foreground
        return picture

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Box | None:
        mask = distances(pictures[0], self._colours()).argmin(-1).astype(np.uint8)
        return bounds(unsee_points(outline(mask), views[0], len(mask))) if mask.any() else None

    def measure(self, answer: Box | None, sample: Sample) -> dict[str, Any]:
        return {"box_iou": 0.0 if answer is None else box_iou(answer, bounds(sample.label))}

    def shows_nothing(self, answer: Box | None) -> bool:
        return answer is None

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """The whole image, and the training boxes' mean."""
        mean = np.mean([bounds(sample.label) for sample in training], axis=0).reshape(2, 2)

        def mean_box(sample: Sample) -> Box:
            return bounds(unsee_points(mean, whole(sample.image), size))

        return [
            TrivialAnswer("whole image", lambda sample: np.array(whole(sample.image).box)),
            TrivialAnswer("mean box", mean_box),
        ]

    def save(self, answer: Box | None, sample: Sample, stem: str) -> list[str]:
        """STEM-box.json: COCO results, with one entry or, where nothing was found, none."""
        path = Path(f"{stem}-box.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = []
        if answer is not None:
            left, top, right, bottom = answer.tolist()
            entries = [{"image_id": path.stem, "category_id": 1, "bbox": [left, top, right - left, bottom - top], "score": 1.0}]
        path.write_text(json.dumps(entries, indent=1))
        return [str(path)]

    def _colours(self) -> NDArray[np.uint8]:
        background = BACKGROUNDS[self.background_colour]
        return np.array([background, BACKGROUNDS["black" if self.background_colour == "white" else "white"]], np.uint8)


def outline(mask: NDArray[np.uint8]) -> Outline:
    """The corners of the first and the last pixel of every row of a mask [H, W] that holds any: all that decides its box under
    any turn."""
    rows = np.flatnonzero(mask.any(axis=1))
    left = mask[rows].astype(bool).argmax(axis=1)
    right = mask.shape[1] - mask[rows, ::-1].astype(bool).argmax(axis=1)
    return np.concatenate([np.stack([x, y], axis=-1) for x in (left, right) for y in (rows, rows + 1)]).astype(np.float64)


def bounds(points: Outline) -> Box:
    """The bounding box of points [K, 2]."""
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def area(box: Box) -> float:
    """The area of a box; 0 of one that is turned inside out."""
    width, height = np.maximum(box[2:] - box[:2], 0)
    return float(width * height)


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    shared = area(np.concatenate([np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])]))
    return shared / max(area(one) + area(other) - shared, 1e-12)
