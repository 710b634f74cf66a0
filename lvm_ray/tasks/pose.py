"""Pose: people's joints as coloured discs on dim skeletons, on black.

Data: a COCO person-keypoints JSON and its folder of images; one item per annotated person, or per image, whose people are then
drawn and read back together. Scores: `pck`, `pck_0.1` and `pck_0.05` (share of labelled joints within 0.2, 0.1 and 0.05 x the
longer side of the person's true box), `ap` and `ar` (pycocotools' own COCOeval).
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from lvm_ray.sources.base import Source
from lvm_ray.sources.coco import CocoKeypoints, Person
from lvm_ray.tasks.base import PairTask, Picture, Sample, TrivialAnswer, View
from lvm_ray.tasks.colours import distances, palette
from lvm_ray.tasks.geometry import (
    crop_that_keeps,
    random_tint,
    see_image,
    see_points,
    square_around,
    unsee_points,
    whole,
)
from lvm_ray.tasks.skeletons import Joint, find_joints, gather

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
FAINTEST_OF_SEVERAL = 0.2  # the same where several people are looked for: what is left of a disc must not become one
MOST_PEOPLE = 20  # of a picture, as COCO counts them: a photo in place of an answer has hundreds of spots of any colour
FEWEST_JOINTS = 3  # of somebody who is found among several people
PCK_RADII = {"pck": 0.2, "pck_0.1": 0.1, "pck_0.05": 0.05}


class Pose(PairTask):
    """One label is a `Person`; an item is one annotated person of an image."""

    name: ClassVar[str] = "pose"
    sources: ClassVar[tuple[type[Source], ...]] = (CocoKeypoints,)
    metrics: ClassVar[dict[str, bool]] = {**dict.fromkeys(PCK_RADII, True), "ap": True, "ar": True}

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
        joints = sample.label.array()
        view = crop_that_keeps(joints[joints[:, 2] > 0, :2], view, rng, self.smallest_crop, self.turn)
        return random_tint(view, rng, self.hue) if self.hue else view

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        """Image and joints through the view; in a mirror left and right joints change names before they are drawn."""
        person, *others = (_see_person(one, view, size) for one in sample.label.everyone)
        return Sample(see_image(sample.image, view, size), person.model_copy(update={"others": others}))

    def draw(self, label: Person, size: int) -> Picture:
        """Bones dim, joints as discs on top, of the image's other people too. Where discs meet, each pixel belongs to the nearest
        joint, so that none covers another."""
        people = np.array([person.joints for person in label.everyone], dtype=np.float64)
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
        """One person: each joint is where most of its colour is, the centre of mass within a disc's reach of the densest place.
        Where labels hold several people, all their discs, by the bones between them (`skeletons.py`)."""
        picture, view, radius = pictures[0], views[0], self._radius(pictures[0].shape[0])
        most, faintest = (MOST_PEOPLE, FAINTEST_OF_SEVERAL) if self.several else (1, FAINTEST_JOINT)
        found = [
            joint
            for kind, weight_HW in enumerate(_colour_weights(picture))
            for joint in find_joints(weight_HW, kind, radius, faintest, most)
        ]
        if not self.several:
            return person_in(found, view, picture.shape[0])
        groups = gather(found, BONES, picture.max(axis=-1) > max(BONE_COLOUR) / 2, radius)
        people = [person_in(group, view, picture.shape[0]) for group in groups if len(group) >= FEWEST_JOINTS]
        first, *others = sorted(people, key=lambda person: -person.area) or [person_in([], view, picture.shape[0])]
        return first.model_copy(update={"others": others})

    @property
    def several(self) -> bool:
        """Whether a label holds all people of its image."""
        sources = (self.train, self.validation, self.test)
        return any(isinstance(source, CocoKeypoints) and source.people == "all" for source in sources)

    def _radius(self, size: int) -> float:
        return max(2.0, self.disc * size)

    def measure(self, answer: Person, sample: Sample) -> dict[str, Any]:
        """Joints labelled and joints found within each reach (for the PCKs), and all people as COCO annotations (for AP and AR).

        Of several people, each answer stands for at most one true person: as the joints that hit are most.
        """
        truths, answers = sample.label.everyone, [person for person in answer.everyone if person.array()[:, 2].any()]
        hits = [[_hits(truth, found) for found in answers] for truth in truths]
        hits_TAR = np.array(hits).reshape(len(truths), len(answers), len(PCK_RADII))
        pairs = linear_sum_assignment(-hits_TAR.sum(axis=-1))
        hits_R = hits_TAR[pairs].sum(axis=0).tolist()
        return {
            "labelled": int(sum((truth.array()[:, 2] > 0).sum() for truth in truths)),
            "hit": hits_R[0],
            **{f"hit_{radius:g}": hits for radius, hits in list(zip(PCK_RADII.values(), hits_R, strict=True))[1:]},
            "truth": [_coco(truth) for truth in truths],
            "answer": [_coco(found) for found in answers],
        }

    def shows_nothing(self, answer: Person) -> bool:
        return not answer.array()[:, 2].any()

    def score(self, measures: Sequence[dict[str, Any]]) -> dict[str, float]:
        everything = np.arange(len(measures))[None]
        return {name: float(values[0]) for name, values in self.resampled_scores(measures, everything).items()}

    def resampled_scores(self, measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        labelled = np.array([m["labelled"] for m in measures])[draws].sum(1)
        keys = ["hit", *(f"hit_{radius:g}" for radius in list(PCK_RADII.values())[1:])]
        scores: dict[str, NDArray[np.float64]] = {
            name: np.array([m[key] for m in measures])[draws].sum(1) / np.maximum(1, labelled)
            for name, key in zip(PCK_RADII, keys, strict=True)
        }
        precision, recall = _average_precision_and_recall(measures, draws)
        return scores | {"ap": precision, "ar": recall}

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
        """STEM-keypoints.json: COCO results, an entry a person."""
        path = Path(f"{stem}-keypoints.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"image_id": path.stem, "category_id": 1, **_coco(person)} for person in answer.everyone]
        path.write_text(json.dumps(entries, indent=1))
        return [str(path)]


def _see_person(person: Person, view: View, size: int) -> Person:
    """One person through a view, without the others."""
    x, y, width, height = person.box
    corners = see_points(np.array([[x, y], [x + width, y + height]]), view, size)
    low, high = corners.min(0), corners.max(0)
    scale = (size / (view.box[2] - view.box[0])) * (size / (view.box[3] - view.box[1]))
    box = [*low.tolist(), *(high - low).tolist()]
    return Person(joints=_see_joints(person.joints, view, size), box=box, area=person.area * scale)


def _see_joints(joints: list[list[float]], view: View, size: int) -> list[list[float]]:
    """Joints through a view; in a mirror left and right joints change names."""
    seen = np.array(joints, dtype=np.float64)
    seen[:, :2] = see_points(seen[:, :2], view, size)
    named: list[list[float]] = (seen[MIRRORED] if view.mirrored else seen).tolist()
    return named


def _colour_weights(picture: Picture) -> Iterator[NDArray[np.float64]]:
    """How much of each joint's colour every pixel is, 0..1 [H, W], one joint after another: nothing where another is nearer."""
    colours = np.concatenate([COLOURS, np.array([[0, 0, 0], BONE_COLOUR], dtype=np.uint8)])
    away = distances(picture, colours)
    owner = away.argmin(-1)
    for kind in range(len(COLOURS)):
        yield np.where(owner == kind, np.clip(1 - np.sqrt(away[..., kind]) / COLOUR_REACH, 0, 1), 0)


