"""Every task draws its label, reads it back, moves it with its image, and scores it as written-out formulas do."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvm_ray.data import synthetic
from lvm_ray.errors import BadItem, UserError
from lvm_ray.tasks import TASKS, Sample, Task, View
from lvm_ray.tasks.colours import palette
from lvm_ray.tasks.derain import Derain
from lvm_ray.tasks.geometry import see_image, see_points, unsee_points
from lvm_ray.tasks.pose import JOINTS, MIRRORED, Person, Pose
from lvm_ray.tasks.quality import luma, psnr_y
from lvm_ray.tasks.segmentation import Segmentation
from tests.layouts import coco

SIZE = 64
SEGMENTATION = Segmentation(classes=list(synthetic.CLASSES))
DERAIN = Derain()
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def person_of(joints: np.ndarray) -> Person:
    seen = joints[joints[:, 2] > 0, :2]
    low, high = seen.min(0), seen.max(0)
    width, height = (high - low).tolist()
    return Person(joints=joints.tolist(), box=[*low.tolist(), width, height], area=width * height)


def pose_sample(seed: int) -> Sample:
    image, joints = synthetic.person(np.random.default_rng(seed), SIZE)
    return Sample(image, person_of(joints))


def seen_whole(task: Task, sample: Sample) -> Sample:
    return task.transform(sample, task.view(sample, SIZE, None), SIZE, np.random.default_rng(0))


def test_a_drawn_mask_is_read_back_exactly() -> None:
    for seed in range(20):
        sample = Sample(*synthetic.scene(np.random.default_rng(seed), SIZE))
        picture = SEGMENTATION.draw(sample.label, SIZE)
        assert np.array_equal(SEGMENTATION.read([picture], SEGMENTATION.questions(sample, SIZE), sample), sample.label)


@pytest.mark.parametrize("crop", [None, 1.25])
def test_a_drawn_person_is_read_back_within_two_pixels_in_the_mean_and_no_joint_is_lost(crop: float | None) -> None:
    task = Pose(crop=crop, disc=0.05)
    errors = []
    for seed in range(40):
        sample = pose_sample(seed)
        seen = seen_whole(task, sample)
        found = task.read([task.draw(seen.label, SIZE)], task.questions(sample, SIZE), sample)
        truth, joints = sample.label.array(), found.array()
        assert ((joints[:, 2] > 0) == (truth[:, 2] > 0)).all(), seed
        errors.append(np.linalg.norm(joints[:, :2] - truth[:, :2], axis=1)[truth[:, 2] > 0])
    assert np.concatenate(errors).mean() < 2
    assert np.quantile(np.concatenate(errors), 0.99) < 0.1 * SIZE


def test_a_clean_photo_is_its_own_label() -> None:
    rainy, clean = synthetic.rain_pair(np.random.default_rng(0), SIZE)
    sample = Sample(rainy, clean)
    assert np.array_equal(DERAIN.read([DERAIN.draw(clean, SIZE)], DERAIN.questions(sample, SIZE), sample), clean)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 200), (130, 97), (40, 40)])
def test_tiles_cover_an_image_of_any_size_and_blend_back_into_it(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    sample = Sample(image, image)
    views = DERAIN.questions(sample, SIZE)
    tiles = [see_image(image, view, SIZE) for view in views]
    assert np.array_equal(DERAIN.read(tiles, views, sample), image)


def test_points_go_through_a_view_and_back() -> None:
    view = View((-3.0, 5.0, 61.0, 101.0), mirrored=True)
    points = np.random.default_rng(0).uniform(0, 64, (30, 2))
    assert np.allclose(unsee_points(see_points(points, view, SIZE), view, SIZE), points)


def test_a_mirrored_person_swaps_left_and_right_before_the_skeleton_is_drawn() -> None:
    sample = pose_sample(3)
    task = Pose(disc=0.05)
    plain = seen_whole(task, sample).label.array()
    mirrored = task.transform(sample, View((0, 0, SIZE, SIZE), mirrored=True), SIZE, np.random.default_rng(0))
    swapped = mirrored.label.array()
    for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle"):
        left, right = JOINTS.index(f"left_{name}"), JOINTS.index(f"right_{name}")
        assert swapped[right, 0] == pytest.approx(SIZE - plain[left, 0])
        assert swapped[right, 1] == pytest.approx(plain[left, 1])
    assert [MIRRORED[MIRRORED[i]] for i in range(17)] == list(range(17))
    picture = task.draw(mirrored.label, SIZE)
    back = task.read([picture], [View((0, 0, SIZE, SIZE), mirrored=True)], sample).array()
    assert np.abs(back - sample.label.array())[sample.label.array()[:, 2] > 0, :2].mean() < 2


def test_a_copy_is_a_pure_function_and_copy_0_is_the_original() -> None:
    sample = Sample(*synthetic.scene(np.random.default_rng(1), SIZE))
    first = SEGMENTATION.see(sample, 3, [7], SIZE).pictures
    assert all(np.array_equal(a, b) for a, b in zip(first, SEGMENTATION.see(sample, 3, [7], SIZE).pictures, strict=True))
    assert not np.array_equal(first[0], SEGMENTATION.see(sample, 4, [7], SIZE).pictures[0])
    assert np.array_equal(SEGMENTATION.see(sample, 0, [7], SIZE).pictures[0], sample.image)


def test_miou_equals_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 4, (9, 7)).astype(np.uint8), rng.integers(0, 4, (9, 7)).astype(np.uint8)) for _ in range(5)]
    pairs[0][1][:3] = 255  # ignored pixels of the truth
    measures = [SEGMENTATION.measure(answer, Sample(np.zeros((9, 7, 3), np.uint8), truth)) for answer, truth in pairs]
    scores = []
    for class_id in (1, 2, 3):
        intersection = union = 0
        for answer, truth in pairs:
            for a, t in zip(answer.flat, truth.flat, strict=True):
                if t != 255:
                    intersection += a == class_id and t == class_id
                    union += a == class_id or t == class_id
        scores.append(intersection / union)
    assert SEGMENTATION.score(measures)["miou"] == pytest.approx(np.mean(scores), abs=1e-12)


def test_pck_equals_a_loop_over_joints_and_unfound_people_are_misses() -> None:
    rng, task = np.random.default_rng(0), Pose()
    measures, hits, total = [], 0, 0
    for seed in range(6):
        sample = pose_sample(seed)
        joints = sample.label.array()
        joints[:, :2] += rng.normal(0, 8, (17, 2))
        joints[rng.random(17) < 0.2, 2] = 0
        if seed == 5:
            joints[:, 2] = 0
        answer = Person(joints=joints.tolist(), box=sample.label.box, area=sample.label.area)
        for (x, y, seen), (tx, ty, labelled) in zip(joints, sample.label.joints, strict=True):
            if labelled:
                total += 1
                hits += seen > 0 and ((x - tx) ** 2 + (y - ty) ** 2) ** 0.5 <= 0.2 * max(sample.label.box[2:])
        measures.append(task.measure(answer, sample))
    assert task.score(measures)["pck"] == pytest.approx(hits / total, abs=1e-12)


def test_ap_is_1_for_the_truth_and_falls_with_noise() -> None:
    task, rng = Pose(), np.random.default_rng(0)
    scores = []
    for noise in (0.0, 2.0, 30.0):
        measures = []
        for seed in range(12):
            sample = pose_sample(seed)
            joints = sample.label.array()
            joints[:, :2] += rng.normal(0, 1, (17, 2)) * noise
            measures.append(task.measure(Person(joints=joints.tolist(), box=sample.label.box, area=sample.label.area), sample))
        scores.append(task.score(measures)["ap"])
    assert scores[0] == pytest.approx(1)
    assert scores[0] > scores[1] > scores[2]


def test_resampling_every_item_once_gives_the_score_itself() -> None:
    task = Pose()
    measures = []
    for seed in range(8):  # some people right, some not, each with a score of its own: equal ones are ranked by their order
        answer = pose_sample(seed + seed % 3).label.model_copy(update={"score": 0.5 + seed / 20})
        measures.append(task.measure(answer, pose_sample(seed)))
    draws = np.stack([np.arange(8), np.random.default_rng(0).permutation(8)])
    resampled = task.resampled_scores(measures, draws)
    for name, value in task.score(measures).items():
        assert np.allclose(resampled[name], value)


def test_psnr_and_ssim_agree_with_their_formulas() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    answer = np.clip(truth + rng.normal(0, 20, truth.shape), 0, 255).astype(np.uint8)
    red, green, blue = (truth[..., i].astype(float) for i in range(3))
    y = 16 + 65.481 * red / 255 + 128.553 * green / 255 + 24.966 * blue / 255
    assert np.allclose(luma(truth), y)
    assert psnr_y(answer, truth) == pytest.approx(10 * np.log10(255**2 / np.mean((luma(answer) - y) ** 2)), abs=1e-9)
    measures = DERAIN.measure(truth, Sample(truth, truth))
    assert measures == {"psnr_y": 100.0, "ssim_y": pytest.approx(1)}


def test_doing_nothing_on_rain100l_scores_as_published() -> None:
    folder = SHARED / "rain100L"
    if not folder.is_dir():
        pytest.skip("Rain100L is not on this machine: its licence does not let us ship it")
    task = TASKS["derain"].model_validate({"test": {"rainy": str(folder / "rainy"), "clean": str(folder / "clean")}})
    measures = [task.measure(sample.image, sample) for sample in (task.load(item, "test") for item in task.items("test"))]
    scores = task.score(measures)
    assert (round(scores["psnr_y"], 2), round(scores["ssim_y"], 3)) == (26.9, 0.838)


def test_palette_colours_stay_apart() -> None:
    for count in (3, 11, 17, 40):
        colours = np.concatenate([[[0, 0, 0]], palette(count)]).astype(int)
        away = np.sqrt(((colours[:, None] - colours[None]) ** 2).sum(-1)) + 1e9 * np.eye(len(colours))
        assert away.min() > (120 if count <= 17 else 45)


def folders(tmp_path: Path, images: int, masks: int) -> Segmentation:
    for name, count, mode in (("images", images, "RGB"), ("masks", masks, "L")):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new(mode, (8, 8)).save(tmp_path / name / f"{i}.png")
    source = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    return Segmentation.model_validate({"classes": ["thing"], "train": source})


def test_unusable_sources_are_refused_by_name(tmp_path: Path) -> None:
    task = folders(tmp_path, 3, 2)
    with pytest.raises(UserError, match=r"3 images in .* but 2 labels .*2\.png has no partner"):
        list(task.items("train"))
    for path in (tmp_path / "masks").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"tasks.segmentation.train.masks: no images in .*masks"):
        list(task.items("train"))
    (tmp_path / "masks").rmdir()
    with pytest.raises(UserError, match=r"no folder .*masks"):
        list(task.items("train"))


def test_a_damaged_or_unfitting_item_is_bad_by_name(tmp_path: Path) -> None:
    task = folders(tmp_path, 4, 4)
    (tmp_path / "images" / "0.png").write_bytes((tmp_path / "images" / "0.png").read_bytes()[:20])
    Image.new("L", (9, 8)).save(tmp_path / "masks" / "1.png")
    Image.new("L", (8, 8), 7).save(tmp_path / "masks" / "2.png")
    items = list(task.items("train"))
    for item, reason in zip(items[:3], ["cannot be read as an image", "9x8 pixels, its image 8x8", "class id 7"], strict=True):
        with pytest.raises(BadItem, match=reason):
            task.load(item, "train")
    task.load(items[3], "train")


def test_a_class_that_is_none_of_the_coco_file_s_categories_is_refused_at_the_listing(tmp_path: Path) -> None:
    square = [2, 3, 8, 3, 8, 7, 2, 7]
    dogs = [{"id": i, "image_id": i, "category_id": 18, "segmentation": [square]} for i in (1, 2)]
    train = {"format": "coco-instances", **coco(tmp_path, dogs)}

    def task(*classes: str, **changes: object) -> Segmentation:
        return Segmentation.model_validate({"classes": list(classes), "train": train, **changes})

    (tmp_path / "none").mkdir()
    nameless = {"train": {"format": "coco-instances", **coco(tmp_path / "none", dogs, categories=[])}}
    assert len(list(task("dog", "person").items("train"))) == 2  # a category without objects is one all the same
    for wrong, split, words in (
        (task("Dog", "person"), "train", "'Dog' is none of the categories of .*annotations.json: there are dog, person$"),
        (task("dog", "persn"), "train", "'persn' is none of the categories of .*annotations.json: there are person, dog$"),
        (task("cat", hold_out={"test": 0.5}), "test", "tasks.segmentation.classes: 'cat' is none"),
        (task("dog", **nameless), "train", "'dog' is none .*: it names none; task objects needs no categories"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            list(wrong.items(split))
        assert not isinstance(caught.value, BadItem) and "\n" not in str(caught.value)
    assert not list(task("cat").items("test"))  # no source, nothing to read


def test_keypoint_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    path = tmp_path / "keypoints.json"
    task = Pose.model_validate({"train": {"images": str(tmp_path / "images"), "annotations": str(path)}})
    with pytest.raises(UserError, match="cannot read"):
        list(task.items("train"))
    path.write_text("[]")
    with pytest.raises(UserError, match="expected COCO person keypoints"):
        list(task.items("train"))
    good = {"id": 1, "image_id": 1, "keypoints": [5.0, 5.0, 2.0] * 17, "bbox": [1, 1, 20, 20], "num_keypoints": 17}
    bad = {**good, "id": 2, "bbox": [1, 1, float("nan"), 20]}
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [good, bad]}
    path.write_text(json.dumps(content))
    first, second = task.items("train")
    assert task.load(first, "train").label.array().shape == (17, 3)
    with pytest.raises(BadItem, match="bbox"):
        task.load(second, "train")
    content["images"][0]["file_name"] = "b.png"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'b.png', which is not in"):
        list(task.items("train"))


def test_clean_photos_alone_are_no_test_set_also_where_a_part_is_held_out() -> None:
    with pytest.raises(ValueError, match=r"train.rainy: missing: a test set needs rainy images"):
        Derain.model_validate({"train": {"clean": "photos"}, "hold_out": {"test": 0.1}})
    with pytest.raises(ValueError, match=r"train.format: images has clean images alone"):
        Derain.model_validate({"train": {"format": "images", "images": "photos"}, "hold_out": {"test": 0.1}})
    Derain.model_validate({"train": {"clean": "photos"}, "hold_out": {"validation": 0.1}})


def test_a_photo_too_small_for_ssim_is_set_aside(tmp_path: Path) -> None:
    for name in ("rainy", "clean"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 20)).save(tmp_path / name / "a.png")
    task = Derain.model_validate({"train": {"rainy": f"{tmp_path}/rainy", "clean": f"{tmp_path}/clean"}})
    with pytest.raises(BadItem, match=r"a.png: 8x20 pixels; SSIM takes at least 11 a side"):
        task.load(next(task.items("train")), "train")


def test_settings_that_no_recipe_can_mean_are_refused_in_one_line() -> None:
    clips = {"clips": "clips", "length": 8}
    for name, section, reason in (
        ("video", {"train": clips, "test": {**clips, "length": 4}}, r"items of \[4, 8\] frames"),
        ("derain", {"train": {"format": ["a"]}}, r"format: found \['a'\]"),
        ("derain", {"hold_out": {"test": float("nan")}}, "each part is 0 or more"),
        ("segmentation", {"classes": ["c"] * 255}, "at most 254"),
    ):
        with pytest.raises(ValueError, match=reason):
            TASKS[name].model_validate(section)


def test_as_many_colours_as_classes_can_ask_for() -> None:
    for count in (19, 80, 150, 254):
        colours = palette(count)
        assert len(np.unique(colours, axis=0)) == count and colours.max(1).min() == 255
