"""Segmentation: one colour a class on a background.

Data: a folder of images and a folder of masks of the same names (indexed, grey, in colours or binary), or COCO instances, whose
categories are matched with the classes by name. Score: `miou`, intersections
and unions pooled over the whole set, foreground classes only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lvm_ray.errors import BadItem, UserError
from lvm_ray.sources.base import Region, Source
from lvm_ray.sources.coco import CocoInstances
from lvm_ray.sources.files import printable
from lvm_ray.sources.folders import MaskFolders
from lvm_ray.tasks.base import Item, PairTask, Picture, Sample, Split, TrivialAnswer, View
from lvm_ray.tasks.colours import BACKGROUNDS, Background, distances, palette
from lvm_ray.tasks.files import save_mask
from lvm_ray.tasks.geometry import part_of, see_image, see_mask, unsee_mask, whole
from lvm_ray.tasks.regions import paint

Mask = NDArray[np.uint8]  # [H, W] class ids


class Segmentation(PairTask):
    """One label is a mask [H, W] of class ids; `ignore` marks pixels without a class, which are never scored."""

    name: ClassVar[str] = "segmentation"
    sources: ClassVar[tuple[type[Source], ...]] = (MaskFolders, CocoInstances)
    metrics: ClassVar[dict[str, bool]] = {"miou": True}
    meaning: ClassVar[tuple[str, ...]] = ("classes", "background", "ignore")

    classes: list[str] = Field(
        min_length=1, max_length=254, description="names of the foreground classes, in the order of their ids"
    )
    background: bool = Field(True, description="id 0 is background and the classes start at 1; false: they start at 0")
    background_colour: Background = Field("black", description="colour of pixels of no class: black, white or grey")
    ignore: int = Field(255, ge=0, le=255, description="id of pixels without a class")
    smallest_crop: float = Field(0.4, gt=0, le=1, description="smallest part of the image that an augmented copy shows")
    turn: float = Field(10.0, ge=0, le=180, description="degrees by which an augmented copy is turned at most, to either side")
    hue: float = Field(20.0, ge=0, le=180, description="degrees by which a copy's hues are turned at most; 0 keeps all colours")

    def items(self, split: Split) -> Iterator[Item]:
        """As of every task. Raises UserError where a class is none of the categories of its COCO file."""
        key: Split = "train" if getattr(self, split) is None and self.hold_out else split
        source = getattr(self, key)
        if isinstance(source, CocoInstances):
            _require_categories(self.classes, source, f"tasks.{self.name}.{key}")
        yield from super().items(split)

    def load(self, item: Item, split: Split) -> Sample:
        sample = super().load(item, split)
        if self.source_of(split).label == "regions":
            if any(region.category is None for region in sample.label):
                raise BadItem(f"{item.paths[-1]}: {item.original}: the category_id of an object is none of the file's categories")
            height, width = sample.image.shape[:2]
            return Sample(sample.image, paint(sample.label, height, width, self._id_of, 0 if self.background else self.ignore))
        mask = sample.label
        wrong = set(np.unique(mask).tolist()) - set(range(len(self.classes) + self.background)) - {self.ignore}
        if wrong:
            name = item.paths[-1]
            raise BadItem(f"{name}: class id {min(wrong)} is neither one of the {len(self.classes)} classes nor ignored")
        return sample

    def _id_of(self, rank: int, region: Region) -> int:
        """The class id of a region; of categories that are no class background, or where there is none the ignored id."""
        if region.category in self.classes:
            return self.classes.index(region.category) + self.background
        return 0 if self.background else self.ignore

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        return part_of(sample.image, rng, self.smallest_crop, self.turn, self.hue)

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        outside = 0 if self.background else self.ignore
        return Sample(see_image(sample.image, view, size), see_mask(sample.label, view, size, outside))

    def draw(self, label: Mask, size: int) -> Picture:
        colours = np.full((256, 3), BACKGROUNDS[self.background_colour], dtype=np.uint8)
        first = int(self.background)
        colours[first : first + len(self.classes)] = palette(len(self.classes))
        return colours[label]

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Mask:
        colours = palette(len(self.classes))
        if self.background:
            colours = np.insert(colours, 0, BACKGROUNDS[self.background_colour], axis=0)
        mask = distances(pictures[0], colours).argmin(-1).astype(np.uint8)
        height, width = sample.image.shape[:2]
        return unsee_mask(mask, views[0], height, width, outside=0)

    def measure(self, answer: Mask, sample: Sample) -> dict[str, Any]:
        """Pixels per foreground class: in both (`intersection`), in either (`union`)."""
        first = int(self.background)
        scored = sample.label != self.ignore
        truth, found = sample.label[scored].astype(int) - first, answer[scored].astype(int) - first
        intersection = np.bincount(truth[(truth == found) & (truth >= 0)], minlength=len(self.classes))
        areas = [np.bincount(ids[ids >= 0], minlength=len(self.classes)) for ids in (truth, found)]
        union = areas[0] + areas[1] - intersection
        return {"intersection": intersection.tolist(), "union": union.tolist()}

    def shows_nothing(self, answer: Mask) -> bool:
        return self.background and not answer.any()

    def score(self, measures: Sequence[dict[str, Any]]) -> dict[str, float]:
        everything = np.arange(len(measures))[None]
        return {name: float(values[0]) for name, values in self.resampled_scores(measures, everything).items()}

    def resampled_scores(self, measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        intersections = np.array([m["intersection"] for m in measures], dtype=np.float64)
        unions = np.array([m["union"] for m in measures], dtype=np.float64)
        counts = np.stack([np.bincount(row, minlength=len(measures)) for row in draws]).astype(np.float64)
        pooled = counts @ unions
        with np.errstate(invalid="ignore"):
            return {"miou": np.nanmean(np.where(pooled > 0, counts @ intersections / pooled, np.nan), axis=1)}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """All background, and the most frequent class of every pixel of the training masks."""
        masks = np.stack([sample.label for sample in training])
        ids = range(len(self.classes) + self.background)
        majority = np.stack([(masks == i).sum(0) for i in ids]).argmax(0).astype(np.uint8)

        def everywhere_background(sample: Sample) -> Mask:
            return np.zeros_like(sample.label)

        def majority_mask(sample: Sample) -> Mask:
            height, width = sample.image.shape[:2]
            return unsee_mask(majority, whole(sample.image), height, width, outside=0)

        answers = [TrivialAnswer("majority", majority_mask)]
        return [TrivialAnswer("background", everywhere_background), *answers] if self.background else answers

    def save(self, answer: Mask, sample: Sample, stem: str) -> list[str]:
        """STEM-mask.png: an indexed PNG of class ids in the drawing's colours."""
        ids = np.arange(len(self.classes) + self.background, dtype=np.uint8)
        return [save_mask(answer, self.draw(ids, 0), f"{stem}-mask.png")]


def _require_categories(classes: Sequence[str], source: CocoInstances, where: str) -> None:
    categories = source.categories(where)
    absent = next((name for name in classes if name not in categories), None)
    if absent is None:
        return
    alike = difflib.get_close_matches(absent.lower(), [name.lower() for name in categories], n=3)
    close = [name for name in categories if name.lower() in alike]
    listed = ", ".join([*close, *(name for name in categories if name not in close)])
    raise UserError(
        f"tasks.{Segmentation.name}.classes: {absent!r} is none of the categories of {source.annotations}: "
        + (f"there are {printable(listed)[:500]}" if categories else "it names none; task objects needs no categories")
    )
