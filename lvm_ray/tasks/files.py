"""Reading images and folders for the tasks, with errors that name the file and say what to do."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lvm_ray.errors import BadItem, UserError
from lvm_ray.tasks.base import Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LARGEST_PIXELS = 64_000_000  # a photo has fewer; more is a decompression bomb or a mistake


def list_images(folder: str, where: str) -> dict[str, str]:
    """Images of a folder as {name without ending: path}, sorted by name. `where` is the recipe's key, for messages."""
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"{where}: no folder {folder}; give the path of a folder of images")
    found = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{where}: no images in {folder}; expected files ending in {', '.join(SUFFIXES)}")
    images: dict[str, str] = {}
    for path in found:
        if path.stem in images:
            raise UserError(f"{where}: {images[path.stem]} and {path} have the same name; pairs are made by name, so rename one")
        images[path.stem] = str(path)
    return images


def match(images: dict[str, str], labels: dict[str, str], folders: tuple[str, str], where: str) -> list[tuple[str, str, str]]:
    """Pairs (name, image path, label path) of two folders, matched by name; every file must have its partner."""
    alone = sorted(set(images) ^ set(labels))
    if alone:
        first = alone[0]
        path, other = (images[first], folders[1]) if first in images else (labels[first], folders[0])
        raise UserError(
            f"{where}: {len(images)} images in {folders[0]} but {len(labels)} labels in {folders[1]}: "
            f"{path} has no partner of the same name in {other} ({len(alone)} such files); add it or remove the file"
        )
    return [(name, images[name], labels[name]) for name in sorted(images)]


def read_image(path: str) -> Picture:
    """An image file as RGB [H, W, 3] uint8, turned upright by its EXIF orientation. Raises BadItem."""
    return np.array(_open(path).convert("RGB"))


def read_mask(path: str) -> NDArray[np.uint8]:
    """An indexed or grey PNG as class ids [H, W] uint8. Raises BadItem."""
    image = _open(path)
    if image.mode not in ("L", "P", "1"):
        raise BadItem(f"{path}: a mask is an indexed or 8-bit grey image of class ids, found mode {image.mode}")
    return np.array(image, dtype=np.uint8)


def _open(path: str) -> Image.Image:
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if image.width * image.height > LARGEST_PIXELS:
                raise BadItem(f"{path}: {image.width}x{image.height} pixels; at most {LARGEST_PIXELS:,} are read")
            image.load()
            return ImageOps.exif_transpose(image)
    except BadItem:
        raise
    except Exception as error:  # decoders raise nearly every kind of exception on damaged files
        raise BadItem(f"{path}: cannot be read as an image: {' '.join(str(error).split()) or type(error).__name__}") from None
