"""Galleries: what was asked, what is true and what each run answered, side by side.

Pictures go into the page as PNG data URIs. They are decoded and written anew, so that a file can bring nothing else
along, and only files below the run folder are read.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvm_ray.errors import UserError
from lvm_ray.report.words import finite, metric_of, number

LARGEST = 256  # side of a picture in the page; larger ones are made smaller
PIXELATED_BELOW = 128  # a smaller picture is shown with its pixels as they are
FIRST = 8  # shown of each task, and as many again that stand out
WHY = ("best", "median", "worst")  # what an item is shown for, in the order of the page

Gallery = tuple[str, Path, Sequence[Mapping[str, Any]]]  # a run's name, its folder, and the entries of its gallery.json


@dataclass(frozen=True)
class Shown:
    """A picture in the page, with a word on it. `uri` None: there is no such picture."""

    uri: str | None
    alt: str
    score: str = ""
    pixelated: bool = True


@dataclass(frozen=True)
class Row:
    """One item: query, truth, then every run's answer. `why` is one of WHY, empty of an item that is only one of the first."""

    item: str
    why: str
    pictures: tuple[Shown, ...]


@dataclass(frozen=True)
class Part:
    """Rows that stand below one another, under a heading where there is one to give."""

    title: str
    rows: Sequence[Row]


def gallery_rows(task: str, galleries: Sequence[Gallery], main: int) -> list[Row]:
    """The rows of a task, every run's answers beside each other: the first items, then those that stand out, from best to worst.

    The entries of the gallery number `main` decide which items are shown, and bring query and truth.
    """
    by_item = [{str(entry.get("item")): entry for entry in entries if entry.get("task") == task} for _, _, entries in galleries]
    folder = galleries[main][1]
    known = [(item, entry, _why(entry)) for item, entry in by_item[main].items()]
    first, more = known[:FIRST], [one for one in known[FIRST:] if one[2]][:FIRST]
    rows = []
    for item, entry, why in [*first, *sorted(more, key=lambda one: WHY.index(one[2]))]:
        pictures = [_shown(folder, entry, part, f"{task}, {item}: {part}") for part in ("query", "truth")]
        for (name, place, _), entries in zip(galleries, by_item, strict=True):
            answer = entries.get(item, {})
            pictures.append(_shown(place, answer, "answer", f"{task}, {item}: {name}", item_score(answer)))
        rows.append(Row(item, why, tuple(pictures)))
    return rows


def parts(rows: Sequence[Row]) -> list[Part]:
    """Rows in two parts that stand side by side where there is room: the first ones and those that stand out, or two halves."""
    if len(rows) > FIRST:
        return [Part("the first items", rows[:FIRST]), Part("the best, the middle and the worst", rows[FIRST:])]
    half = math.ceil(len(rows) / 2)
    return [Part("", part) for part in (rows[:half], rows[half:]) if part]


def item_score(entry: Mapping[str, Any]) -> str:
    """An item's own score in words, by its measures where they have an obvious one, overlap, joints found, decibels; else by the
    main metric over it alone; else nothing."""
    match entry.get("measures"):
        case {"intersection": list(shared), "union": list(either)} if len(shared) == len(either):
            overlaps = [inner / outer for inner, outer in zip(shared, either, strict=True) if outer]
            return f"IoU {sum(overlaps) / len(overlaps):.2f}" if overlaps else ""
        case {"hit": int(hit), "labelled": int(labelled)}:
            return f"{hit} of {labelled} joints"
        case {"psnr_y": float(decibels) | int(decibels)}:
            return f"{decibels:.1f} dB"
    score = finite(entry.get("score"))
    if score is None:
        return ""
    metric = metric_of(str(entry.get("metric", "")))
    return f"{metric.label} {number(score, min(metric.digits, 2))}".strip()


def _why(entry: Mapping[str, Any]) -> str:
    """What an entry says it is shown for; galleries that were made earlier do not say."""
    return str(entry.get("why")) if entry.get("why") in WHY else ""


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
