"""PASCAL VOC: masks in the four folds of Pascal-5i, one class of one image an item; boxes of images with a single object."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from lvm_ray.errors import BadItem, UserError
from lvm_ray.sources.base import Item, Sample, Source
from lvm_ray.sources.files import distinct, list_images, list_names, printable, problem_of, read_image, read_mask, usable
from lvm_ray.storage import is_folder, join, read_bytes, read_file, split_name

FOLDS = 4
LINE = re.compile(r"(.+)__(\d\d?)")
LARGEST_XML = 2**20  # bytes; VOC's have a few thousand


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
        images, masks = _by_stem(self.images, f"{where}.images"), _by_stem(self.masks, f"{where}.masks")
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


class VocBoxes(Source):
    """VOC's images that hold a single object, and its box; the others of the list are no items.

    The label is 1 in the box and 0 elsewhere.
    """

    label: ClassVar[str] = "ids"

    format: Literal["voc-boxes"] = "voc-boxes"
    images: str = Field(description="folder of images: JPEGImages")
    annotations: str = Field(description="folder of XML files of the images' names: Annotations")
    names: str = Field(description="file of the images' names, one a line: ImageSets/Main/val.txt")
    largest: float = Field(
        1.0, gt=0, le=1, description="part of its image that a box may cover; images of larger ones are no items"
    )

    def items(self, where: str) -> Iterator[Item]:
        yield from usable(distinct(self._items(where)), f"{where}.names")

    def _items(self, where: str) -> Iterator[Item]:
        images = _by_stem(self.images, f"{where}.images")
        files = set(list_names(self.annotations, f"{where}.annotations", "a folder of XML files")[0])
        content = read_file(*split_name(self.names))
        if content is None:
            raise UserError(f"{where}.names: no file {printable(self.names)}; give a list of images, one a line")
        for line in content.decode("utf-8", "replace").splitlines():
            name = line.strip()
            if not name:
                continue
            shown, file = printable(name)[:80], join(self.annotations, f"{name}.xml")
            if name not in images or f"{name}.xml" not in files:
                which = "image" if name not in images else "annotation"
                yield Item(shown, shown, (printable(self.names),), problem=f"{self.names} names {shown}, which has no {which}")
                continue
            paths = (images[name], file)
            try:
                found, part = _only_object(file)
            except BadItem as error:
                yield Item(shown, shown, paths, problem=str(error))
                continue
            if found is not None and part <= self.largest:
                yield Item(shown, shown, paths, found, problem_of(paths[0]))

    def load(self, item: Item) -> Sample:
        image = read_image(item.paths[0])
        left, top, right, bottom = item.extra["box"]
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 1
        if not mask.any():
            raise BadItem(f"{item.paths[1]}: the box {item.extra['box']} shows nothing of its image")
        return Sample(image, mask)


def _by_stem(folder: str, where: str) -> dict[str, str]:
    return {PurePath(name).stem: path for name, path in list_images(folder, where).items()}


def _only_object(file: str) -> tuple[dict[str, Any] | None, float]:
    """The class and box (left, top, right, bottom: pixel edges) of an annotation of one object, and the part of its image that it
    covers; (None, 0) of one of several objects or none. Raises BadItem."""
    content = read_bytes(file, 0, LARGEST_XML + 1)
    try:
        text = content.decode()
        if len(content) > LARGEST_XML or "<!" in text:  # VOC's declare nothing, and entities can blow up
            raise BadItem(f"{file}: is not an annotation as VOC has them: too long, or with declarations")
        root = ElementTree.fromstring(text)
        objects = root.findall("object")
        if len(objects) != 1:
            return None, 0.0
        left, top, right, bottom = (round(float(_text(objects[0], f"bndbox/{key}"))) for key in ("xmin", "ymin", "xmax", "ymax"))
        width, height = (int(_text(root, f"size/{key}")) for key in ("width", "height"))
        part = (right - left + 1) * (bottom - top + 1) / (width * height)
        return {"class": _text(objects[0], "name"), "box": [left - 1, top - 1, right, bottom]}, part  # the first pixel is 1
    except (ElementTree.ParseError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise BadItem(f"{file}: is not an annotation as VOC has them: {' '.join(str(error).split())[:200]}") from None


def _text(element: ElementTree.Element, path: str) -> str:
    found = element.findtext(path)
    if found is None:
        raise ValueError(f"it has no {path}")
    return found.strip()
