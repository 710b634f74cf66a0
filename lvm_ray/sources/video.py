"""Clips as folders of frames, which is how HD-VILA's videos are read once they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from lvm_ray.errors import BadItem, UserError
from lvm_ray.sources.base import Item, Sample, Source
from lvm_ray.sources.files import is_image, list_matches, list_names, natural, printable, problem_of, read_image, usable
from lvm_ray.storage import join


class VideoFrames(Source):
    """Folders of frames, one a clip; one item is `length` frames of a clip, `stride` apart.

    The items of a clip share no frame: they start every length x stride frames, as long as the clip has frames for one more.
    """

    label: ClassVar[str] = "frames"

    format: Literal["frames"] = "frames"
    clips: str = Field(description="folder of clips, each a folder of frames; or a pattern (`GoPro/train/*/sharp`)")
    length: int = Field(8, ge=2, description="frames of an item")
    stride: int = Field(1, ge=1, description="how many frames on the next one is")

    def items(self, where: str) -> Iterator[Item]:
        """Clips and their frames in natural order (`frame9` before `frame10`); one clip's listing is in memory."""
        pattern = self.clips if "*" in self.clips else join(self.clips.rstrip("/"), "*")
        clips = list_matches(pattern, f"{where}.clips")
        yield from usable((item for clip, folder in clips for item in self._clip(clip, folder, where)), f"{where}.clips")

    def _clip(self, clip: str, folder: str, where: str) -> Iterator[Item]:
        name = printable(clip)
        try:
            frames = sorted(filter(is_image, list_names(folder, where, "a folder of frames")[0]), key=natural)
        except UserError as error:
            yield Item(name, name, (printable(folder),), problem=str(error))
            return
        reach = (self.length - 1) * self.stride + 1
        if len(frames) < reach:
            problem = f"{printable(folder)}: {len(frames)} frames, an item takes {reach}"
            yield Item(name, name, (printable(folder),), problem=problem)
        for start in range(0, len(frames) - reach + 1, self.length * self.stride):
            paths = [join(folder, frame) for frame in frames[start : start + reach : self.stride]]
            unfit = next(filter(None, map(problem_of, paths)), None)
            yield Item(f"{name}/{start:06d}", name, tuple(map(printable, paths)), problem=unfit)

    def load(self, item: Item) -> Sample:
        frames = [read_image(path) for path in item.paths]
        for path, frame in zip(item.paths, frames, strict=True):
            if frame.shape != frames[0].shape:
                height, width = frames[0].shape[:2]
                raise BadItem(f"{path}: {frame.shape[1]}x{frame.shape[0]} pixels, the first frame {width}x{height}")
        return Sample(frames[0], frames)


class FramePairs(VideoFrames):
    """Folders of frames, one a clip; one item is a frame and the one `stride` after it."""

    length: Literal[2] = Field(2, description="a frame and the next one")
