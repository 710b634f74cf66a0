"""What a task is: the single interface between labels and pictures.

A task turns a labelled image into an (image, label picture) pair, turns an answer picture back into a label, and
scores it. Each task is one file in this package and one section `tasks.NAME` of a recipe: the fields of the class are
the fields of the section. Adding a task is adding a file and naming it in `lvm_ray/tasks/__init__.py`.

Geometry lives in one value, the `View`: the rectangle of the original image that fills the picture, mirrored, turned or tinted.
Image and label always move through the same view, so that they cannot come apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lvm_ray.section import Section

Picture = NDArray[np.uint8]  # [H, W, 3], sRGB, 0..255
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Item:
    """One labelled image of one task, before anything is read: cheap to list, small to send to a worker.

    id        unique within (task, split); sorts in a fixed order
    original  the image that the item comes from: items of one original never stand in two splits
    paths     the files it is read from, for messages
    extra     what else `load` needs: plain JSON values
    """

    id: str
    original: str
    paths: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """An image with its label, at any size. The label's type is the task's own; None where `questions` asks for it."""

    image: Picture
    label: Any


@dataclass(frozen=True)
class View:
    """Which part of an image fills a picture, and in what colours.

    box       x0, y0, x1, y1 in pixels of the original; may reach beyond it (outside is black)
    mirrored  left and right exchanged after the crop
    turned    degrees by which the original is turned around the box's centre before the crop, counter-clockwise
    tint      a 3x3 matrix that every RGB value is multiplied by, row by row; None leaves colours as they are
    """

    box: tuple[float, float, float, float]
    mirrored: bool = False
    turned: float = 0.0
    tint: tuple[float, ...] | None = None


class Task(Section, ABC):
    """A task with its settings. Subclasses add their sources (`train`, `validation`, `test`) and settings."""

    name: ClassVar[str]
    metrics: ClassVar[dict[str, bool]]  # metric -> True where higher is better

    copies: int = Field(1, ge=1, description="versions of each training pair to tokenise: 1 is the original alone")

    @abstractmethod
    def items(self, split: Split) -> list[Item]:
        """Every item of a split, sorted by id; [] where the recipe names no source for the split.

        Raises UserError where the source as a whole is unusable: a missing folder, counts that differ.
        """

    @abstractmethod
    def load(self, item: Item) -> Sample:
        """Read one item at native size. Raises BadItem, with the path and the reason, where it cannot be used."""

    @abstractmethod
    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        """The view of one copy: without `rng` that of copy 0, with it a random one that the task allows."""

    @abstractmethod
    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        """The sample seen through a view: image and label moved together to size x size pixels.

        `rng` is for tasks that make the image itself (rain drawn on a clean photo).
        """

    @abstractmethod
    def draw(self, label: Any, size: int) -> Picture:
        """The label of a transformed sample as a picture of size x size pixels."""

    def pair(self, sample: Sample, copy: int, seed: Sequence[int], size: int) -> tuple[Picture, Picture]:
        """The (image, label picture) of one copy: a pure function of (sample, copy, seed)."""
        rng = np.random.default_rng([*seed, copy])
        view = self.view(sample, size, rng if copy else None)
        seen = self.transform(sample, view, size, rng)
        return seen.image, self.draw(seen.label, size)

    def questions(self, sample: Sample, size: int) -> list[View]:
        """The views whose answers together cover the sample, which may have no label: one, unless the task works in tiles."""
        return [self.view(sample, size, None)]

    @abstractmethod
    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Any:
        """Answer pictures, one per view of `questions`, read back as a label in the sample's own pixels."""

    @abstractmethod
    def measure(self, answer: Any, sample: Sample) -> dict[str, Any]:
        """What scoring needs of one item (plain JSON values), so that scores of any subset follow without pictures."""

    @abstractmethod
    def score(self, measures: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Every metric over a set of measured items."""

    def resampled_scores(self, measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Every metric for each row of `draws` [R, n] (indices of items): the bootstrap's inner loop."""
        rows = [self.score([measures[i] for i in row]) for row in draws]
        return {name: np.array([row[name] for row in rows]) for name in self.metrics}

    @abstractmethod
    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """The task's own answers that need no model (design section 4), learnt from transformed training samples."""

    @abstractmethod
    def save(self, answer: Any, sample: Sample, stem: str) -> list[str]:
        """Write a label read back beside an answer picture, in the format that its users have; the paths written."""


@dataclass(frozen=True)
class TrivialAnswer:
    """An answer that needs no model: `answer(sample)` is a label in the sample's own pixels."""

    name: str
    answer: Any
