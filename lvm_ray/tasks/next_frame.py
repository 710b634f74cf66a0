"""The next frame: a frame of a clip to the one that follows it.

Data: a folder of clips, each a folder of frames; splits are made by clip. Scores: `psnr_y` and `ssim_y` on the Y channel at the
picture's size. The frame copied is the floor that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from lvm_ray.sources.base import Source
from lvm_ray.sources.video import FramePairs
from lvm_ray.tasks.base import Item, Picture, Sample, Split, TrivialAnswer, View
from lvm_ray.tasks.geometry import part_of, see_image
from lvm_ray.tasks.picture_answers import PictureAnswers, seen_whole
from lvm_ray.tasks.quality import psnr_y, ssim_y


class NextFrame(PictureAnswers):
    """One label is the frame [H, W, 3] that follows the image."""

    name: ClassVar[str] = "next_frame"
    sources: ClassVar[tuple[type[Source], ...]] = (FramePairs,)
    metrics: ClassVar[dict[str, bool]] = {"psnr_y": True, "ssim_y": True}
    ending: ClassVar[str] = "next"

    smallest_crop: float = Field(0.4, gt=0, le=1, description="smallest part of the frames that an augmented copy shows")
    hue: float = Field(20.0, ge=0, le=180, description="degrees by which a copy's hues are turned at most; 0 keeps all colours")

    def load(self, item: Item, split: Split) -> Sample:
        frame, following = super().load(item, split).label
        return Sample(frame, following)

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        return part_of(sample.image, rng, self.smallest_crop, turn=0, hue=self.hue)

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        return Sample(see_image(sample.image, view, size), see_image(sample.label, view, size))

    def measure(self, answer: Picture, sample: Sample) -> dict[str, Any]:
        truth = seen_whole(sample.label, len(answer))
        return {"psnr_y": psnr_y(answer, truth), "ssim_y": ssim_y(answer, truth)}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """None beside the query copied, which every task has: what stands still is right in it."""
        return []
