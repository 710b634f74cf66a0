"""Reading images and folders for the sources, with errors that name the file and say what to do. Nothing is trusted."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator

import numpy as np
import pyarrow.fs
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lvm_ray.errors import BadItem, UserError
from lvm_ray.sources.base import Item, Picture
from lvm_ray.storage import file_size, open_folder, read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LARGEST_PIXELS = 64_000_000  # a photo has fewer; more is a decompression bomb or a mistake
LARGEST_BYTES = 512 * 2**20  # likewise of a file


def list_images(folder: str, where: str) -> dict[str, str]:
    """Images of a folder, or of all folders that a pattern with one `*` matches, as {name without ending: path}, sorted.

    In a pattern the names are `MATCH/NAME`. `where` is the recipe's key, for messages.
    """
    if "*" not in folder:
        return _list_folder(folder, where)
    return {
        f"{part}/{name}": path for part, place in _matches(folder, where) for name, path in _list_folder(place, where).items()
    }


def list_pairs(images: str, labels: str, where: tuple[str, str]) -> Iterator[Item]:
    """Items of two folders (or patterns of folders), matched by name; every file must have its partner.

    Their paths are (image, label). Raises UserError naming a file without its partner.
    """
    first, second = list_images(images, where[0]), list_images(labels, where[1])
    alone = sorted(set(first) ^ set(second))
    if alone:
        path, other = (first[alone[0]], labels) if alone[0] in first else (second[alone[0]], images)
        raise UserError(
            f"{where[0].rpartition('.')[0]}: {len(first)} images in {images} but {len(second)} labels in {labels}: "
            f"{path} has no partner of the same name in {other} ({len(alone)} such files); add it or remove the file"
        )
    for name, path in first.items():
        yield Item(printable(name), original_of(name), (printable(path), printable(second[name])), problem=problem_of(path))


def original_of(name: str) -> str:
    """The original of an image of a folder: itself; of a pattern of folders, the folder, since it holds one clip."""
    return printable(name.rpartition("/")[0] or name)


def printable(name: str) -> str:
    """A file name as text that any file can hold: bytes that are not UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def problem_of(path: str) -> str | None:
    """Why a file's name cannot be used, or None."""
    return None if printable(path) == path else f"{printable(path)}: its name is not UTF-8: rename the file"


def read_image(path: str) -> Picture:
    """An image file as RGB [H, W, 3] uint8, turned upright by its EXIF orientation. Raises BadItem."""
    return decode_image(_content(path), path)


def decode_image(content: bytes, name: str) -> Picture:
    """The bytes of an image file as RGB [H, W, 3] uint8, turned upright; what is transparent becomes white. Raises BadItem."""
    image = _decode(content, name)
    try:
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            return _from_deep(np.array(image), name)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.array(image.convert("RGB"))
    except (ValueError, OSError) as error:
        raise BadItem(f"{name}: its pixels of mode {image.mode} cannot be shown as RGB: {error}") from None


def read_mask(path: str, colours: list[tuple[int, int, int]] | None = None, binary: bool = False) -> NDArray[np.uint8]:
    """A mask as class ids [H, W] uint8: an indexed or grey PNG, or one in `colours` (id i is colour i, 255 any other), or a
    binary one (above half is 1). Raises BadItem."""
    image = _decode(_content(path), path)
    if colours is not None:
        return _ids_of_colours(np.array(image.convert("RGB")), colours)
    pixels = np.array(image)
    if image.mode not in ("L", "P", "1") and not (image.mode.startswith("I;16") and pixels.max() <= 255):
        raise BadItem(f"{path}: a mask is an indexed or 8-bit grey image of class ids, found mode {image.mode}")
    if binary:
        return np.asarray(pixels > (127 if pixels.dtype != bool else 0), np.uint8)
    return pixels.astype(np.uint8)


