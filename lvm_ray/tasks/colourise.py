"""Colourisation: a grey picture to its colours.

Data: images alone, which the task makes grey itself. Scores at the picture's size: `colour_mse`, the mean squared error of RGB in
ImageNet's units, as Bar et al. 2022 compute it (lower is better), and `psnr` over RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lvm_ray.tasks.base import Picture, Sample, TrivialAnswer
from lvm_ray.tasks.picture_answers import FromImages, seen_whole
from lvm_ray.tasks.quality import psnr

DEVIATION = (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue in 0..1; its means fall out of a difference


class Colourise(FromImages):
    """One label is the image in colours [H, W, 3]. Copies keep its colours: they are what is asked for."""

    name: ClassVar[str] = "colourise"
    metrics: ClassVar[dict[str, bool]] = {"colour_mse": False, "psnr": True}
    ending: ClassVar[str] = "colours"

    def query(self, picture: Picture) -> Picture:
        return np.repeat(_grey(picture)[..., None], 3, axis=-1)

    def measure(self, answer: Picture, sample: Sample) -> dict[str, Any]:
        truth = seen_whole(sample.label, len(answer))
        return {"colour_mse": colour_mse(answer, truth), "psnr": psnr(answer, truth)}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """The mean colour of each grey in the training images; the grey itself is the query copied."""
        colours = _mean_colours(training)
        return [TrivialAnswer("mean colour of each grey", lambda sample: colours[_grey(seen_whole(sample.image, size))])]

    def finished(self, answer: Picture, image: Picture) -> Picture:
        """The answer's colours under the image's own brightness, which the query showed in full."""
        _, blue, red = Image.fromarray(answer).convert("YCbCr").split()
        return np.asarray(Image.merge("YCbCr", (Image.fromarray(_grey(image)), blue, red)).convert("RGB"))


def colour_mse(answer: Picture, truth: Picture) -> float:
    """The mean over pixels and channels of the squared error, each channel in units of ImageNet's standard deviation."""
    error = (answer.astype(np.float64) - truth) / 255 / DEVIATION
    return float((error**2).mean())


def _grey(picture: Picture) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture).convert("L"))


def _mean_colours(training: Sequence[Sample]) -> NDArray[np.uint8]:
    """The mean training colour of each grey level [256, 3]; levels that no training image holds stay grey."""
    counts, sums = np.zeros(256), np.zeros((256, 3))
    for sample in training:
        grey = _grey(sample.label).ravel()
        counts += np.bincount(grey, minlength=256)
        sums += np.stack([np.bincount(grey, channel, minlength=256) for channel in sample.label.reshape(-1, 3).T], axis=1)
    levels = np.repeat(np.arange(256.0)[:, None], 3, axis=1)
    means = np.divide(sums, counts[:, None], out=levels, where=counts[:, None] > 0)
    return np.asarray(means.round(), np.uint8)
