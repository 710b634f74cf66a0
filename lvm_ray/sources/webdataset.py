"""WebDataset's tars, as LAION is downloaded: images without labels, each among files of its name (`000000000.jpg .txt .json`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from lvm_ray.sources.base import Item, Sample, Source
from lvm_ray.sources.files import decode_image, is_image, usable
from lvm_ray.sources.sa1b import problem_item, tar_name
from lvm_ray.sources.tar import list_members, list_tars, read_member


class WebdatasetTars(Source):
    """The images of WebDataset's tars; other files beside them are passed over."""

    label: ClassVar[str] = "none"

    format: Literal["webdataset"] = "webdataset"
    tars: str = Field(description="a folder of tars, one tar, or a pattern of tars (`laion/000*.tar`)")

    def items(self, where: str) -> Iterator[Item]:
        """In the order of the tars and in them; a tar's names are in memory, no more."""
        tars = list_tars(self.tars, f"{where}.tars")
        yield from usable((item for tar in tars for item in _images(tar)), f"{where}.tars")

    def load(self, item: Item) -> Sample:
        tar = item.paths[0]
        return Sample(decode_image(read_member(tar, item.extra["image"], item.id), f"{tar}: {item.id}"), None)


def _images(tar: str) -> Iterator[Item]:
    """WebDataset's key is a name up to its first dot (`0002` of `0002.v2.jpg`); what kind of file it is says the last ending."""
    seen: set[str] = set()
    for member in list_members(tar):
        folder, slash, base = member.name.rpartition("/")
        name = f"{tar_name(tar)}/{folder}{slash}{base.partition('.')[0]}"
        if member.problem:
            yield problem_item(tar, member, member.problem)
        elif not is_image(base):
            continue
        elif name in seen:
            yield problem_item(tar, member, f"{tar}: {member.name} is a second image of {name}: the first is used")
        else:
            seen.add(name)
            yield Item(name, name, (tar,), {"image": [member.offset, member.size]})
