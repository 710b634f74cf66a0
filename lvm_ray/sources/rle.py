"""Masks as run-length codes: checked here, number by number, before pycocotools' C code sees one.

That code believes what it is given: runs that overrun their image are written past the end of its memory, and a polygon
takes memory by the length of its outline. Everything here raises ValueError saying what is wrong.

A code is {"size": [H, W], "counts": bytes}; the counts are the lengths of runs of 0 and 1 in turn, column by column, in COCO's
compressed text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST_OUTLINE = 1_000_000  # pixels; a polygon that takes more is no object of a photo
MOST_BYTES_OF_A_RUN = 7  # 35 bits: any run of any picture that is read


def read_rle(code: Any, height: int, width: int) -> tuple[dict[str, Any], int]:
    """A published code {"size", "counts"} of an image of height x width, checked: (the compressed code, pixels of 1s)."""
    if not isinstance(code, dict) or "size" not in code or "counts" not in code:
        raise ValueError("a run-length code is {size, counts}")
    if code["size"] != [height, width]:
        raise ValueError(f"its run-length code is of size {str(code['size'])[:40]}, the image is {[height, width]}")
    counts = code["counts"]
    if isinstance(counts, str | bytes):
        text = counts if isinstance(counts, bytes) else counts.encode("utf-8", "replace")
        runs = _decompress(text)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        text, runs = None, _whole_numbers(counts)
    else:
        raise ValueError("the counts of a run-length code are a text or whole numbers")
    total = height * width
    # Each run by itself first: the sum of huge ones could come round to the right number.
    if len(runs) == 0 or runs.min() < 0 or runs.max() > total or runs.sum() != total:
        raise ValueError(f"its runs do not fill the image's {total} pixels")
    if text is None:
        text = _fresh({"size": [height, width], "counts": runs.tolist()}, height, width)
    return {"size": [height, width], "counts": text}, int(runs[1::2].sum())


def read_polygons(polygons: Any, height: int, width: int) -> tuple[dict[str, Any], int]:
    """COCO's polygons [[x, y, x, y, ...], ...] of an image, filled: (the compressed code, pixels of 1s)."""
    if not isinstance(polygons, list) or not polygons:
        raise ValueError("segmentation is neither polygons nor a run-length code")
    for polygon in polygons:
        _check_polygon(polygon, height, width)
    from pycocotools import mask

    code = mask.merge(mask.frPyObjects(polygons, height, width))
    return {"size": [height, width], "counts": code["counts"]}, int(mask.area(code))


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    if not isinstance(polygon, list) or not all(type(value) in (int, float) for value in polygon):
        raise ValueError("a polygon is a list of numbers")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"a polygon holds {len(polygon)} numbers, expected x, y of three points or more")
    try:
        points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError:
        raise ValueError("a polygon holds a number that is too large") from None
    if not np.isfinite(points).all():
        raise ValueError("a polygon holds a number that is not finite")
    if (np.abs(points - (width / 2, height / 2)) > np.array([width, height]) * 1.5).any():
        raise ValueError(f"a polygon reaches further than its {width}x{height} image's own size beyond it")
    if np.abs(points - np.roll(points, 1, axis=0)).max(1).sum() > LONGEST_OUTLINE:
        raise ValueError(f"a polygon's outline is longer than {LONGEST_OUTLINE:,} pixels")


def _decompress(text: bytes) -> NDArray[np.int64]:
    """The runs of a compressed code. A run is written in digits of five bits, lowest first, each a character from "0" on whose
    sixth bit says that another follows; the last digit's fifth bit is the sign. From the fourth on, a run is written as the
    difference from the one two before it."""
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if len(digits) == 0 or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("the counts of its run-length code are damaged")
    ends = np.flatnonzero((digits & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MOST_BYTES_OF_A_RUN:
        raise ValueError("its run-length code holds a run that is too long")
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    runs -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _whole_numbers(counts: list[int]) -> NDArray[np.int64]:
    try:
        return np.array(counts, np.int64)
    except OverflowError:
        raise ValueError("its run-length code holds a run that is too long") from None


def _fresh(code: dict[str, Any], height: int, width: int) -> bytes:
    from pycocotools import mask

    return bytes(mask.frPyObjects(code, height, width)["counts"])
