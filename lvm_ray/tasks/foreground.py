"""Foreground: what the examples have in common, white on black (few-shot segmentation, Bar et al. 2022).

Data: VOC in the folds of Pascal-5i. Scores: the mean over items of each item's own IoU, `miou_fold0` to `miou_fold3`, and their
mean `miou`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lvm_ray.sources.base import Source
from lvm_ray.sources.voc import FOLDS, VocFolds
from lvm_ray.tasks.base import PairTask, Picture, Sample, TrivialAnswer, View
from lvm_ray.tasks.files import save_mask
from lvm_ray.tasks.geometry import augmented, see_image, see_mask, unsee_mask, whole

Mask = NDArray[np.uint8]  # [H, W]: 0 or 1
COLOURS = np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
NEARER = 127.5  # the mean above which a colour is nearer to white than to black
PARTS = [f"miou_fold{fold}" for fold in range(FOLDS)]


class Foreground(PairTask):
    """One label is a mask [H, W] of 0 and 1. What a query asks for, its pairs alone tell: a benchmark shows pairs of one class,
    and a run's own sentences do not sort theirs."""

    name: ClassVar[str] = "foreground"
    sources: ClassVar[tuple[type[Source], ...]] = (VocFolds,)
    metrics: ClassVar[dict[str, bool]] = dict.fromkeys(["miou", *PARTS], True)
    measuring: ClassVar[tuple[str, ...]] = ("cell", "threshold")

    cell: int | None = Field(
        None, ge=1, description="side of the square to which masks are squeezed to be compared; null: the image's own pixels"
    )
    threshold: float = Field(
        NEARER, ge=0, lt=255, description="mean of R, G and B above which an answer's pixel is foreground; 127.5: white is nearer"
    )
    smallest_crop: float = Field(0.4, gt=0, le=1, description="smallest part of the image that an augmented copy shows")
    turn: float = Field(10.0, ge=0, le=180, description="degrees by which an augmented copy is turned at most, to either side")
    hue: float = Field(20.0, ge=0, le=180, description="degrees by which a copy's hues are turned at most; 0 keeps all colours")

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        everything = whole(sample.image)
        return everything if rng is None else augmented(everything, rng, self.smallest_crop, self.turn, self.hue)

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        return Sample(see_image(sample.image, view, size), see_mask(sample.label, view, size, outside=0))

    def draw(self, label: Mask, size: int) -> Picture:
        return COLOURS[label]

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Mask:
        height, width = sample.image.shape[:2]
        return unsee_mask(_brighter(pictures[0], self.threshold), views[0], height, width, outside=0)

    def measure(self, answer: Mask, sample: Sample) -> dict[str, Any]:
        """The item's IoU, 1 where neither mask shows anything, and its fold."""
        truth, found = self._compared(sample.label), self._compared(answer)
        union = int((truth | found).sum())
        return {"iou": int((truth & found).sum()) / union if union else 1.0, "fold": sample.part}

    def shows_nothing(self, answer: Mask) -> bool:
        return not answer.any()

    def score(self, measures: Sequence[dict[str, Any]]) -> dict[str, float]:
        everything = np.arange(len(measures))[None]
        return {name: float(values[0]) for name, values in self.resampled_scores(measures, everything).items()}

    def resampled_scores(self, measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        ious, folds = np.array([m["iou"] for m in measures])[draws], np.array([m["fold"] for m in measures])[draws]
        counts_RF = np.stack([(folds == fold).sum(1) for fold in range(FOLDS)], axis=1)
        sums_RF = np.stack([np.where(folds == fold, ious, 0).sum(1) for fold in range(FOLDS)], axis=1)
        means_RF = np.where(counts_RF, sums_RF / np.maximum(counts_RF, 1), np.nan)
        return {"miou": np.nanmean(means_RF, axis=1), **{name: means_RF[:, fold] for fold, name in enumerate(PARTS)}}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """Everything, nothing, and the majority of the training masks at every pixel."""
        usual = (np.mean([sample.label for sample in training], axis=0) > 0.5).astype(np.uint8)

        def majority(sample: Sample) -> Mask:
            height, width = sample.image.shape[:2]
            return unsee_mask(usual, whole(sample.image), height, width, outside=0)

        return [
            TrivialAnswer("all foreground", lambda sample: np.ones_like(sample.label)),
            TrivialAnswer("background", lambda sample: np.zeros_like(sample.label)),
            TrivialAnswer("majority", majority),
        ]

    def save(self, answer: Mask, sample: Sample, stem: str) -> list[str]:
        """STEM-mask.png: an indexed PNG, 1 the foreground."""
        return [save_mask(answer, COLOURS, f"{stem}-mask.png")]

    def _compared(self, mask: Mask) -> Mask:
        """A mask as it is compared: with `cell` its picture squeezed to the square, each pixel the nearer of white and black."""
        return mask if self.cell is None else _brighter(see_image(COLOURS[mask], whole(mask), self.cell), NEARER)


def _brighter(picture: Picture, threshold: float) -> Mask:
    return np.asarray(picture.astype(np.int64).sum(axis=-1) > 3 * threshold, np.uint8)
