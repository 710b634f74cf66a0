"""COCO's JSON files: keypoints, one item a person or an image, and instances, one item an image.

The file is read whole, so it is bounded. An entry that is damaged becomes an item with a problem; the names in it are
looked up among the files of the images' folder and never become paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lvm_ray.errors import BadItem, UserError
from lvm_ray.section import Section
from lvm_ray.sources.base import Item, Picture, Region, Sample, Source
from lvm_ray.sources.files import distinct, list_images, parse_json, printable, problem_of, read_image, titles
from lvm_ray.sources.rle import read_polygons, read_rle
from lvm_ray.storage import file_size, read_bytes, split_query

LARGEST_JSON = 2 * 2**30  # bytes; COCO's largest has a quarter of it


class Person(Section):
    """One labelled person in the image's pixels."""

    joints: list[list[float]] = Field(description="17 rows of x, y, visibility (0: not labelled), COCO's order")
    box: list[float] = Field(description="x, y, width, height")
    area: float
    score: float = 1.0
    others: list[Person] = Field([], description="the image's other people, who have no others themselves")

    def array(self) -> NDArray[np.float64]:
        return np.array(self.joints, dtype=np.float64)

    @property
    def everyone(self) -> list[Person]:
        """This person and the others."""
        return [self, *self.others]


