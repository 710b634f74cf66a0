"""PASCAL VOC's segmentation in the four folds of Pascal-5i: one class of one image an item."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from lvm_ray.errors import BadItem, UserError
from lvm_ray.sources.base import Item, Sample, Source
from lvm_ray.sources.files import distinct, list_images, printable, problem_of, read_image, read_mask, usable
from lvm_ray.storage import is_folder, join, read_file

FOLDS = 4
LINE = re.compile(r"(.+)__(\d\d?)")


class VocFolds(Source):
    """VOC's images and class masks with the folds' lists, `fold0.txt` to `fold3.txt`: a line `IMAGE__CLASS` an item.

    The label is 1 where the mask has the class and 0 elsewhere, undefined pixels (255) included. An item's part is its fold.
    """

    label: ClassVar[str] = "ids"

    format: Literal["voc-folds"] = "voc-folds"
    images: str = Field(description="folder of images: JPEGImages")
    masks: str = Field(description="folder of class masks: SegmentationClassAug, or SegmentationClass")
    folds: str = Field(description="folder of the lists, as few-shot segmentation publishes them: splits/pascal/val")

    def items(self, where: str) -> Iterator[Item]:
        yield from usable(distinct(self._items(where)), f"{where}.folds")

    def _items(self, where: str) -> Iterator[Item]:
        images, masks = (
            {PurePath(name).stem: path for name, path in list_images(folder, f"{where}.{key}").items()}
            for key, folder in (("images", self.images), ("masks", self.masks))
        )
        if not is_folder(self.folds):
            raise UserError(f"{where}.folds: no folder {printable(self.folds)}; give the folder of fold0.txt to fold3.txt")
        for fold in range(FOLDS):
            name = f"fold{fold}.txt"
            content = read_file(self.folds, name)
            if content is None:
                raise UserError(f"{where}.folds: {printable(self.folds)} has no {name}; it should hold fold0.txt to fold3.txt")
            for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
                if line.strip():
                    yield _item(line.strip(), fold, f"{join(self.folds, name)}: line {number}", images, masks)

    def load(self, item: Item) -> Sample:
        image, mask = read_image(item.paths[0]), read_mask(item.paths[1])
        if image.shape[:2] != mask.shape:
            raise BadItem(f"{item.paths[1]}: {mask.shape[1]}x{mask.shape[0]} pixels, its image {image.shape[1]}x{image.shape[0]}")
        return Sample(image, np.asarray(mask == item.extra["class"], np.uint8), part=item.extra["fold"])


def _item(line: str, fold: int, place: str, images: dict[str, str], masks: dict[str, str]) -> Item:
    found = LINE.fullmatch(line)
    if not found:
        name = printable(line)[:80]
        return Item(f"{name}@{place}", name, (place,), problem=f"{place} is {name!r}, expected IMAGE__CLASS")
    name, number = found[1], int(found[2])
    if name not in images or name not in masks:
        which = "image" if name not in images else "mask"
        name = printable(name)[:80]
        return Item(printable(line)[:80], name, (place,), problem=f"{place} names {name}, which has no {which}")
    paths = (images[name], masks[name])
    problem = problem_of(paths[0]) or problem_of(paths[1])
    return Item(printable(line), printable(name), paths, {"class": number, "fold": fold}, problem)
