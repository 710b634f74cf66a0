"""Paired augmentation, proven: under every augmentation of every task a marked place and its label land in the same place."""

import numpy as np
import pytest
from pycocotools import mask as coco

from lvm_ray.sources.base import Region
from lvm_ray.sources.coco import Person
from lvm_ray.tasks import TASKS, Sample, Task, View
from lvm_ray.tasks.detect import outline
from lvm_ray.tasks.objects import Objects
from lvm_ray.tasks.pose import COLOURS, JOINTS, MIRRORED, Pose
from lvm_ray.tasks.regions import paint

SIZE = 96
SIDE = 128  # of the image
MARK = 12
COPIES = 24
WITHIN = 1.5  # pixels between the marked place and its label: resampling moves a centre by less than one

# One augmentation alone, then all; mirroring goes with every crop, half of the time.
AUGMENTATIONS = {
    "mirror": {"smallest_crop": 1.0, "turn": 0.0, "hue": 0.0},
    "crop": {"smallest_crop": 0.4, "turn": 0.0, "hue": 0.0},
    "turn": {"smallest_crop": 1.0, "turn": 25.0, "hue": 0.0},
    "tint": {"smallest_crop": 1.0, "turn": 0.0, "hue": 60.0},
    "all": {"smallest_crop": 0.4, "turn": 25.0, "hue": 60.0},
}

LABELLED = {name for name in TASKS if TASKS[name].__module__.startswith("lvm_ray")} - {"images"}


