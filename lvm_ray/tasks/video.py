"""Video: consecutive frames of one clip as a whole sentence, for the model to learn what comes next (the paper's HD-VILA).

Data: a folder of clips, each a folder of frames. A row of tokens is a whole sentence, and its frames move through one view. Not
scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from lvm_ray.section import NestedProblem
from lvm_ray.sources.base import Source
from lvm_ray.sources.video import VideoFrames
from lvm_ray.tasks.base import Sample, Seen, Task
from lvm_ray.tasks.geometry import augmented, see_image, whole


class Video(Task):
    """One item is a run of frames, seen whole, or of a copy a part of each, the same for all."""

    name: ClassVar[str] = "video"
    sources: ClassVar[tuple[type[Source], ...]] = (VideoFrames,)

    smallest_crop: float = Field(0.4, gt=0, le=1, description="smallest part of the frames that an augmented copy shows")
    hue: float = Field(20.0, ge=0, le=180, description="degrees by which a copy's hues are turned at most; 0 keeps all colours")

    @model_validator(mode="after")
    def _same_length(self) -> Video:
        lengths = {source.length for source in (self.train, self.validation, self.test) if isinstance(source, VideoFrames)}
        if len(lengths) > 1:
            raise NestedProblem(f"train.length: the splits have items of {sorted(lengths)} frames: give all the same length")
        return self

    @property
    def pictures(self) -> int:  # type: ignore[override]
        return self.train.length if isinstance(self.train, VideoFrames) else VideoFrames.model_fields["length"].default

    def see(self, sample: Sample, copy: int, seed: Sequence[int], size: int) -> Seen:
        view = whole(sample.image)
        if copy:
            view = augmented(view, np.random.default_rng([*seed, copy]), self.smallest_crop, 0, self.hue)
        return Seen(tuple(see_image(frame, view, size) for frame in sample.label), view.covered(sample.image))
