"""Restoration: the label picture is the clean photo itself. What deraining and deblurring share.

Data: degraded images with their clean ones (folders or LMDB), or clean images alone, which the task degrades itself (folders,
webdataset tars). Scores: `psnr_y` and `ssim_y` on the Y channel at native size; the answer is pieced together from overlapping
tiles.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from lvm_ray.errors import BadItem
from lvm_ray.section import NestedProblem
from lvm_ray.sources.base import Source
from lvm_ray.sources.folders import PairFolders
from lvm_ray.tasks.base import Item, Picture, Sample, Split, View
from lvm_ray.tasks.geometry import augmented, see_image, whole
from lvm_ray.tasks.picture_answers import PictureAnswers
from lvm_ray.tasks.quality import SSIM_WINDOW, psnr_y, ssim_y

TILE_OVERLAP = 0.25  # part of a tile's side that it shares with its neighbour


class Restoration(PictureAnswers):
    """One label is the clean image [H, W, 3]."""

    metrics: ClassVar[dict[str, bool]] = {"psnr_y": True, "ssim_y": True}
    ending: ClassVar[str] = "clean"
    measuring: ClassVar[tuple[str, ...]] = ("resized",)

    resized: int | None = Field(
        None, ge=SSIM_WINDOW, description="side of the square to which images are squeezed first; null: their own size"
    )
    smallest_crop: float = Field(0.5, gt=0, le=1, description="smallest part of a tile that an augmented copy shows")
    turn: float = Field(
        0.0, ge=0, le=180, description="degrees by which a copy is turned at most; turning resamples, which smooths what is fine"
    )
    hue: float = Field(180.0, ge=0, le=180, description="degrees by which a copy's hues are turned at most; 0 keeps all colours")

    @model_validator(mode="after")
    def _real_test(self) -> Restoration:
        split, source = ("test", self.test) if self.test is not None or not self.hold_out.get("test") else ("train", self.train)
        if isinstance(source, PairFolders):
            name, folder = source.degraded()
            if folder is None:
                raise NestedProblem(f"{split}.{name}: missing: a test set needs {name} images of its own")
        elif isinstance(source, Source) and source.label != "image":
            raise NestedProblem(f"{split}.format: {source.format} has clean images alone: a test set needs degraded ones too")
        return self

    @abstractmethod
    def degrade(self, clean: Picture, rng: np.random.Generator) -> Picture:
        """A degraded version of a clean picture, for sources of clean images alone."""

    def load(self, item: Item, split: Split) -> Sample:
        """The degraded image with its clean one; of clean images alone both are the clean one until `transform`."""
        sample = super().load(item, split)
        height, width = sample.image.shape[:2]
        if min(height, width) < SSIM_WINDOW:
            raise BadItem(f"{item.paths[0]}: {width}x{height} pixels; SSIM takes at least {SSIM_WINDOW} a side")
        image, clean = sample.image, sample.image if sample.label is None else sample.label
        if self.resized is None:
            return Sample(image, clean)
        everything = whole(image)
        return Sample(see_image(image, everything, self.resized), see_image(clean, everything, self.resized))

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        """A tile at native scale: the middle one, or for a copy any place, enlarged, mirrored, turned and tinted as allowed."""
        height, width = sample.image.shape[:2]
        if rng is None:
            left, top = (width - size) // 2, (height - size) // 2
        else:
            left, top = int(rng.integers(0, max(1, width - size + 1))), int(rng.integers(0, max(1, height - size + 1)))
        tile = View((float(left), float(top), float(left + size), float(top + size)))
        return tile if rng is None else augmented(tile, rng, self.smallest_crop, self.turn, self.hue)

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        clean = see_image(sample.label, view, size)
        dry = sample.image is sample.label or np.array_equal(sample.image, sample.label)
        return Sample(self.degrade(clean, rng) if dry else see_image(sample.image, view, size), clean)

    def questions(self, sample: Sample, size: int) -> list[View]:
        """Tiles at native scale that cover the image, each sharing a quarter of its side with the next."""
        height, width = sample.image.shape[:2]
        lefts, tops = _tile_starts(width, size), _tile_starts(height, size)
        return [View((left, top, left + size, top + size)) for top in tops for left in lefts]

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Picture:
        """The tiles laid side by side, each fading out towards its borders where it overlaps another."""
        height, width = sample.image.shape[:2]
        size = pictures[0].shape[0]
        ramp = np.minimum(np.arange(size) + 0.5, size - np.arange(size) - 0.5)
        ramp = np.minimum(ramp, TILE_OVERLAP * size)
        fade = np.outer(ramp, ramp)[..., None]
        lowest = int(min(view.box[1] for view in views)), int(min(view.box[0] for view in views))
        highest = int(max(view.box[3] for view in views)), int(max(view.box[2] for view in views))
        total = np.zeros((highest[0] - lowest[0], highest[1] - lowest[1], 3))
        weight = np.zeros((*total.shape[:2], 1))
        for picture, view in zip(pictures, views, strict=True):
            left, top = int(view.box[0]) - lowest[1], int(view.box[1]) - lowest[0]
            total[top : top + size, left : left + size] += picture * fade
            weight[top : top + size, left : left + size] += fade
        blended = (total / np.maximum(weight, 1e-9)).round().clip(0, 255).astype(np.uint8)
        return blended[-lowest[0] : height - lowest[0], -lowest[1] : width - lowest[1]]

    def measure(self, answer: Picture, sample: Sample) -> dict[str, Any]:
        return {"psnr_y": psnr_y(answer, sample.label), "ssim_y": ssim_y(answer, sample.label)}


def _tile_starts(length: int, size: int) -> list[int]:
    """Where tiles of `size` start so that they cover `length` evenly; negative where the image is smaller than a tile."""
    if length <= size:
        return [(length - size) // 2]
    count = int(np.ceil((length - size) / (size * (1 - TILE_OVERLAP)))) + 1
    return [round(i * (length - size) / (count - 1)) for i in range(count)]
