"""Pose: one person's joints as coloured discs on a dim skeleton, on black.

Data: a COCO person-keypoints JSON and its folder of images; one item per annotated person, or per image, whose skeletons are then
drawn together and whose largest person is read back and scored. Scores: `pck` (share of labelled joints within 0.2 x the longer
side of the person's true box) and `ap` (pycocotools' own COCOeval).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Field
from scipy.ndimage import gaussian_filter

from lvm_ray.sources.base import Source
from lvm_ray.sources.coco import CocoKeypoints, Person
from lvm_ray.tasks.base import PairTask, Picture, Sample, TrivialAnswer, View
from lvm_ray.tasks.colours import distances, palette
from lvm_ray.tasks.geometry import (
    random_crop,
    random_tint,
    random_turn,
    see_image,
    see_points,
    square_around,
    unsee_points,
    whole,
)

_PARTS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
JOINTS = ["nose"] + [f"{side}_{part}" for part in _PARTS for side in ("left", "right")]
MIRRORED = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]  # the joint that each becomes in a mirror
BONES = [
    (5, 7),
    (7, 9),
    (6, 8),
    (8, 10),
    (11, 13),
    (13, 15),
    (12, 14),
    (14, 16),
    (5, 6),
    (11, 12),
    (5, 11),
    (6, 12),
    (0, 5),
    (0, 6),
]
# The body first in the palette, so that the joints which every data set labels get the colours that lie furthest apart.
COLOUR_ORDER = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 0, 1, 2, 3, 4]
COLOURS = np.zeros((17, 3), dtype=np.uint8)
COLOURS[COLOUR_ORDER] = palette(17)
BONE_COLOUR = (48, 48, 48)  # dim, so that a bone is never mistaken for a joint

FAINTEST_JOINT = 0.03  # part of a full disc below which a joint counts as absent
COLOUR_REACH = 160.0  # RGB distance at which a pixel stops speaking for a joint
PCK_RADIUS = 0.2


class Pose(PairTask):
    """One label is a `Person`; an item is one annotated person of an image."""

    name: ClassVar[str] = "pose"
    sources: ClassVar[tuple[type[Source], ...]] = (CocoKeypoints,)
    metrics: ClassVar[dict[str, bool]] = {"pck": True, "ap": True}

    crop: float | None = Field(None, gt=0, description="view: square of this many times the person's box; null: the whole image")
    smallest_crop: float = Field(0.6, gt=0, le=1, description="smallest part of the view that an augmented copy shows")
    turn: float = Field(15.0, ge=0, le=180, description="degrees by which an augmented copy is turned at most, to either side")
    hue: float = Field(180.0, ge=0, le=180, description="degrees by which a copy's hues are turned at most; 0 keeps all colours")
    disc: float = Field(
        0.045, gt=0, lt=0.3, description="radius of a joint's disc, as a part of the picture's side; about 0.7 tokens"
    )

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        if self.crop is None:
            view = whole(sample.image)
        elif sample.label is None:  # a picture of one's own is taken for the person's box
            height, width = sample.image.shape[:2]
            view = square_around(width / 2, height / 2, max(height, width))
        else:
            x, y, width, height = sample.label.box
            view = square_around(x + width / 2, y + height / 2, max(width, height) * self.crop)
        if rng is None:
            return view
        view = self._crop_around_person(sample, view, rng)
        return random_tint(view, rng, self.hue) if self.hue else view

    def _crop_around_person(self, sample: Sample, view: View, rng: np.random.Generator) -> View:
        """A random turned crop that keeps every labelled joint: the first of a few tries, or else the whole view."""
        points = sample.label.array()
        points = points[points[:, 2] > 0, :2]
        for _ in range(8):
            crop = random_turn(random_crop(view, rng, self.smallest_crop), rng, self.turn)
            seen = see_points(points, crop, 1)
            if (seen > 0).all() and (seen < 1).all():
                return crop
        return View(view.box, mirrored=bool(rng.random() < 0.5))

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        """Image and joints through the view; in a mirror left and right joints change names before they are drawn."""
        joints, *others = (_see_joints(person, view, size) for person in (sample.label.joints, *sample.label.others))
        x, y, width, height = sample.label.box
        corners = see_points(np.array([[x, y], [x + width, y + height]]), view, size)
        low, high = corners.min(0), corners.max(0)
        scale = (size / (view.box[2] - view.box[0])) * (size / (view.box[3] - view.box[1]))
        box = [*low.tolist(), *(high - low).tolist()]
        person = Person(joints=joints, box=box, area=sample.label.area * scale, others=others)
        return Sample(see_image(sample.image, view, size), person)

    def draw(self, label: Person, size: int) -> Picture:
        """Bones dim, joints as discs on top, of the image's other people too. Where discs meet, each pixel belongs to the nearest
        joint, so that none covers another."""
        people = np.array([label.joints, *label.others], dtype=np.float64)
        labelled = [(k, j) for k in range(len(people)) for j in COLOUR_ORDER if people[k, j, 2] > 0]
        canvas = Image.new("RGB", (size, size))
        pen = ImageDraw.Draw(canvas)
        for joints in people:
            for a, b in BONES:
                if joints[a, 2] > 0 and joints[b, 2] > 0:
                    pen.line([*(joints[a, :2] - 0.5), *(joints[b, :2] - 0.5)], fill=BONE_COLOUR, width=max(1, round(size / 64)))
        picture = np.array(canvas)
        if not labelled:
            return picture
        centres_y, centres_x = np.mgrid[0:size, 0:size] + 0.5
        centres = people[tuple(zip(*labelled, strict=True))]
        away = np.hypot(centres_x[..., None] - centres[:, 0], centres_y[..., None] - centres[:, 1])
        nearest = away.argmin(-1)
        disc = away.min(-1) <= self._radius(size)
        picture[disc] = COLOURS[np.array(labelled)[nearest[disc], 1]]
        return picture

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Person:
        """Each joint is where most of its colour is: the centre of mass within a disc's reach of the densest place."""
        picture, view = pictures[0], views[0]
        size = picture.shape[0]
        joints = np.zeros((17, 3))
        colours = np.concatenate([COLOURS, np.array([[0, 0, 0], BONE_COLOUR], dtype=np.uint8)])
        away = distances(picture, colours)
        owner = away.argmin(-1)
        full = math.pi * self._radius(size) ** 2
        confidences = []
        for joint in range(17):
            weight = np.where(owner == joint, np.clip(1 - np.sqrt(away[..., joint]) / COLOUR_REACH, 0, 1), 0)
            if weight.sum() < FAINTEST_JOINT * full:
                continue
            x, y, mass = _densest(weight, self._radius(size))
            if mass < FAINTEST_JOINT * full:
                continue
            joints[joint] = (x, y, 2)
            confidences.append(min(1.0, mass / full))
        joints[:, :2] = unsee_points(joints[:, :2], view, size)
        if view.mirrored:
            joints = joints[MIRRORED]
        found = joints[:, 2] > 0
        joints[~found] = 0
        low, high = (joints[found, :2].min(0), joints[found, :2].max(0)) if found.any() else (np.zeros(2), np.zeros(2))
        width, height = (high - low).tolist()
        score = sum(confidences) / 17
        return Person(joints=joints.tolist(), box=[*low.tolist(), width, height], area=width * height, score=score)

    def _radius(self, size: int) -> float:
        return max(2.0, self.disc * size)

    def measure(self, answer: Person, sample: Sample) -> dict[str, Any]:
        """Joints labelled and joints found within reach (for `pck`), and both people as COCO annotations (for `ap`)."""
        truth, found = sample.label.array(), answer.array()
        labelled = truth[:, 2] > 0
        reach = PCK_RADIUS * max(sample.label.box[2:])
        hit = labelled & (found[:, 2] > 0) & (np.linalg.norm(truth[:, :2] - found[:, :2], axis=1) <= reach)
        return {
            "labelled": int(labelled.sum()),
            "hit": int(hit.sum()),
            "truth": _coco(sample.label),
            "answer": _coco(answer) if found[:, 2].any() else None,
        }

    def score(self, measures: Sequence[dict[str, Any]]) -> dict[str, float]:
        pck = sum(m["hit"] for m in measures) / max(1, sum(m["labelled"] for m in measures))
        return {"pck": pck, "ap": float(_average_precision(measures, np.arange(len(measures))[None])[0])}

    def resampled_scores(self, measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        hit, labelled = (np.array([m[key] for m in measures]) for key in ("hit", "labelled"))
        pck = hit[draws].sum(1) / np.maximum(1, labelled[draws].sum(1))
        return {"pck": pck, "ap": _average_precision(measures, draws)}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        """The mean training pose, laid into the person's true box."""
        placed = []
        for sample in training:
            joints = sample.label.array()
            x, y, width, height = sample.label.box
            joints[:, :2] = (joints[:, :2] - (x, y)) / (max(width, 1e-6), max(height, 1e-6))
            placed.append(joints)
        stack = np.stack(placed)
        known = stack[..., 2] > 0
        times = known.sum(0)
        mean = (stack[..., :2] * known[..., None]).sum(0) / np.maximum(times, 1)[:, None]

        def mean_pose(sample: Sample) -> Person:
            x, y, width, height = sample.label.box
            joints = np.concatenate([mean * (width, height) + (x, y), np.where(times > 0, 2.0, 0.0)[:, None]], 1)
            return Person(joints=joints.tolist(), box=sample.label.box, area=sample.label.area)

        return [TrivialAnswer("mean pose in the box", mean_pose)]

    def save(self, answer: Person, sample: Sample, stem: str) -> list[str]:
        """STEM-keypoints.json: COCO results, one person."""
        path = Path(f"{stem}-keypoints.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"image_id": path.stem, "category_id": 1, **_coco(answer)}], indent=1))
        return [str(path)]


def _see_joints(joints: list[list[float]], view: View, size: int) -> list[list[float]]:
    """Joints through a view; in a mirror left and right joints change names."""
    seen = np.array(joints, dtype=np.float64)
    seen[:, :2] = see_points(seen[:, :2], view, size)
    named: list[list[float]] = (seen[MIRRORED] if view.mirrored else seen).tolist()
    return named


def _densest(weight: NDArray[np.floating[Any]], radius: float) -> tuple[float, float, float]:
    """Centre of mass x, y and mass of the weights within 1.5 radii of the place where they are densest."""
    smooth = gaussian_filter(weight, radius / 2, mode="constant")
    top, left = np.unravel_index(int(smooth.argmax()), smooth.shape)
    rows, columns = np.mgrid[0 : weight.shape[0], 0 : weight.shape[1]]
    near = np.where(np.hypot(rows - top, columns - left) <= 1.5 * radius, weight, 0)
    mass = float(near.sum())
    if mass == 0:
        return 0.0, 0.0, 0.0
    return float((near * (columns + 0.5)).sum() / mass), float((near * (rows + 0.5)).sum() / mass), mass


def _coco(person: Person) -> dict[str, Any]:
    joints = person.array().round(3)
    return {
        "keypoints": joints.reshape(-1).tolist(),
        "num_keypoints": int((joints[:, 2] > 0).sum()),
        "bbox": [round(value, 3) for value in person.box],
        "area": round(person.area, 3),
        "score": round(person.score, 6),
    }


def _average_precision(measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """COCOeval's keypoint AP for each row of `draws` [R, n]. People are matched once; only the accumulation is redone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    people = range(1, len(measures) + 1)
    truths = [
        {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, **m["truth"]} for i, m in zip(people, measures, strict=True)
    ]
    answers = [{"image_id": i, "category_id": 1, **m["answer"]} for i, m in zip(people, measures, strict=True) if m["answer"]]
    if not answers:
        return np.zeros(len(draws))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": [{"id": i} for i in people], "annotations": truths, "categories": [{"id": 1}]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(answers), "keypoints")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        matched = list(evaluation.evalImgs)
        precisions = []
        for row in draws:
            evaluation.evalImgs = [matched[i] for i in row]
            evaluation.accumulate()
            precision = evaluation.eval["precision"][:, :, 0, 0, 0]
            precisions.append(precision[precision > -1].mean() if (precision > -1).any() else 0.0)
    return np.array(precisions, dtype=np.float64)