def marked(x: int, y: int) -> np.ndarray:
    """A dark image with a bright square whose centre is x, y."""
    image = np.full((SIDE, SIDE, 3), 20, np.uint8)
    image[y - MARK // 2 : y + MARK // 2, x - MARK // 2 : x + MARK // 2] = 250
    return image


def mark_mask(image: np.ndarray) -> np.ndarray:
    return np.asarray(image[..., 0] > 128, np.uint8)


def person_at(x: int, y: int) -> Person:
    """A left shoulder on the mark; the other joints far enough away to keep their discs apart, none cut off by a crop."""
    joints = np.zeros((17, 3))
    joints[JOINTS.index("left_shoulder")] = [x, y, 2]
    joints[JOINTS.index("right_ankle")] = [x + 25, y + 25, 2]
    return Person(joints=joints.tolist(), box=[x - 20.0, y - 20.0, 60.0, 60.0], area=3600.0)


def task_and_sample(name: str, settings: dict[str, float], x: int, y: int) -> tuple[Task, Sample]:
    known = {key: value for key, value in settings.items() if key in TASKS[name].model_fields}
    extra = {"classes": ["thing"]} if name == "segmentation" else {"disc": 0.08} if name == "pose" else {}
    task = TASKS[name](**known, **extra)
    image = marked(x, y)
    label = {
        "segmentation": lambda: mark_mask(image),
        "objects": lambda: mark_mask(image),
        "foreground": lambda: mark_mask(image),
        "detect": lambda: outline(mark_mask(image)),
        "pose": lambda: person_at(x, y),
        "video": lambda: [image] * 8,
        "images": lambda: None,
    }.get(name, lambda: np.maximum(image, 21))()  # restoration: not the same pixels, or the task would degrade them itself
    return task, Sample(image, label)


def centre(weight: np.ndarray) -> np.ndarray:
    return np.argwhere(weight).mean(0)[::-1]


def labelled_place(name: str, picture: np.ndarray, mirrored: bool) -> np.ndarray:
    """Where a label picture has the mark."""
    if name == "pose":  # in a mirror the left shoulder is drawn as the right one
        joint = JOINTS.index("left_shoulder")
        return centre((picture == COLOURS[MIRRORED[joint] if mirrored else joint]).all(-1))
    return centre(picture.max(-1) > picture.max() / 2)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("name", [name for name in sorted(LABELLED) if name != "complete"])  # which hides where the mark may be
def test_a_marked_pixel_and_its_label_land_in_the_same_place(
    name: str, augmentation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    views: list[View] = []
    covered = View.covered
    monkeypatch.setattr(View, "covered", lambda view, image: views.append(view) or covered(view, image))
    checked = 0
    for copy in range(1, COPIES + 1):
        x, y = np.random.default_rng(copy).integers(45, 80, 2).tolist()
        task, sample = task_and_sample(name, AUGMENTATIONS[augmentation], x, y)
        image, *labels = task.see(sample, copy, [7, copy], SIZE).pictures
        whole_mark = (image.max(-1) > image.max() / 2).sum() * (image.max() > 60)
        # A tile or crop may cut the mark: its centre then says nothing.
        borders = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).max(-1)
        if not whole_mark or (borders > image.max() / 2).any():
            continue
        checked += 1
        place = centre(image.max(-1) > image.max() / 2)
        for label in labels:
            assert np.abs(place - labelled_place(name, label, views[-1].mirrored)).max() < WITHIN, (copy, views[-1])
    assert checked >= COPIES // 4
    assert {view.mirrored for view in views} == {True, False}
    if augmentation in ("tint", "all") and "hue" in TASKS[name].model_fields:
        assert all(view.tint is not None for view in views)
    if augmentation in ("turn", "all") and "turn" in TASKS[name].model_fields:
        assert max(abs(view.turned) for view in views) > 5


@pytest.mark.parametrize("name", sorted(LABELLED | {"images"}))
def test_a_copy_depends_on_seed_item_and_copy_alone(name: str) -> None:
    task, sample = task_and_sample(name, AUGMENTATIONS["all"], 60, 44)
    first, again, other, another = (
        task.see(sample, copy, seed, SIZE).pictures for copy, seed in ((3, [7, 5]), (3, [7, 5]), (4, [7, 5]), (3, [7, 6]))
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[0], another[0])


def test_a_mirrored_skeleton_read_back_has_left_and_right_right() -> None:
    rng = np.random.default_rng(0)
    joints = np.concatenate(
        [
            rng.permutation(np.stack(np.meshgrid([20, 45, 70, 95], [20, 45, 70, 95, 110]), -1).reshape(-1, 2))[:17],
            np.full((17, 1), 2),
        ],
        axis=1,
    ).astype(float)
    sample = Sample(np.zeros((SIDE, SIDE, 3), np.uint8), Person(joints=joints.tolist(), box=[0, 0, SIDE, SIDE], area=1.0))
    task = Pose(disc=0.06)
    for view in (View((0, 0, SIDE, SIDE), mirrored=True), View((4, 2, 124, 122), mirrored=True, turned=8.0)):
        seen = task.transform(sample, view, SIZE, rng)
        found = task.read([task.draw(seen.label, SIZE)], [view], sample).array()
        assert np.abs(found[:, :2] - joints[:, :2]).max() < 3


def test_people_of_a_whole_image_are_drawn_together_and_move_together() -> None:
    one, two = person_at(40, 40), person_at(80, 70)
    both = one.model_copy(update={"others": [two]})
    task = Pose(disc=0.05)
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    view = View((0, 0, SIDE, SIDE), mirrored=True)
    seen = task.transform(Sample(image, both), view, SIZE, np.random.default_rng(0)).label
    alone = [task.transform(Sample(image, person), view, SIZE, np.random.default_rng(0)).label for person in (one, two)]
    drawn = np.maximum(*(task.draw(person, SIZE) for person in alone))
    assert np.array_equal(task.draw(seen, SIZE), drawn)


def test_overlapping_regions_are_painted_largest_first() -> None:
    def region(y0: int, y1: int, x0: int, x1: int) -> Region:
        mask = np.zeros((20, 30), np.uint8, order="F")
        mask[y0:y1, x0:x1] = 1
        return Region(None, int(mask.sum()), coco.encode(mask))

    small, large, apart = region(4, 8, 4, 8), region(2, 16, 2, 16), region(0, 20, 24, 30)
    ids = paint([small, apart, large], 20, 30, lambda rank, _: rank + 1)
    assert ids[5, 5] == 3 and ids[3, 3] == 1 and ids[10, 27] == 2 and ids[0, 0] == 0
    colours = {tuple(colour) for colour in Objects().draw(ids, SIZE).reshape(-1, 3).tolist()}
    assert len(colours) == 4  # black and one a region: where two overlap, no sum of colours


def test_objects_are_scored_by_their_best_match_whatever_their_colours() -> None:
    truth = np.zeros((10, 10), np.uint8)
    truth[:5, :5], truth[5:, 5:] = 1, 2
    task, sample = Objects(), None
    sample = Sample(np.zeros((10, 10, 3), np.uint8), truth)
    swapped = np.where(truth == 1, 2, np.where(truth == 2, 1, 0)).astype(np.uint8)
    half = np.where(truth == 1, 1, 0).astype(np.uint8)
    half[5:, 5:7] = 7
    assert task.score([task.measure(swapped, sample)]) == {"object_iou": 1.0}
    assert task.score([task.measure(half, sample)])["object_iou"] == pytest.approx((1 + 10 / 25) / 2)
    assert task.score([task.measure(np.zeros_like(truth), sample)]) == {"object_iou": 0.0}
