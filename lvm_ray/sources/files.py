"""Reading images and folders for the sources, with errors that name the file and say what to do. Nothing is trusted."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.fs
from numpy.typing import NDArray
from PIL import Image

from lvm_ray.errors import BadItem, UserError
from lvm_ray.sources.base import Item, Picture
from lvm_ray.storage import file_size, fill, is_folder, is_uri, join, open_folder, read_bytes, split_query

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Pillow goes by content, not by name, and knows formats that run a program (PostScript): only these are ever decoded.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
LARGEST_PIXELS = 64_000_000  # a photo has fewer; more is a decompression bomb or a mistake
LARGEST_BYTES = 512 * 2**20  # likewise of a file
UPRIGHT = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Control characters, line separators and marks that turn the reading direction: they break lines and disguise names.
UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def list_images(folder: str, where: str) -> dict[str, str]:
    """Images of a folder, or of all folders that a pattern with one `*` matches, as {file name: path}, sorted.

    In a pattern the names are `MATCH/NAME`. `where` is the recipe's key, for messages.
    """
    if "*" not in folder:
        return _list_folder(folder, where)
    return {
        f"{part}/{name}": path for part, place in list_matches(folder, where) for name, path in _list_folder(place, where).items()
    }


def titles(names: Collection[str]) -> dict[str, str]:
    """{file name: the same without its ending}; where two would then be one, both keep it."""
    stems = {name: os.path.splitext(name)[0] for name in names}
    counts = Counter(stems.values())
    return {name: name if counts[stem] > 1 or stem in stems else stem for name, stem in stems.items()}


def list_singles(folder: str, where: str) -> Iterator[Item]:
    """Items of one folder (or pattern of folders) of images without partners. `a.png` and `a.jpg` are of one original."""
    images = list_images(folder, where)
    for name, title in titles(images.keys()).items():
        path = images[name]
        yield Item(printable(title), original_of(os.path.splitext(name)[0]), (printable(path),), problem=problem_of(path))


def list_pairs(images: str, labels: str, where: tuple[str, str]) -> Iterator[Item]:
    """Items of two folders (or patterns of folders), matched by name; every file must have its partner.

    Their paths are (image, label). Raises UserError naming a file without its partner, and two of one name.
    """
    first, second = (_by_stem(list_images(folder, key), key) for folder, key in zip((images, labels), where, strict=True))
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
    """A file name as one line that any file can hold: control characters, and bytes that are not UTF-8, as escapes."""
    try:
        text = os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can name but no file
        text = name.encode("utf-8", "backslashreplace").decode()
    return UNFIT.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def problem_of(path: str) -> str | None:
    """Why a file's name cannot be used, or None."""
    if printable(path) == path:
        return None
    return f"{printable(path)}: its name is not UTF-8 or holds control characters: rename the file"


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sorting key by which `frame9` comes before `frame10`."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part) if i % 2 else 0, "" if i % 2 else part) for i, part in enumerate(parts)], name