def _ids_of_colours(pixels: Picture, colours: list[tuple[int, int, int]]) -> NDArray[np.uint8]:
    ids = np.full(pixels.shape[:2], 255, np.uint8)
    for i, colour in enumerate(colours):
        ids[(pixels == colour).all(-1)] = i
    return ids


def _from_deep(pixels: NDArray[np.generic], name: str) -> Picture:
    """Grey of 16 bits or floating point as RGB: 65535 (or 1.0) is white."""
    values = np.asarray(pixels, np.float64)
    if not np.isfinite(values).all():
        raise BadItem(f"{name}: holds pixels that are not finite numbers")
    most = 65535.0 if pixels.dtype != np.float32 else 1.0 if values.max(initial=0) <= 1 else 255.0
    grey = (values / most * 255).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(grey[..., None].repeat(3, axis=-1))


def _content(path: str) -> bytes:
    size = file_size(path)
    if size is None:
        raise BadItem(f"{path}: cannot be read: no such file")
    if size > LARGEST_BYTES:
        raise BadItem(f"{path}: {size:,} bytes; at most {LARGEST_BYTES:,} are read")
    try:
        return read_bytes(path)
    except UserError as error:
        raise BadItem(str(error)) from None


def _decode(content: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > LARGEST_PIXELS:
                raise BadItem(f"{name}: {image.width}x{image.height} pixels; at most {LARGEST_PIXELS:,} are read")
            image.load()
            return ImageOps.exif_transpose(image)
    except BadItem:
        raise
    except Exception as error:  # decoders raise nearly every kind of exception on damaged files
        reason = " ".join(str(error).split()).split(" <_io")[0] or type(error).__name__
        raise BadItem(f"{name}: cannot be read as an image: {reason if content else 'empty file'}") from None


def _list_folder(folder: str, where: str) -> dict[str, str]:
    filesystem, root = open_folder(folder)
    if filesystem.get_file_info(root).type != pyarrow.fs.FileType.Directory:
        raise UserError(f"{where}: no folder {folder}; give the path of a folder of images")
    names = _names(folder, filesystem, root)
    found = sorted(name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES)
    if not found:
        raise UserError(f"{where}: no images in {folder}; expected files ending in {', '.join(SUFFIXES)}")
    images: dict[str, str] = {}
    for name in found:
        stem, path = os.path.splitext(name)[0], f"{folder.rstrip('/')}/{name}"
        if stem in images:
            raise UserError(
                f"{where}: {printable(images[stem])} and {printable(path)} have the same name; pairs are made by name: rename one"
            )
        images[stem] = path
    return images


def _names(folder: str, filesystem: pyarrow.fs.FileSystem, root: str) -> list[str]:
    if "://" not in folder:  # pyarrow refuses to list a folder that holds a name which is not UTF-8
        return [entry.name for entry in os.scandir(folder) if entry.is_file()]
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(root))
    return [info.base_name for info in infos if info.type == pyarrow.fs.FileType.File]


def _matches(pattern: str, where: str) -> list[tuple[str, str]]:
    """(text that `*` stands for, folder) of every folder that matches a pattern, sorted."""
    before, _, after = pattern.partition("*")
    if "*" in after or not before.endswith("/") or (after and not after.startswith("/")):
        raise UserError(f"{where}: {pattern}: a pattern has one `*`, which stands for the whole name of a folder")
    filesystem, root = open_folder(before)
    if filesystem.get_file_info(root).type != pyarrow.fs.FileType.Directory:
        raise UserError(f"{where}: no folder {before}; give a pattern whose `*` stands for folders")
    found = []
    for info in sorted(filesystem.get_file_info(pyarrow.fs.FileSelector(root)), key=lambda info: info.base_name):
        place = f"{before}{info.base_name}{after}"
        inner_filesystem, inner = open_folder(place)
        if inner_filesystem.get_file_info(inner).type == pyarrow.fs.FileType.Directory:
            found.append((info.base_name, place))
    if not found:
        raise UserError(f"{where}: no folder matches {pattern}")
    return found
