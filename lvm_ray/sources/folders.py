"""Folders of images whose files are matched by name: masks, degraded and clean pictures, pictures alone.

A folder may be a pattern with one `*` (`GoPro/train/*/blur`): every folder that it matches is read, each with its partner in the
place that the same text gives in the other pattern. Images of one matched folder count as one original, since such folders
are the frames of one clip.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from lvm_ray.errors import BadItem
from lvm_ray.sources.base import Item, Sample, Source
from lvm_ray.sources.files import list_pairs, list_singles, read_image, read_mask

Colour = Annotated[list[int], Field(min_length=3, max_length=3, description="red, green, blue, 0..255")]


class MaskFolders(Source):
    """Images and their masks, matched by name."""

    label: ClassVar[str] = "ids"

    format: Literal["masks"] = "masks"
    images: str = Field(description="folder of images")
    masks: str = Field(description="folder of masks: PNG, indexed or 8-bit grey, one class id a pixel; or in colours, or binary")
    colours: list[Colour] | None = Field(
        None, description="for masks in colours: the RGB colour of each id, 0 first; other colours are ignored"
    )
    binary: bool = Field(
        False,
        description="masks of two values (0 and 1, 0 and 255, 1-bit, indexed, black and white): the larger is class 1; "
        "where a mask holds more values, all above 127; where it holds one, 1 and all above 127",
    )

    def items(self, where: str) -> Iterator[Item]:
        yield from list_pairs(self.images, self.masks, (f"{where}.images", f"{where}.masks"))

    def load(self, item: Item) -> Sample:
        image_path, mask_path = item.paths
        image, mask = read_image(image_path), read_mask(mask_path, self.colours, self.binary)
        if image.shape[:2] != mask.shape:
            raise BadItem(f"{mask_path}: {mask.shape[1]}x{mask.shape[0]} pixels, its image {image.shape[1]}x{image.shape[0]}")
        return Sample(image, mask)


class ImageFolder(Source):
    """A folder of unlabelled images."""

    label: ClassVar[str] = "none"

    format: Literal["images"] = "images"
    images: str = Field(description="folder of images, or a pattern of folders")

    def items(self, where: str) -> Iterator[Item]:
        yield from list_singles(self.images, f"{where}.images")

    def load(self, item: Item) -> Sample:
        return Sample(read_image(item.paths[0]), None)


class PictureFolders(Source):
    """Images and the pictures that an answer to them should be, matched by name."""

    label: ClassVar[str] = "image"

    format: Literal["pictures"] = "pictures"
    images: str = Field(description="folder of images, or a pattern of folders")
    labels: str = Field(description="folder of label pictures of the same names and sizes, or a pattern of folders")
    white: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="value that is white in 16-bit, 32-bit or floating-point labels, values above it too; "
        "without it 65535 of integers, 1.0 of floating point",
    )

    def items(self, where: str) -> Iterator[Item]:
        yield from list_pairs(self.images, self.labels, (f"{where}.images", f"{where}.labels"))

    def load(self, item: Item) -> Sample:
        image, label = read_image(item.paths[0]), read_image(item.paths[1], self.white)
        if image.shape != label.shape:
            names, (height, width, _) = item.paths, image.shape
            raise BadItem(f"{names[1]}: {label.shape[1]}x{label.shape[0]} pixels, its image {width}x{height}")
        return Sample(image, label)


class PairFolders(Source):
    """Degraded images and their clean ones, matched by name; or clean ones alone, which the task degrades itself."""

    label: ClassVar[str] = "image"

    clean: str = Field(description="folder of clean images, or a pattern of folders")

    @abstractmethod
    def degraded(self) -> tuple[str, str | None]:
        """The name of the field of degraded images, and its value."""

    def items(self, where: str) -> Iterator[Item]:
        name, folder = self.degraded()
        if folder is None:
            yield from ImageFolder(images=self.clean).items(f"{where}.clean")
        else:
            yield from list_pairs(folder, self.clean, (f"{where}.{name}", f"{where}.clean"))

    def load(self, item: Item) -> Sample:
        """The degraded image with its clean one; with clean images alone both are the clean one."""
        image = read_image(item.paths[0])
        if len(item.paths) == 1:
            return Sample(image, image)
        clean = read_image(item.paths[1])
        return Sample(same_size(image, clean, item.paths), clean)


class RainFolders(PairFolders):
    """Rainy images and their clean ones, matched by name; or clean ones alone."""

    format: Literal["folders"] = "folders"
    rainy: str | None = Field(None, description="folder of rainy images; without it rain is drawn on the clean ones")

    def degraded(self) -> tuple[str, str | None]:
        return "rainy", self.rainy


class BlurFolders(PairFolders):
    """Blurred images and their clean ones, matched by name (GoPro: `train/*/blur` and `train/*/sharp`); or clean ones alone."""

    format: Literal["folders"] = "folders"
    blurred: str | None = Field(None, description="folder of blurred images; without it the clean ones are blurred as by motion")

    def degraded(self) -> tuple[str, str | None]:
        return "blurred", self.blurred


def same_size(image: np.ndarray, clean: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """The degraded image. Raises BadItem where its size is not its clean image's."""
    if image.shape != clean.shape:
        raise BadItem(f"{names[0]}: {image.shape[1]}x{image.shape[0]} pixels, its clean image {clean.shape[1]}x{clean.shape[0]}")
    return image
