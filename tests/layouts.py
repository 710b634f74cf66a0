"""Tiny data sets in the folder layouts in which the real ones are published."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from lvm_ray.sources import Item, Sample, Source


def picture(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(pixels: np.ndarray, format: str = "PNG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **settings)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def listing(source: Source) -> tuple[list[Item], list[str]]:
    """(usable items, problems of the others)."""
    items = list(source.items("tasks.toy.train"))
    return [item for item in items if item.problem is None], [item.problem for item in items if item.problem is not None]


def loaded(source: Source) -> dict[str, Sample]:
    """Every usable item by id."""
    return {item.id: source.load(item) for item in listing(source)[0]}


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def make_tar(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def mask_of(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    return mask


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def sa1b_pair(number: int, masks: Sequence[np.ndarray], **changes: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    """`sa_N.jpg` with `sa_N.json`; `changes` replace keys of the first annotation."""
    height, width = masks[0].shape
    annotations: list[dict[str, Any]] = [
        {
            "id": 1000 * number + i,
            "bbox": [0.0, 0.0, 1.0, 1.0],
            "area": int(mask.sum()),
            "segmentation": rle_of(mask),
            "predicted_iou": 0.98,
            "stability_score": 0.97,
            "point_coords": [[1.0, 1.0]],
            "crop_box": [0, 0, width, height],
        }
        for i, mask in enumerate(masks)
    ]
    annotations[0] |= changes
    about = {"image_id": number, "width": width, "height": height, "file_name": f"sa_{number}.jpg"}
    return [
        member(f"./sa_{number}.jpg", encoded(picture(number, height, width), "JPEG", quality=95)),
        member(f"./sa_{number}.json", json.dumps({"image": about, "annotations": annotations}).encode()),
    ]


def good_sa1b_pair(number: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    return sa1b_pair(number, [mask_of(12, 16, (1, 2, 3, 4)), mask_of(12, 16, (0, 0, 10, 9))])


def make_lmdb(folder: Path, values: Mapping[str, bytes], meta: bool = True) -> Path:
    """As BasicSR writes one: keys without endings, `meta_info.txt` beside `data.mdb`."""
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for name, content in values.items():
            transaction.put(name.encode(), content)
    if meta:
        (folder / "meta_info.txt").write_text("".join(f"{name}.png (12,16,3) 1\n" for name in values))
    return folder


def person(number: int, image: int = 1, shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A person's annotation in a 16 x 12 image."""
    joints = [value for i in range(17) for value in (3.0 + i / 4 + shift, 2.0 + i / 4, 2)]
    good = {"id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "num_keypoints": 17}
    return {**good, "keypoints": joints, "bbox": [2.0 + shift, 1.0, 6.0, 8.0], "area": 40.0 + number, **changes}


def coco(folder: Path, annotations: Sequence[Any], images: int = 2, **changes: Any) -> dict[str, str]:
    """`images/` with 00000000000N.jpg and `annotations.json`; the fields of a COCO source."""
    for i in range(1, images + 1):
        write(folder / "images" / f"{i:012d}.jpg", encoded(picture(i), "JPEG"))
    content = {
        "info": {},
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 12, "width": 16} for i in range(1, images + 1)],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": list(annotations),
        **changes,
    }
    write(folder / "annotations.json", json.dumps(content).encode())
    return {"images": str(folder / "images"), "annotations": str(folder / "annotations.json")}


def same(first: Sample, second: Sample) -> bool:
    """Whether two samples hold the same pixels and the same label."""
    if isinstance(first.label, np.ndarray):
        labels = np.array_equal(first.label, second.label)
    elif isinstance(first.label, list) and first.label and isinstance(first.label[0], np.ndarray):
        labels = all(np.array_equal(a, b) for a, b in zip(first.label, second.label, strict=True))
    else:
        labels = bool(first.label == second.label)
    return labels and np.array_equal(first.image, second.image)