class CocoKeypoints(Source):
    """COCO person keypoints and the images that they name."""

    label: ClassVar[str] = "person"

    format: Literal["coco"] = "coco"
    images: str = Field(description="folder of images")
    annotations: str = Field(description="COCO person-keypoints JSON")
    people: Literal["one", "all"] = Field(
        "one", description="one: an item is a person; all: an item is an image, labelled with its largest person and the others"
    )

    def items(self, where: str) -> Iterator[Item]:
        """Sorted by id: `IMAGE-ANNOTATION`, or `IMAGE` with all people. A person without labelled joints is no item."""
        listing = _read(self.images, self.annotations, where, "person keypoints")
        entries = [entry for entry in listing.entries if _has_joints(entry.content)]
        _require_usable(entries, f"{where}.annotations", f"{self.annotations} holds no person with labelled joints")
        if self.people == "all":
            items = [
                _image_item(group, self.annotations, {"size": listing.sizes.get(group[0].image), "people": _contents(group)})
                for group in _by_image(entries)
            ]
        else:
            items = [
                _entry_item(entry, self.annotations, {"size": listing.sizes.get(entry.image), "people": [entry.content]})
                for entry in entries
            ]
        yield from sorted(distinct(items), key=lambda item: item.id)

    def load(self, item: Item) -> Sample:
        image = _read_sized(item)
        people = []
        for entry in item.extra["people"]:
            try:
                people.append(_person(entry, *image.shape[:2]))
            except (TypeError, ValueError, KeyError, OverflowError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
                raise BadItem(f"{item.paths[1]}: annotation {_text(entry.get('id'))} of {item.original}: {reason}") from None
        largest = max(people, key=lambda person: person.area)
        others = [person for person in people if person is not largest]
        return Sample(image, largest.model_copy(update={"others": others}) if others else largest)


class CocoInstances(Source):
    """COCO instances and the images that they name; one item is one image with its objects, crowds left out.

    An object whose category the file does not name has the category None.
    """

    label: ClassVar[str] = "regions"

    format: Literal["coco-instances"] = "coco-instances"
    images: str = Field(description="folder of images")
    annotations: str = Field(description="COCO instances JSON")

    def items(self, where: str) -> Iterator[Item]:
        """Sorted by id, the image's name. An image without objects is no item."""
        listing = _read(self.images, self.annotations, where, "instances")
        _require_usable(listing.entries, f"{where}.annotations", f"{self.annotations} holds no object")
        items = []
        for group in _by_image(listing.entries):
            regions = [
                [_text(entry.get("id")), listing.categories.get(_key(entry.get("category_id"))), entry.get("segmentation")]
                for entry in _contents(group)
            ]
            items.append(_image_item(group, self.annotations, {"size": listing.sizes.get(group[0].image), "regions": regions}))
        yield from sorted(distinct(items), key=lambda item: item.id)

    def categories(self, where: str) -> list[str]:
        """The names of the file's categories. Raises UserError where the file cannot be read."""
        content = _read_json(self.annotations, f"{where}.annotations")
        return list(_categories(content).values()) if isinstance(content, dict) else []

    def load(self, item: Item) -> Sample:
        """The regions are sorted by area, largest first; one that covers no pixel is left out."""
        image = _read_sized(item)
        height, width = image.shape[:2]
        regions = []
        for identity, category, code in item.extra["regions"]:
            try:
                rle, area = (read_rle if isinstance(code, dict) else read_polygons)(code, height, width)
            except ValueError as error:
                raise BadItem(f"{item.paths[1]}: annotation {identity} of {item.original}: {error}") from None
            if area:
                regions.append(Region(category, area, rle))
        if not regions:
            raise BadItem(f"{item.paths[1]}: {item.original}: no annotation covers a pixel")
        return Sample(image, sorted(regions, key=lambda region: -region.area))


@dataclass(frozen=True)
class _Entry:
    """One annotation: its image's id, name and path, and what is wrong with it."""

    number: int
    identity: str
    content: dict[str, Any]
    image: Any = None
    name: str = ""
    title: str = ""  # the name as an id has it
    path: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class _Listing:
    """A JSON file's annotations, the [height, width] of its images by id, and its categories' names by id."""

    entries: list[_Entry]
    sizes: dict[Any, list[int] | None]
    categories: dict[Any, str]


def _read(images: str, annotations: str, where: str, expected: str) -> _Listing:
    if "*" in split_query(images)[0]:
        raise UserError(
            f"{where}.images: {images}: {annotations} names its images by file name alone: give one folder, without `*`"
        )
    paths = list_images(images, f"{where}.images")
    content = _read_json(annotations, f"{where}.annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "annotations")):
        raise UserError(f"{where}.annotations: {annotations} has no lists `images` and `annotations`: expected COCO {expected}")
    known = [image for image in content["images"] if isinstance(image, dict) and _key(image.get("id")) is not None]
    names: dict[Any, str | None] = {}
    for image in known:
        key, name = _key(image["id"]), str(image.get("file_name"))
        names[key] = name if names.get(key, name) == name else None  # an id of two images says nothing
    sizes = {_key(image["id"]): _size(image) for image in known}
    named = titles(paths.keys())
    entries: list[_Entry] = []
    seen: set[Any] = set()
    for number, entry in enumerate(content["annotations"]):
        if isinstance(entry, dict) and entry.get("iscrowd"):
            continue
        found = _entry(number, entry, names, paths, images, annotations, seen)
        entries.append(replace(found, title=printable(named.get(found.name) or PurePath(found.name).stem)))
    return _Listing(entries, sizes, _categories(content))


def _categories(content: dict[str, Any]) -> dict[Any, str]:
    listed = content.get("categories")
    return {
        _key(category["id"]): category["name"]
        for category in (listed if isinstance(listed, list) else [])
        if isinstance(category, dict) and _key(category.get("id")) is not None and isinstance(category.get("name"), str)
    }


def _entry(
    number: int,
    entry: Any,
    names: dict[Any, str | None],
    paths: dict[str, str],
    images: str,
    annotations: str,
    seen: set[Any],
) -> _Entry:
    """One annotation, joined with its image. `seen` holds the ids that stood before, and gets this one's."""
    place = f"{annotations}: annotation number {number}"
    if not isinstance(entry, dict):
        return _Entry(number, f"number{number}", {}, problem=f"{place} is {_text(entry)}, expected an object")
    identity, image = _key(entry.get("id")), _key(entry.get("image_id"))
    name = names.get(image)
    path = paths.get(name) if name is not None else None
    problem = None
    if identity is None:
        problem = f"{place} has no usable id"
    elif identity in seen:
        problem = f"{annotations}: two annotations have the id {_text(identity)}: the first is used"
    elif image is None or image not in names:
        problem = f"{annotations}: annotation {_text(identity)} is of image {_text(entry.get('image_id'))}, which `images` lacks"
    elif name is None:
        problem = f"{annotations}: annotation {_text(identity)} is of image {_text(image)}, an id that two images have"
    elif path is None:
        problem = f"{annotations}: names image {printable(name)[:200]!r}, which is not in {images}"
    else:
        problem = problem_of(path)
    seen.add(identity)
    called = f"number{number}" if identity is None else _text(identity)
    return _Entry(number, called, entry, image, name=name or "", path=path or "", problem=problem)


def _read_sized(item: Item) -> Picture:
    """An item's image. Raises BadItem where it has not the size of which the file says that it has."""
    image = read_image(item.paths[0])
    (height, width), size = image.shape[:2], item.extra["size"]
    if size is not None and size != [height, width]:
        raise BadItem(f"{item.paths[0]}: {width}x{height} pixels, its labels are of an image of {size[1]}x{size[0]}")
    return image


def _read_json(path: str, where: str) -> Any:
    size = file_size(path)
    if size is None:
        raise UserError(f"{where}: cannot read {path}: no such file")
    if size > LARGEST_JSON:
        raise UserError(f"{where}: {path} has {size:,} bytes; at most {LARGEST_JSON:,} are read: split it")
    try:
        return parse_json(read_bytes(path), path)
    except BadItem as error:
        raise UserError(f"{where}: {error}") from None


def _require_usable(entries: list[_Entry], where: str, nothing: str) -> None:
    if not entries:
        raise UserError(f"{where}: {nothing}")
    if all(entry.problem for entry in entries):
        raise UserError(f"{where}: holds nothing that can be used: {entries[0].problem}")


def _entry_item(entry: _Entry, annotations: str, extra: dict[str, Any]) -> Item:
    stem = entry.title or "unknown"
    if entry.problem:
        identity = f"{stem}-{entry.identity}@{entry.number}"
        return Item(identity, printable(entry.name) or identity, (printable(entry.path), annotations), problem=entry.problem)
    return Item(f"{stem}-{entry.identity}", entry.name, (entry.path, annotations), extra)


def _by_image(entries: Iterable[_Entry]) -> list[list[_Entry]]:
    """The annotations of each image together; one that has none of the images by itself."""
    groups: dict[Any, list[_Entry]] = {}
    for entry in entries:
        key = ("image", entry.image) if entry.path else ("alone", entry.name or entry.number)
        groups.setdefault(key, []).append(entry)
    return list(groups.values())


def _image_item(group: list[_Entry], annotations: str, extra: dict[str, Any]) -> Item:
    """The item of an image. A single damaged annotation makes it unusable: without it the label would lack an object."""
    first = group[0]
    problem = next((entry.problem for entry in group if entry.problem), None)
    identity = first.title or f"unknown@{first.number}"
    paths = (printable(first.path), annotations)
    return Item(identity, printable(first.name) or identity, paths, {} if problem else extra, problem)


def _contents(group: list[_Entry]) -> list[dict[str, Any]]:
    return [entry.content for entry in group]


def _key(identity: Any) -> int | str | None:
    """An id that may be one: a whole number or a text."""
    return identity if type(identity) in (int, str) else None


def _text(value: Any) -> str:
    """A value of the file for a message or an id: one short line."""
    return printable(str(value))[:40]


def _size(image: dict[str, Any]) -> list[int] | None:
    height, width = image.get("height"), image.get("width")
    return [height, width] if type(height) is int and type(width) is int else None


def _has_joints(entry: dict[str, Any]) -> bool:
    """Whether an annotation says that joints are labelled; one that says nothing is looked at when it is loaded."""
    return bool(entry.get("num_keypoints", 1))


def _person(entry: dict[str, Any], height: int, width: int) -> Person:
    joints = _numbers(entry["keypoints"], "keypoints")
    if joints.shape != (51,):
        raise ValueError(f"keypoints holds {joints.size} numbers, COCO's layout has 51 (17 joints of x, y, visibility)")
    box = _numbers(entry["bbox"], "bbox")
    if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] <= 0).any():
        raise ValueError(f"bbox is {_text(entry['bbox'])}, expected x, y, width, height with a positive size")
    if not np.isfinite(joints).all():
        raise ValueError("keypoints holds a number that is not finite")
    area = _numbers([entry.get("area", box[2] * box[3])], "area").item()
    if not 0 <= area < np.inf:
        raise ValueError(f"area is {area}")
    joints = joints.reshape(17, 3)
    labelled = joints[:, 2] > 0
    if not labelled.any():
        raise ValueError("no joint is labelled (every visibility is 0)")
    side = np.array([width, height])
    low, high = box[:2], box[:2] + box[2:]
    if (high <= 0).any() or (low >= side).any() or (low < -side).any() or (high > 2 * side).any():
        raise ValueError(f"bbox {_text(entry['bbox'])} lies outside its image of {width}x{height} pixels")
    beyond = np.maximum(-joints[labelled, :2], joints[labelled, :2] - side).max()
    if beyond > box[2:].max():
        raise ValueError(f"a joint lies {beyond:.0f} pixels outside its image, further than the person is large")
    return Person(joints=joints.tolist(), box=box.tolist(), area=area)


def _numbers(values: Any, name: str) -> NDArray[np.float64]:
    if not isinstance(values, list) or not all(isinstance(value, int | float) and type(value) is not bool for value in values):
        raise ValueError(f"{name} is no list of numbers")
    return np.array(values, dtype=np.float64)
