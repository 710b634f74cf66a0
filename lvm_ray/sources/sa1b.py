"""SA-1B's tars: photos with the masks of their objects, which have no names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from lvm_ray.errors import BadItem
from lvm_ray.sources.base import Item, Region, Sample, Source
from lvm_ray.sources.files import decode_image, parse_json, printable, usable
from lvm_ray.sources.rle import read_rle
from lvm_ray.sources.tar import Member, list_members, list_tars, read_member
from lvm_ray.storage import split_name

LARGEST_JSON = 16 * 2**20  # bytes; of an image with a thousand objects it has one million


class Sa1bTars(Source):
    """SA-1B as published: tars with `sa_N.jpg` beside `sa_N.json`; one item an image, its regions largest first."""

    label: ClassVar[str] = "regions"

    format: Literal["sa1b"] = "sa1b"
    tars: str = Field(description="a folder of tars, one tar, or a pattern of tars (`SA-1B/sa_00*.tar`)")

    def items(self, where: str) -> Iterator[Item]:
        """In the order of the tars, then by name; a tar's listing is in memory, no more."""
        yield from usable((item for tar in list_tars(self.tars, f"{where}.tars") for item in _pairs(tar)), f"{where}.tars")

    def load(self, item: Item) -> Sample:
        tar, name = item.paths[0], item.original
        image = decode_image(read_member(tar, item.extra["image"], name), f"{tar}: {name}.jpg")
        content = parse_json(read_member(tar, item.extra["json"], name), f"{tar}: {name}.json")
        try:
            return Sample(image, _regions(content, *image.shape[:2]))
        except ValueError as error:
            raise BadItem(f"{tar}: {name}.json: {error}") from None


def _pairs(tar: str) -> Iterator[Item]:
    found: dict[str, dict[str, Member]] = {}
    for member in list_members(tar):
        stem, _, ending = member.name.rpartition("/")[2].rpartition(".")
        if member.problem:
            yield problem_item(tar, member, member.problem)
        elif ending not in ("jpg", "json"):
            continue
        elif ending in found.setdefault(stem, {}):
            yield problem_item(tar, member, f"{tar}: two members {stem}.{ending}: the first is used")
        elif ending == "json" and member.size > LARGEST_JSON:
            found[stem][ending] = member
            yield problem_item(tar, member, f"{tar}: {member.name} has {member.size:,} bytes; at most {LARGEST_JSON:,} are read")
        else:
            found[stem][ending] = member
    for stem in sorted(found):
        pair = found[stem]
        if len(pair) < 2:
            (there,) = pair.values()
            missing = "json" if "jpg" in pair else "jpg"
            yield problem_item(tar, there, f"{tar}: {there.name} has no {stem}.{missing} beside it")
        elif pair["json"].size <= LARGEST_JSON:
            extra = {"image": [pair["jpg"].offset, pair["jpg"].size], "json": [pair["json"].offset, pair["json"].size]}
            yield Item(f"{tar_name(tar)}/{stem}", stem, (tar,), extra)


def problem_item(tar: str, member: Member, problem: str) -> Item:
    """The item of a member that cannot be used; its id is no other's."""
    identity = f"{tar_name(tar)}/{printable(member.name) or 'damage'}@{member.offset}"
    return Item(identity, identity, (printable(tar),), problem=problem)


def tar_name(tar: str) -> str:
    return printable(split_name(tar)[1].removesuffix(".tar"))


def _regions(content: Any, height: int, width: int) -> list[Region]:
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise ValueError("has no list `annotations`")
    regions = []
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            raise ValueError(f"annotation {number} is no object")
        try:
            rle, area = read_rle(annotation.get("segmentation"), height, width)
        except ValueError as error:
            raise ValueError(f"annotation {str(annotation.get('id', number))[:40]}: {error}") from None
        if area:
            regions.append(Region(None, area, rle))
    if not regions:
        raise ValueError("no annotation covers a pixel")
    return sorted(regions, key=lambda region: -region.area)
