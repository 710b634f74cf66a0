"""Completion: a picture of which one half is hidden to the whole picture.

Data: images alone, of which the task hides a half itself. Scores of the hidden half at the picture's size: `psnr_hidden` over
RGB, and `ssim_hidden`, on the Y channel around each of its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from lvm_ray.tasks.base import Picture, Sample, TrivialAnswer, View
from lvm_ray.tasks.picture_answers import FromImages, mean_picture, seen_whole
from lvm_ray.tasks.quality import SSIM_WINDOW, psnr, ssim_map_y

Half = Literal["lower", "upper", "left", "right"]


class Complete(FromImages):
    """One label is the whole image [H, W, 3]. The half is hidden after the view, so it is the same one in every copy."""

    name: ClassVar[str] = "complete"
    metrics: ClassVar[dict[str, bool]] = {"psnr_hidden": True, "ssim_hidden": True}
    ending: ClassVar[str] = "completed"
    meaning: ClassVar[tuple[str, ...]] = ("half",)

    half: Half = Field("lower", description="the half that is hidden, in black: lower, upper, left or right")

    def query(self, picture: Picture) -> Picture:
        return self.finished(np.zeros_like(picture), picture)

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Picture:
        """The hidden half as answered beside the half that was shown, which nobody needs to answer."""
        return self.finished(pictures[0], seen_whole(sample.image, len(pictures[0])))

    def measure(self, answer: Picture, sample: Sample) -> dict[str, Any]:
        truth = seen_whole(sample.label, len(answer))
        there = hidden(self.half, *answer.shape[:2])
        mapped = np.pad(ssim_map_y(answer, truth), SSIM_WINDOW // 2, constant_values=np.nan)
        return {"psnr_hidden": psnr(answer[there], truth[there]), "ssim_hidden": float(np.nanmean(mapped[there]))}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """The hidden half as the shown one mirrored, in its mean colour, and out of the mean training image."""
        mean = mean_picture(training)

        def mirrored(sample: Sample) -> Picture:
            image = seen_whole(sample.image, size)
            return self.finished(np.flip(image, axis=0 if self.half in ("lower", "upper") else 1), image)

        def mean_colour(sample: Sample) -> Picture:
            answer = mirrored(sample)
            there = hidden(self.half, size, size)
            answer[there] = answer[there].mean((0, 1)).round()
            return answer

        return [
            TrivialAnswer("mirrored half", mirrored),
            TrivialAnswer("mean colour", mean_colour),
            TrivialAnswer("mean picture", lambda sample: self.finished(mean, seen_whole(sample.image, size))),
        ]

    def finished(self, answer: Picture, image: Picture) -> Picture:
        """The image with its hidden half out of the answer, which has its size."""
        whole, there = image.copy(), hidden(self.half, *image.shape[:2])
        whole[there] = answer[there]
        return whole


def hidden(half: Half, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a picture's half; the middle line of an odd number is shown."""
    rows = {"lower": slice((height + 1) // 2, None), "upper": slice(height // 2)}
    columns = {"left": slice(width // 2), "right": slice((width + 1) // 2, None)}
    return rows.get(half, slice(None)), columns.get(half, slice(None))
