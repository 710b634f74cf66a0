"""Galleries: what was asked, what is true and what each run answered, side by side.

Pictures go into the page as PNG data URIs. They are decoded and written anew, so that a file can bring nothing else
along, and only files below the run folder are read.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvm_ray.errors import UserError

LARGEST = 256  # side of a picture in the page; larger ones are made smaller
PIXELATED_BELOW = 128  # a smaller picture is shown with its pixels as they are
ITEMS = 8  # shown of each task


@dataclass(frozen=True)
class Shown:
    """A picture in the page, with a word on it. `uri` None: there is no such picture."""

    uri: str | None
    alt: str
    score: str = ""
    pixelated: bool = True


@dataclass(frozen=True)
class Row:
    """One item: query, truth, then every run's answer."""

    item: str
    pictures: tuple[Shown, ...]


def gallery_rows(task: str, galleries: Sequence[tuple[str, Path, Sequence[Mapping[str, Any]]]]) -> list[Row]:
    """The rows of a task from (role, run folder, entries of its gallery.json), every run's answers beside each other.

    The last run's entries decide which items are shown, and bring query and truth.
    """
    by_item = [{str(entry.get("item")): entry for entry in entries if entry.get("task") == task} for _, _, entries in galleries]
    rows = []
    for item, entry in list(by_item[-1].items())[:ITEMS]:
        folder = galleries[-1][1]
        pictures = [_shown(folder, entry, part, f"{task}, {item}: {part}") for part in ("query", "truth")]
        for (role, place, _), entries in zip(galleries, by_item, strict=True):
            answer = entries.get(item, {})
            pictures.append(_shown(place, answer, "answer", f"{task}, {item}: {role}", item_score(answer.get("measures"))))
        rows.append(Row(item, tuple(pictures)))
    return rows


def item_score(measures: Any) -> str:
    """An item's own score where its measures have an obvious one: overlap, joints found, decibels; else nothing."""
    if not isinstance(measures, Mapping):
        return ""
    match measures:
        case {"intersection": list(shared), "union": list(either)} if len(shared) == len(either):
            overlaps = [inner / outer for inner, outer in zip(shared, either, strict=True) if outer]
            return f"IoU {sum(overlaps) / len(overlaps):.2f}" if overlaps else ""
        case {"hit": int(hit), "labelled": int(labelled)}:
            return f"{hit} of {labelled} joints"
        case {"psnr_y": float(decibels) | int(decibels)}:
            return f"{decibels:.1f} dB"
    return ""


def data_uri(path: Path) -> tuple[str, int]:
    """A picture file as a PNG data URI, and its larger side in pixels as shown. Raises UserError where it is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise UserError(f"{path}: cannot read this picture of the gallery: run lvm-ray evaluate again") from None
    picture.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}", max(picture.size)


def _shown(folder: Path, entry: Mapping[str, Any], part: str, alt: str, score: str = "") -> Shown:
    name = entry.get(part)
    if not isinstance(name, str):
        return Shown(None, alt)
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{folder}/gallery.json: {name!r} lies outside the run folder: name files below it")
    if not path.is_file():
        return Shown(None, alt, score)
    uri, side = data_uri(path)
    return Shown(uri, alt, score, pixelated=side < PIXELATED_BELOW)
