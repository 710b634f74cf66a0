"""What a task is: the single interface between labels and pictures.

A task turns a labelled image into pictures that are tokenised in a row: an (image, label picture) pair, or for video and
unlabelled images some pictures that belong together. A `PairTask` also turns an answer picture back into a label, and scores
it. Each task is one file in this package and one section `tasks.NAME` of a recipe: the fields of the class are the fields
of the section. Adding a task is adding a file and naming it in `lvm_ray/tasks/__init__.py`.

Geometry lives in one value, the `View`: the rectangle of the original image that fills the picture, mirrored, turned or tinted.
Image and label always move through the same view, so that they cannot come apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializeAsAny, ValidationError, field_validator

from lvm_ray.errors import BadItem
from lvm_ray.section import NestedProblem, Section, first_problem
from lvm_ray.seeds import stable_hash
from lvm_ray.sources.base import Item, Picture, Sample, Source

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

__all__ = ["SPLITS", "Item", "PairTask", "Picture", "Sample", "Split", "Task", "TrivialAnswer", "View"]


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

    def covered(self, image: NDArray[np.uint8]) -> float:
        """The part of an image's pixels that the view shows (turning moves some in and as many out, and is not counted)."""
        x0, y0, x1, y1 = self.box
        height, width = image.shape[:2]
        inside = max(0.0, min(x1, width) - max(x0, 0)) * max(0.0, min(y1, height) - max(y0, 0))
        return float(inside / (height * width))


class Task(Section, ABC):
    """A task with its sources and settings. Subclasses name the sources that they read and add settings."""

    name: ClassVar[str]
    sources: ClassVar[tuple[type[Source], ...]] = ()  # the first is meant where a section names no `format`
    pictures: ClassVar[int] = 2  # that one item becomes: an image and its label picture, or some that belong together

    train: SerializeAsAny[Source] | None = None
    validation: SerializeAsAny[Source] | None = None
    test: SerializeAsAny[Source] | None = None
    hold_out: dict[Literal["validation", "test"], float] = Field(
        {}, description="{split: part}: part of the training source's originals that stand in a split without a source of its own"
    )
    copies: int = Field(1, ge=1, description="versions of each training item to tokenise: 1 is the original alone")

    @field_validator("train", "validation", "test", mode="before")
    @classmethod
    def _source_by_format(cls, value: Any) -> Any:
        """A section becomes the source that its `format` names."""
        if not isinstance(value, dict) or not cls.sources:
            return value
        known = {source.model_fields["format"].default: source for source in cls.sources}
        name = value.get("format", next(iter(known)))
        if not isinstance(name, str) or name not in known:
            raise NestedProblem(f"format: found {name!r}: task {cls.name} reads {', '.join(known)}")
        try:
            return known[name].model_validate(value)
        except ValidationError as error:
            raise NestedProblem(first_problem(error, known[name])) from None

    @field_validator("hold_out")
    @classmethod
    def _parts(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(0 <= part < 1 for part in value.values()) or sum(value.values()) >= 1:
            raise ValueError(f"found {value}: each part is 0 or more, and together they are less than 1")
        return value

    def items(self, split: Split) -> Iterator[Item]:
        """Every item of a split as a stream, in a fixed order; none where the recipe names no source for the split.

        Raises UserError where the source as a whole is unusable: a missing folder, counts that differ.
        """
        source: Source | None = getattr(self, split)
        if source is not None and not (split == "train" and self.hold_out):
            yield from source.items(f"tasks.{self.name}.{split}")
        elif self.train is not None and self.hold_out:
            for item in self.train.items(f"tasks.{self.name}.train"):
                if self._split_of(item.original) == split:
                    yield item

    def _split_of(self, original: str) -> Split:
        """Where an original of the training source stands: by its name alone, so that more images move none."""
        place = stable_hash("hold out", original) / 2**64
        for split in ("test", "validation"):
            part = self.hold_out.get(split, 0.0) if getattr(self, split) is None else 0.0
            if place < part:
                return split
            place -= part
        return "train"

    def source_of(self, split: Split) -> Source:
        """The source that a split's items are read from."""
        source: Source | None = getattr(self, split) or self.train
        assert source is not None, f"no source of {split}"
        return source

    def load(self, item: Item, split: Split) -> Sample:
        """Read one item at native size. Raises BadItem, with the path and the reason, where it cannot be used."""
        if item.problem is not None:
            raise BadItem(item.problem)
        return self.source_of(split).load(item)

    @abstractmethod
    def see(self, sample: Sample, copy: int, seed: Sequence[int], size: int) -> Seen:
        """The pictures of one copy: a pure function of (sample, copy, seed). Copy 0 is the original."""


@dataclass(frozen=True)
class Seen:
    """One copy of an item: its pictures [size, size, 3], and the part of the original's pixels that they show."""

    pictures: tuple[Picture, ...]
    covered: float


class PairTask(Task):
    """A task of (image, label picture) pairs, whose answers are read back and scored."""

    metrics: ClassVar[dict[str, bool]]  # metric -> True where higher is better
    meaning: ClassVar[tuple[str, ...]] = ()  # settings that decide what labels show, so what scores mean
    measuring: ClassVar[tuple[str, ...]] = ()  # those that decide how answers are read and measured, whatever pairs show

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

    def version(self, sample: Sample, copy: int, seed: Sequence[int], size: int) -> tuple[Sample, View]:
        """One copy of a sample before its label is drawn, and the view that it is seen through."""
        rng = np.random.default_rng([*seed, copy])
        view = self.view(sample, size, rng if copy else None)
        return self.transform(sample, view, size, rng), view

    def see(self, sample: Sample, copy: int, seed: Sequence[int], size: int) -> Seen:
        """The (image, label picture) of one copy."""
        seen, view = self.version(sample, copy, seed, size)
        return Seen((seen.image, self.draw(seen.label, size)), view.covered(sample.image))

    def query(self, picture: Picture) -> Picture:
        """What is asked about a seen image [S, S, 3]: the image itself, unless the task takes something away from it."""
        return picture

    def questions(self, sample: Sample, size: int) -> list[View]:
        """The views whose answers together cover the sample, which may have no label: one, unless the task works in tiles."""
        return [self.view(sample, size, None)]

    @abstractmethod
    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Any:
        """Answer pictures, one per view of `questions`, read back as a label in the sample's own pixels; where the label is a
        picture that is scored as it is drawn, in the answer's."""

    @abstractmethod
    def measure(self, answer: Any, sample: Sample) -> dict[str, Any]:
        """What scoring needs of one item (plain JSON values), so that scores of any subset follow without pictures."""

    def shows_nothing(self, answer: Any) -> bool:
        """Whether an answer shows nothing at all, as a mask of background alone does: such answers are counted, since a score may
        hide that a model gave up."""
        return False

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


class MeanScored(PairTask):
    """A task whose `measure` gives every metric of one item, and whose scores are the means over items."""

    def score(self, measures: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {name: float(np.mean([m[name] for m in measures])) for name in self.metrics}

    def resampled_scores(self, measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        return {name: np.array([m[name] for m in measures])[draws].mean(1) for name in self.metrics}


@dataclass(frozen=True)
class TrivialAnswer:
    """An answer that needs no model: `answer(sample)` is a label as `read` gives it."""

    name: str
    answer: Any
