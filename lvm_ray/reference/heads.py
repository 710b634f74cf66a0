"""What a reference network learns of a task, and how its outputs become a label in the image's own pixels.

    segmentation           a class for each pixel; cross-entropy
    pose, of one person    a map for each joint, whose pixels compete for where it is; cross-entropy
    every other task       the label picture, as what differs from the image; the logarithm of the squared error

No tokenizer and no drawing stands between: classes and joints are answered as such, and only pictures are read as pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lvm_ray.sources.coco import Person
from lvm_ray.tasks.base import PairTask, Sample, View
from lvm_ray.tasks.pose import JOINTS, Pose, person_in
from lvm_ray.tasks.segmentation import Segmentation
from lvm_ray.tasks.skeletons import Joint

SPREAD = 1 / 32  # of the picture's side: the deviation of a joint's target, and the reach within which its place is read
LEAST_ERROR = 1e-5  # added to squared errors (of pixels in 0..1), so that a perfect answer has a logarithm


class Head(ABC):
    """A task's side of a reference network: `channels` maps [B, C, S, S] of it mean something here."""

    name: ClassVar[str]
    rate: ClassVar[float]  # peak learning rate of AdamW; docs/results.md has trials of half and of twice as much
    channels: int

    @abstractmethod
    def target(self, seen: Sample, size: int) -> NDArray[Any]:
        """What is to be learnt of a sample seen through a view, as an array of one shape and type for all."""

    @abstractmethod
    def loss(self, maps_BCSS: Tensor, pixels_B3SS: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch; `pixels` in -1..1."""

    @abstractmethod
    def answer(self, maps_QCSS: Tensor, pixels_Q3SS: Tensor, views: Sequence[View], sample: Sample) -> Any:
        """The label of a sample, in its own pixels, out of the maps of its views (`task.questions`)."""


class Classes(Head):
    """A class, or background, for each pixel."""

    name: ClassVar[str] = "U-Net of classes"
    rate: ClassVar[float] = 1e-2

    def __init__(self, task: Segmentation) -> None:
        self.channels = len(task.classes) + task.background
        self._ignore = task.ignore

    def target(self, seen: Sample, size: int) -> NDArray[np.uint8]:
        mask: NDArray[np.uint8] = seen.label
        return mask

    def loss(self, maps_BCSS: Tensor, pixels_B3SS: Tensor, targets: Tensor) -> Tensor:
        losses_BSS = F.cross_entropy(maps_BCSS, targets.long(), ignore_index=self._ignore, reduction="none")
        return losses_BSS.sum() / (targets != self._ignore).sum().clamp(min=1)

    def answer(self, maps_QCSS: Tensor, pixels_Q3SS: Tensor, views: Sequence[View], sample: Sample) -> NDArray[np.uint8]:
        """The view is the whole image, so the maps are widened to it before the likeliest class is taken."""
        maps_1CHW = F.interpolate(maps_QCSS, sample.image.shape[:2], mode="bilinear", align_corners=False)
        return maps_1CHW[0].argmax(dim=0).numpy().astype(np.uint8)


class Joints(Head):
    """Where each joint of one person is."""

    name: ClassVar[str] = "U-Net of joint heatmaps"
    rate: ClassVar[float] = 1e-2
    channels = len(JOINTS)

    def target(self, seen: Sample, size: int) -> NDArray[np.float32]:
        """float32 [17, 3]: x, y in the picture, and 1 where the joint is labelled and lies in it."""
        joints: NDArray[np.float64] = seen.label.array()
        inside = ((joints[:, :2] >= 0) & (joints[:, :2] < size)).all(axis=1)
        return np.column_stack([joints[:, :2], (joints[:, 2] > 0) & inside]).astype(np.float32)

    def loss(self, maps_BCSS: Tensor, pixels_B3SS: Tensor, targets: Tensor) -> Tensor:
        size = maps_BCSS.shape[-1]
        centres_S = torch.arange(size) + 0.5
        away_BC2S = (centres_S - targets[..., :2, None]) / (SPREAD * size)
        across_BCS, down_BCS = torch.softmax(-(away_BC2S**2) / 2, dim=-1).unbind(dim=2)
        logs_BCSS = F.log_softmax(maps_BCSS.flatten(2), dim=-1).view_as(maps_BCSS)
        losses_BC = -torch.einsum("bcyx,bcy,bcx->bc", logs_BCSS, down_BCS, across_BCS)
        labelled_BC = targets[..., 2]
        return (losses_BC * labelled_BC).sum() / labelled_BC.sum().clamp(min=1)

    def answer(self, maps_QCSS: Tensor, pixels_Q3SS: Tensor, views: Sequence[View], sample: Sample) -> Person:
        return person_in(read_joints(maps_QCSS[0]), views[0], maps_QCSS.shape[-1])


class Picture(Head):
    """The label picture itself."""

    name: ClassVar[str] = "U-Net of what differs"
    rate: ClassVar[float] = 3e-3
    channels = 3

    def __init__(self, task: PairTask) -> None:
        self._task = task

    def target(self, seen: Sample, size: int) -> NDArray[np.uint8]:
        return self._task.draw(seen.label, size)

    def loss(self, maps_BCSS: Tensor, pixels_B3SS: Tensor, targets: Tensor) -> Tensor:
        """PSNR's own shape: each picture's error counts by its logarithm."""
        wrong_B3SS = self._pictures(maps_BCSS, pixels_B3SS) - targets.permute(0, 3, 1, 2) / 255
        return torch.log(wrong_B3SS.square().mean(dim=(1, 2, 3)) + LEAST_ERROR).mean()

    def answer(self, maps_QCSS: Tensor, pixels_Q3SS: Tensor, views: Sequence[View], sample: Sample) -> Any:
        pictures_QSS3 = (self._pictures(maps_QCSS, pixels_Q3SS).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
        return self._task.read(list(pictures_QSS3.numpy().astype(np.uint8)), views, sample)

    def _pictures(self, maps_BCSS: Tensor, pixels_B3SS: Tensor) -> Tensor:
        """In 0..1, and beyond where the network errs."""
        return (pixels_B3SS + 1) / 2 + maps_BCSS


def head_of(task: PairTask) -> Head:
    """What a reference network of this task learns."""
    if isinstance(task, Segmentation):
        return Classes(task)
    if isinstance(task, Pose) and not task.several:
        return Joints()
    return Picture(task)


def read_joints(maps_CSS: Tensor) -> list[Joint]:
    """The place of each joint in pixels: the centre of mass around the likeliest pixel, whose confidence is that mass."""
    size = maps_CSS.shape[-1]
    likely_CSS = torch.softmax(maps_CSS.flatten(1), dim=-1).view_as(maps_CSS).double()
    centres_S = torch.arange(size, dtype=torch.float64) + 0.5
    found = []
    for kind, likely_SS in enumerate(likely_CSS):
        row, column = divmod(int(likely_SS.argmax()), size)
        away_SS = torch.hypot(centres_S[:, None] - centres_S[row], centres_S - centres_S[column])
        near_SS = torch.where(away_SS <= 2 * SPREAD * size, likely_SS, 0)
        mass = float(near_SS.sum())
        x, y = float(near_SS.sum(dim=0) @ centres_S) / mass, float(near_SS.sum(dim=1) @ centres_S) / mass
        found.append(Joint(kind, x, y, mass))
    return found
