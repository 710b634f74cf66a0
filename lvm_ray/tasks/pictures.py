"""Pictures: any task whose label is a picture already (depth, edges, colours, styles): an image in, its picture out.

Data: a folder of images and a folder of pictures of the same names. Scores: `psnr` over RGB at native size, and `mae`, the mean
absolute error in grey levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from lvm_ray.sources.base import Source
from lvm_ray.sources.folders import PictureFolders
from lvm_ray.tasks.base import PairTask, Picture, Sample, TrivialAnswer, View
from lvm_ray.tasks.geometry import augmented, see_image, whole


class Pictures(PairTask):
    """One label is a picture [H, W, 3] of its image's size. Its colours are never changed: they may mean something."""

    name: ClassVar[str] = "pictures"
    sources: ClassVar[tuple[type[Source], ...]] = (PictureFolders,)
    metrics: ClassVar[dict[str, bool]] = {"psnr": True, "mae": False}

    smallest_crop: float = Field(0.4, gt=0, le=1, description="smallest part of the image that an augmented copy shows")
    turn: float = Field(10.0, ge=0, le=180, description="degrees by which an augmented copy is turned at most, to either side")

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        everything = whole(sample.image)
        return everything if rng is None else augmented(everything, rng, self.smallest_crop, self.turn, hue=0)

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        return Sample(see_image(sample.image, view, size), see_image(sample.label, view, size))

    def draw(self, label: Picture, size: int) -> Picture:
        return label

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Picture:
        return _resized(pictures[0], sample.image)

    def measure(self, answer: Picture, sample: Sample) -> dict[str, Any]:
        error = answer.astype(np.float64) - sample.label
        squared = float((error**2).mean())
        return {"psnr": 100.0 if squared == 0 else float(10 * np.log10(255**2 / squared)), "mae": float(np.abs(error).mean())}

    def score(self, measures: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {name: float(np.mean([m[name] for m in measures])) for name in self.metrics}

    def resampled_scores(self, measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        return {name: np.array([m[name] for m in measures])[draws].mean(1) for name in self.metrics}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """The mean training picture."""
        mean = np.mean([sample.label for sample in training], axis=0).round().astype(np.uint8)
        return [TrivialAnswer("mean picture", lambda sample: _resized(mean, sample.image))]

    def save(self, answer: Picture, sample: Sample, stem: str) -> list[str]:
        """STEM-picture.png, at the image's size."""
        path = Path(f"{stem}-picture.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(answer).save(path)
        return [str(path)]


def _resized(picture: Picture, image: Picture) -> Picture:
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