def person_in(found: Sequence[Joint], view: View, size: int) -> Person:
    """Joints of one person in a picture as a label in the image's own pixels: the box is theirs, the score their confidence."""
    joints = np.zeros((17, 3))
    for joint in found:
        joints[joint.kind] = (joint.x, joint.y, 2)
    joints[:, :2] = unsee_points(joints[:, :2], view, size)
    if view.mirrored:
        joints = joints[MIRRORED]
    known = joints[:, 2] > 0
    joints[~known] = 0
    low, high = (joints[known, :2].min(0), joints[known, :2].max(0)) if known.any() else (np.zeros(2), np.zeros(2))
    width, height = (high - low).tolist()
    score = sum(joint.confidence for joint in found) / 17
    return Person(joints=joints.tolist(), box=[*low.tolist(), width, height], area=width * height, score=score)


def _hits(truth: Person, found: Person) -> list[int]:
    """Labelled joints that are found within each of PCK_RADII."""
    wanted, seen = truth.array(), found.array()
    both = (wanted[:, 2] > 0) & (seen[:, 2] > 0)
    away = np.linalg.norm(wanted[:, :2] - seen[:, :2], axis=1) / max(truth.box[2:])
    return [int((both & (away <= radius)).sum()) for radius in PCK_RADII.values()]


def _coco(person: Person) -> dict[str, Any]:
    joints = person.array().round(3)
    return {
        "keypoints": joints.reshape(-1).tolist(),
        "num_keypoints": int((joints[:, 2] > 0).sum()),
        "bbox": [round(value, 3) for value in person.box],
        "area": round(person.area, 3),
        "score": round(person.score, 6),
    }


def _average_precision_and_recall(
    measures: Sequence[dict[str, Any]], draws: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """COCOeval's keypoint AP and AR for each row of `draws` [R, n]. People are matched once; only the accumulation is redone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = range(1, len(measures) + 1)
    of_images = list(zip(images, measures, strict=True))
    truths = [{"image_id": i, "category_id": 1, "iscrowd": 0, **one} for i, m in of_images for one in m["truth"]]
    answers = [{"image_id": i, "category_id": 1, **one} for i, m in of_images for one in m["answer"]]
    if not answers:
        return np.zeros(len(draws)), np.zeros(len(draws))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        numbered = [{"id": number, **one} for number, one in enumerate(truths, 1)]
        truth.dataset = {"images": [{"id": i} for i in images], "annotations": numbered, "categories": [{"id": 1}]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(answers), "keypoints")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        matched = list(evaluation.evalImgs)
        found = []
        for row in draws:
            # It looks at as many entries as there are images, and leaves out what is None.
            evaluation.evalImgs = [matched[i] for i in row] + [None] * (len(matched) - len(row))
            evaluation.accumulate()
            each = (evaluation.eval["precision"][:, :, 0, 0, 0], evaluation.eval["recall"][:, 0, 0, 0])
            found.append([values[values > -1].mean() if (values > -1).any() else 0.0 for values in each])
    precisions, recalls = np.array(found, dtype=np.float64).T
    return precisions, recalls