def distinct(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each whose id stood before with that as its problem."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen and item.problem is None:
            item = Item(item.id, item.original, item.paths, problem=f"{item.paths[0]}: duplicate id {item.id}: the first is used")
        seen.add(item.id)
        yield item


def usable(items: Iterable[Item], where: str) -> Iterator[Item]:
    """The items. Raises UserError at their end where none of them can be used, with the first one's problem."""
    first, found = None, False
    for item in items:
        found = found or item.problem is None
        first = first or item.problem
        yield item
    if not found:
        raise UserError(f"{where}: holds nothing that can be used" + (f": {first}" if first else ""))


def parse_json(content: bytes, name: str) -> Any:
    """The value of a JSON text. Raises BadItem."""
    try:
        return json.loads(content)
    except RecursionError:
        raise BadItem(f"{name}: is not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise BadItem(f"{name}: is not JSON: {' '.join(str(error).split())[:200]}") from None


def read_image(path: str, white: float | None = None) -> Picture:
    """An image file as RGB [H, W, 3] uint8, turned upright by its EXIF orientation. Raises BadItem.

    `white` is the value that is white in a file of more than 8 bits: by default 65535 of integers, 1.0 of floating point.
    """
    return decode_image(_content(path), path, white)


def decode_image(content: bytes, name: str, white: float | None = None) -> Picture:
    """The bytes of an image file as RGB [H, W, 3] uint8, turned upright; what is transparent becomes white. Raises BadItem."""
    image = _decode(content, name)
    try:
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            return _from_deep(np.array(image), name, white)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.array(image.convert("RGB"))
    except (ValueError, OSError) as error:
        raise BadItem(f"{name}: its pixels of mode {image.mode} cannot be shown as RGB: {error}") from None


def read_mask(path: str, colours: Sequence[Sequence[int]] | None = None, binary: bool = False) -> NDArray[np.uint8]:
    """A mask as class ids [H, W] uint8: an indexed or grey PNG, or one in `colours` (id i is colour i, 255 any other), or a
    binary one (the larger of two values is 1, of more all above 127). Raises BadItem."""
    if colours is not None:
        return _ids_of_colours(read_image(path), colours, path)
    image = _decode(_content(path), path)
    if binary:
        return _two_values(image, path)
    pixels = np.array(image)
    deep = image.mode.startswith("I;16")
    if image.mode not in ("L", "P", "1") and not deep:
        raise BadItem(f"{path}: a mask is an indexed or 8-bit grey image of class ids, found mode {image.mode}")
    if deep and pixels.max() > 255:
        raise BadItem(f"{path}: a mask holds class ids up to 255, found {pixels.max()} in a 16-bit image")
    return pixels.astype(np.uint8)


def _two_values(image: Image.Image, path: str) -> NDArray[np.uint8]:
    pixels = np.array(image)
    if image.mode == "RGB" and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    elif image.mode not in ("L", "P", "1") and not image.mode.startswith("I;16"):
        found = "colours" if image.mode == "RGB" else f"mode {image.mode}"
        raise BadItem(f"{path}: a binary mask is black and white, grey or indexed, found {found}: name them in `colours`")
    values = np.unique(pixels)
    if len(values) > 2 and values[-1] > 255:
        raise BadItem(f"{path}: a binary mask of 16 bits has two values, found {len(values)}")
    # One value alone may be either: 1 counts as white, since 0 and 1 are what is most often written beside 0 and 255.
    threshold = values[0] if len(values) == 2 else 127 if values[-1] > 1 else 0
    return np.asarray(pixels > threshold, np.uint8)


def _ids_of_colours(pixels: Picture, colours: Sequence[Sequence[int]], path: str) -> NDArray[np.uint8]:
    ids = np.full(pixels.shape[:2], 255, np.uint8)
    known = np.zeros(pixels.shape[:2], bool)
    for i, colour in enumerate(colours):
        here = (pixels == colour).all(-1)
        ids[here] = i
        known |= here
    if not known.any():
        found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        raise BadItem(f"{path}: none of `colours` is in it; its most frequent colour is {found[counts.argmax()].tolist()}")
    return ids


def _from_deep(pixels: NDArray[np.generic], name: str, white: float | None) -> Picture:
    """Grey of more than 8 bits as RGB. The scale is never chosen by what a file holds: files of one data set share it."""
    values = np.asarray(pixels, np.float64)
    if not np.isfinite(values).all():
        raise BadItem(f"{name}: holds pixels that are not finite numbers")
    most = 1.0 if pixels.dtype == np.float32 else 65535.0
    low, high = values.min(), values.max()
    if white is None and not 0 <= low <= high <= most:
        raise BadItem(
            f"{name}: holds values from {low:g} to {high:g}, of which 0 to {most:g} can be shown: "
            "set `white`, the value that is white, where it is a label of `pictures`, or scale the file"
        )
    grey = (values / (white or most) * 255).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(grey[..., None].repeat(3, axis=-1))


def _content(path: str) -> bytes:
    try:
        size = file_size(path)
        if size is None:
            raise BadItem(f"{path}: cannot be read: no such file")
        if size > LARGEST_BYTES:
            raise BadItem(f"{path}: {size:,} bytes; at most {LARGEST_BYTES:,} are read")
        return read_bytes(path)
    except UserError as error:
        raise BadItem(str(error)) from None


def _decode(content: bytes, name: str) -> Image.Image:
    """The first frame, upright."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            if not 0 < image.width * image.height <= LARGEST_PIXELS:
                raise BadItem(
                    f"{name}: {image.width}x{image.height} pixels; at least one and at most {LARGEST_PIXELS:,} are read"
                )
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            return image.copy() if turn is None else image.transpose(turn)
    except BadItem:
        raise
    except Exception as error:  # decoders raise nearly every kind of exception on damaged files
        reason = " ".join(str(error).split()).split(" <_io")[0] or type(error).__name__
        raise BadItem(f"{name}: cannot be read as an image: {reason if content else 'empty file'}") from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata of a picture whose pixels are whole
        return 1


def list_names(folder: str, where: str, what: str) -> tuple[list[str], list[str]]:
    """(names that are not of folders, names of folders) in a folder, unsorted. Raises UserError where it cannot be listed.

    `where` and `what` are the recipe's key and what the folder should hold, for messages.
    """
    if not is_folder(folder):
        raise UserError(f"{where}: no folder {printable(folder)}; give the path of {what}")
    files: list[str] = []
    folders: list[str] = []
    try:
        if not is_uri(folder):  # pyarrow refuses to list a folder that holds a name which is not UTF-8
            with os.scandir(folder) as entries:
                for entry in entries:
                    (folders if entry.is_dir() else files).append(entry.name)
        else:
            filesystem, root = open_folder(folder)
            for info in filesystem.get_file_info(pyarrow.fs.FileSelector(root)):
                (folders if info.type == pyarrow.fs.FileType.Directory else files).append(info.base_name)
    except OSError as error:
        raise UserError(f"{where}: cannot list {printable(folder)}: {error.strerror or str(error).splitlines()[0]}") from None
    return files, folders


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _list_folder(folder: str, where: str) -> dict[str, str]:
    found = sorted(filter(is_image, list_names(folder, where, "a folder of images")[0]))
    if not found:
        raise UserError(f"{where}: no images in {printable(folder)}; expected files ending in {', '.join(SUFFIXES)}")
    return {name: join(folder.rstrip("/"), name) for name in found}


def _by_stem(images: dict[str, str], where: str) -> dict[str, str]:
    """{name without ending: path}. Raises UserError where two images have one name."""
    paths: dict[str, str] = {}
    for name, path in images.items():
        stem = os.path.splitext(name)[0]
        if stem in paths:
            raise UserError(
                f"{where}: {printable(paths[stem])} and {printable(path)} have the same name; pairs are made by name: rename one"
            )
        paths[stem] = path
    return paths


def list_matches(pattern: str, where: str) -> Iterator[tuple[str, str]]:
    """(text that `*` stands for, folder) of every folder that a pattern matches, in natural order, as a stream."""
    place, query = split_query(pattern)
    before, _, after = place.partition("*")
    if "*" in after or not before.endswith("/") or (after and not after.startswith("/")):
        raise UserError(f"{where}: {pattern}: a pattern has one `*`, which stands for the whole name of a folder")
    found = False
    for name in sorted(list_names(before + query, where, "a pattern whose `*` stands for folders")[1], key=natural):
        folder = fill(pattern, name)
        if not after or is_folder(folder):
            found = True
            yield name, folder
    if not found:
        raise UserError(f"{where}: no folder matches {pattern}")
