"""What a source is: the single interface between files, in whatever layout they were published, and tasks.

A source is a section of the recipe, `tasks.NAME.SPLIT`. Its `format` says which one; each format is a class in this package, and
a task names those that it reads. A source lists items as a stream, without reading a picture, and reads one item at a time,
in any process: nothing is ever whole in memory.

What the label of a sample is depends on the source's `label`:

    ids     a mask uint8 [H, W] of class ids
    regions a list of `Region`, each one object's mask, run-length encoded
    person  a `Person`
    image   the picture that an answer should be, uint8 [H, W, 3]
    frames  a list of pictures, of which the first is the sample's image
    none    None: an unlabelled picture
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lvm_ray.section import Section

Picture = NDArray[np.uint8]  # [H, W, 3], sRGB, 0..255


@dataclass(frozen=True)
class Item:
    """One labelled image of one task, before anything is read: cheap to list, small to send to a worker.

    id        unique within (task, split)
    original  the image that the item comes from (of video the clip): items of one original never stand in two splits
    paths     the files it is read from, for messages
    extra     what else `load` needs: plain JSON values
    problem   why the item cannot be used, where the listing shows it already: it is set aside without being read
    """

    id: str
    original: str
    paths: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Sample:
    """An image with its label, at any size. The label's type is the source's; None where `questions` asks for it. `part` is which
    of a data set's numbered parts it is of, where these have scores of their own."""

    image: Picture
    label: Any
    part: int | None = None


@dataclass(frozen=True)
class Region:
    """One object of an image: its category (None where the data set names none), its pixels, and its mask as COCO's
    compressed run-length code {"size": [H, W], "counts": bytes}."""

    category: str | None
    area: int
    rle: dict[str, Any]


class Source(Section, ABC):
    """Labelled images in one published layout. The fields of a class are the fields of the recipe's section."""

    label: ClassVar[str]  # one of the kinds above
    format: str

    @abstractmethod
    def items(self, where: str) -> Iterator[Item]:
        """Every item, in a fixed order, as a stream. `where` is the recipe's key, for messages.

        Raises UserError where the source as a whole is unusable: a missing folder, counts that differ. What is wrong with a
        single item is its `problem`.
        """

    @abstractmethod
    def load(self, item: Item) -> Sample:
        """Read one item at native size. Raises BadItem, with the path and the reason, where it cannot be used."""
