"""COCO's JSON: person keypoints, one item a person."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lvm_ray.errors import BadItem, UserError
from lvm_ray.section import Section
from lvm_ray.sources.base import Item, Sample, Source
from lvm_ray.sources.files import list_images, read_image


class Person(Section):
    """One labelled person in the image's pixels."""

    joints: list[list[float]] = Field(description="17 rows of x, y, visibility (0: not labelled), COCO's order")
    box: list[float] = Field(description="x, y, width, height")
    area: float
    score: float = 1.0

    def array(self) -> NDArray[np.float64]:
        return np.array(self.joints, dtype=np.float64)


class CocoKeypoints(Source):
    """COCO person keypoints and the images that they name; one item is one annotated person of an image."""

    label: ClassVar[str] = "person"

    format: Literal["coco"] = "coco"
    images: str = Field(description="folder of images")
    annotations: str = Field(description="COCO person-keypoints JSON")

    def items(self, where: str) -> Iterator[Item]:
        images = {Path(path).name: path for path in list_images(self.images, f"{where}.images").values()}
        entries = _read_annotations(self.annotations, f"{where}.annotations")
        items = []
        for identity, file_name, extra in entries:
            path = images.get(file_name)
            if path is None:
                raise UserError(f"{self.annotations}: names image {file_name!r}, which is not in {self.images}")
            items.append(Item(f"{Path(file_name).stem}-{identity}", file_name, (path, self.annotations), extra))
        yield from sorted(items, key=lambda item: item.id)

    def load(self, item: Item) -> Sample:
        try:
            person = _person(item.extra)
        except (TypeError, ValueError, KeyError) as error:
            raise BadItem(f"{item.paths[1]}: annotation {item.id}: {' '.join(str(error).split())}") from None
        return Sample(read_image(item.paths[0]), person)


def _read_annotations(path: str, where: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(annotation id, image file name, raw annotation) of every person with labelled joints."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "annotations")):
        raise UserError(f"{where}: {path} has no lists `images` and `annotations`: expected COCO person keypoints")
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        entries = [
            (str(entry["id"]), names[entry["image_id"]], entry)
            for entry in content["annotations"]
            if entry.get("num_keypoints", 1) and not entry.get("iscrowd")
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: {path}: an image or annotation lacks or misnames {error}") from None
    if not entries:
        raise UserError(f"{where}: {path} holds no person with labelled joints")
    return entries


def _person(entry: dict[str, Any]) -> Person:
    joints = np.array(entry["keypoints"], dtype=np.float64)
    if joints.shape != (51,):
        raise ValueError(f"keypoints holds {joints.size} numbers, COCO's layout has 51 (17 joints of x, y, visibility)")
    box = np.array(entry["bbox"], dtype=np.float64)
    if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] <= 0).any():
        raise ValueError(f"bbox is {entry['bbox']}, expected x, y, width, height with a positive size")
    if not np.isfinite(joints).all():
        raise ValueError("keypoints holds a number that is not finite")
    joints = joints.reshape(17, 3)
    if not (joints[:, 2] > 0).any():
        raise ValueError("no joint is labelled (every visibility is 0)")
    return Person(joints=joints.tolist(), box=box.tolist(), area=float(entry.get("area", box[2] * box[3])))
