"""Tasks whose answer is a picture, and detection: the query is made of the answer, scores are those of independent references."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lvm_ray.errors import BadItem
from lvm_ray.tasks import TASKS, PairTask, Sample, View
from lvm_ray.tasks.colourise import Colourise, colour_mse
from lvm_ray.tasks.colours import BACKGROUNDS, palette
from lvm_ray.tasks.complete import Complete
from lvm_ray.tasks.detect import Detect, bounds, box_iou, outline
from lvm_ray.tasks.geometry import see_mask, whole
from lvm_ray.tasks.next_frame import NextFrame
from lvm_ray.tasks.objects import Objects
from lvm_ray.tasks.picture_answers import seen_whole
from lvm_ray.tasks.quality import luma
from lvm_ray.tasks.segmentation import Segmentation
from tests.layouts import coco, encoded, mask_of, picture, rle_of, write

SIZE = 32


def sample_of(seed: int, height: int = 45, width: int = 61) -> Sample:
    image = picture(seed, height, width)
    return Sample(image, image)


def seen(task: PairTask, sample: Sample, size: int = SIZE) -> Sample:
    return task.transform(sample, task.view(sample, size, None), size, np.random.default_rng(0))


def trivial(task: PairTask, sample: Sample, training: list[Sample]) -> dict[str, np.ndarray]:
    return {answer.name: answer.answer(sample) for answer in task.trivial_answers(training, SIZE)}


def test_in_every_copy_the_query_is_the_answer_without_its_colours_or_a_half() -> None:
    sample = sample_of(0)
    for copy in range(6):
        query, answer = Colourise().see(sample, copy, [7], SIZE).pictures
        assert np.array_equal(query, np.repeat(np.array(Image.fromarray(answer).convert("L"))[..., None], 3, axis=2))
        for half, shown, gone in (
            ("lower", np.s_[:16], np.s_[16:]),
            ("upper", np.s_[16:], np.s_[:16]),
            ("left", np.s_[:, 16:], np.s_[:, :16]),
            ("right", np.s_[:, :16], np.s_[:, 16:]),
        ):
            query, answer = Complete(half=half).see(sample, copy, [7], SIZE).pictures
            assert np.array_equal(query[shown], answer[shown]) and not query[gone].any() and answer[gone].any()


@pytest.mark.parametrize("name", ["colourise", "complete", "next_frame"])
def test_the_truth_drawn_and_read_back_is_perfect_and_resampling_once_gives_the_score(name: str) -> None:
    task = TASKS[name]()
    measures = []
    for seed in range(3):
        sample = sample_of(seed)
        truth = task.draw(seen(task, sample).label, SIZE)
        answer = task.read([truth], task.questions(sample, SIZE), sample)
        perfect = task.measure(answer, sample)
        for metric, higher in task.metrics.items():
            expected = 0 if not higher else 100 if metric.startswith("psnr") else 1
            assert perfect[metric] == pytest.approx(expected)
        measures.append(task.measure(task.read([picture(seed + 9, SIZE, SIZE)], task.questions(sample, SIZE), sample), sample))
    draws = np.array([[0, 1, 2], [2, 0, 1]])
    for metric, value in task.score(measures).items():
        assert value == pytest.approx(np.mean([m[metric] for m in measures]))
        assert np.allclose(task.resampled_scores(measures, draws)[metric], value)


def test_the_colour_error_equals_a_loop_over_pixels_normalised_as_imagenet_is() -> None:
    answer, truth = picture(0, 5, 7), picture(1, 5, 7)
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    errors = []
    for y in range(5):
        for x in range(7):
            for c in range(3):
                a, t = ((shown[y, x, c] / 255 - mean[c]) / deviation[c] for shown in (answer, truth))
                errors.append((a - t) ** 2)
    assert colour_mse(answer, truth) == pytest.approx(np.mean(errors), abs=1e-12)


def test_scores_of_pictures_are_scikit_images_at_the_pictures_size() -> None:
    sample, answer = sample_of(3), picture(4, SIZE, SIZE)
    truth = seen_whole(sample.label, SIZE)
    assert Colourise().measure(answer, sample)["psnr"] == pytest.approx(peak_signal_noise_ratio(truth, answer), abs=1e-9)
    measured = NextFrame().measure(answer, sample)
    settings = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    assert measured["psnr_y"] == pytest.approx(peak_signal_noise_ratio(luma(truth), luma(answer), data_range=255), abs=1e-9)
    assert measured["ssim_y"] == pytest.approx(structural_similarity(luma(truth), luma(answer), **settings), abs=1e-9)


@pytest.mark.parametrize(("half", "gone"), [("lower", np.s_[16:]), ("left", np.s_[:, :16])])
def test_completion_is_scored_over_the_hidden_half_alone(half: str, gone: tuple[slice, ...]) -> None:
    task, sample, drawn = Complete(half=half), sample_of(3), picture(4, SIZE, SIZE)
    truth = seen_whole(sample.label, SIZE)
    answer = task.read([drawn], task.questions(sample, SIZE), sample)
    measured = task.measure(answer, sample)
    assert measured["psnr_hidden"] == pytest.approx(peak_signal_noise_ratio(truth[gone], drawn[gone]), abs=1e-9)
    # SSIM around each hidden pixel whose window lies in the picture, the shown half being as it is: one window after the other.
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weight = np.outer(kernel, kernel) / kernel.sum() ** 2
    pasted = truth.copy()
    pasted[gone] = drawn[gone]
    one, other = luma(pasted), luma(truth)
    counted = np.zeros((SIZE, SIZE), bool)
    counted[gone] = True
    values = []
    for y in range(5, SIZE - 5):
        for x in range(5, SIZE - 5):
            if counted[y, x]:
                a, b = (part[y - 5 : y + 6, x - 5 : x + 6] for part in (one, other))
                mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
                spread = (weight * a**2).sum() - mean_a**2 + (weight * b**2).sum() - mean_b**2
                shared = (weight * a * b).sum() - mean_a * mean_b
                low, high = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append(
                    (2 * mean_a * mean_b + low) * (2 * shared + high) / ((mean_a**2 + mean_b**2 + low) * (spread + high))
                )
    assert measured["ssim_hidden"] == pytest.approx(np.mean(values), abs=1e-9)
    other_shown = np.where(counted[..., None], drawn, 255 - drawn)
    assert task.measure(task.read([other_shown], task.questions(sample, SIZE), sample), sample) == measured


def test_answers_without_a_model_are_what_they_are_called() -> None:
    sample, training = sample_of(1), [seen(Complete(), sample_of(seed)) for seed in (2, 3)]
    truth = seen_whole(sample.image, SIZE)
    found = trivial(Complete(), sample, training)
    assert all(np.array_equal(answer[:16], truth[:16]) for answer in found.values())
    assert np.array_equal(found["mirrored half"][16:], truth[:16][::-1])
    assert (found["mean colour"][16:] == truth[:16].mean((0, 1)).round()).all()
    assert np.abs(found["mean picture"][16:] - (training[0].label / 2 + training[1].label / 2)[16:]).max() <= 0.5
    assert trivial(NextFrame(), sample, training) == {}
    red, blue = np.full((SIZE, SIZE, 3), (200, 0, 0), np.uint8), np.full((SIZE, SIZE, 3), (0, 0, 200), np.uint8)
    greys = {name: np.array(Image.fromarray(shown).convert("RGB").convert("L")) for name, shown in (("r", red), ("b", blue))}
    query = np.where(np.arange(SIZE)[:, None] < 16, greys["r"], greys["b"])
    half = np.where(np.arange(SIZE)[:, None, None] < 16, red, blue).astype(np.uint8)
    coloured = trivial(Colourise(), Sample(half, half), [Sample(red, red), Sample(blue, blue)])["mean colour of each grey"]
    assert np.array_equal(coloured, half) and query.min() != query.max()
    unseen = np.full((SIZE, SIZE, 3), 255, np.uint8)  # a grey that no training image holds stays grey
    assert (trivial(Colourise(), Sample(unseen, unseen), [Sample(red, red)])["mean colour of each grey"] == 255).all()


def test_saved_answers_have_the_photos_size_and_keep_what_it_showed(tmp_path: Path) -> None:
    photo = np.array(Image.fromarray(picture(5, 3, 4)).resize((61, 45), Image.Resampling.BICUBIC))
    sample, drawn = Sample(photo, None), picture(6, SIZE, SIZE)
    (path,) = Complete().save(Complete().read([drawn], [whole(photo)], sample), sample, f"{tmp_path}/a/b")
    saved = np.array(Image.open(path))
    assert path.endswith("a/b-completed.png") and saved.shape == photo.shape
    assert np.array_equal(saved[:23], photo[:23]) and not np.array_equal(saved[23:], photo[23:])
    (path,) = Colourise().save(seen_whole(photo, SIZE), sample, f"{tmp_path}/c")
    saved = np.array(Image.open(path))
    assert np.abs(saved.astype(int) - photo).mean() < 8  # the small picture's colours, the large one's brightness
    greys = [np.array(Image.fromarray(shown).convert("L")).astype(int) for shown in (saved, photo)]
    assert np.abs(greys[0] - greys[1]).mean() < 1.5


def test_a_frame_and_the_next_one_are_a_pair_and_clips_stay_whole(tmp_path: Path) -> None:
    for clip in range(3):
        for frame in range(5):
            write(tmp_path / f"clip{clip}" / f"{frame}.png", encoded(picture(10 * clip + frame)))
    task = NextFrame.model_validate({"train": {"clips": str(tmp_path), "stride": 2}})
    items = list(task.items("train"))
    assert [item.id for item in items] == ["clip0/000000", "clip1/000000", "clip2/000000"]
    assert [item.original for item in items] == ["clip0", "clip1", "clip2"]
    sample = task.load(items[1], "train")
    assert np.array_equal(sample.image, picture(10)) and np.array_equal(sample.label, picture(12))
    with pytest.raises(ValueError, match="length"):
        NextFrame.model_validate({"train": {"clips": str(tmp_path), "length": 8}})


def test_box_iou_is_pycocotools_and_a_count_of_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        ends = rng.integers(0, 12, (2, 2, 2))
        boxes = [np.concatenate([e.min(0), e.max(0) + 1]).astype(float) for e in ends]
        one, other = (np.zeros((14, 14), bool) for _ in boxes)
        for mask, (left, top, right, bottom) in zip((one, other), np.array(boxes, int), strict=True):
            mask[top:bottom, left:right] = True
        assert box_iou(*boxes) == pytest.approx((one & other).sum() / (one | other).sum(), abs=1e-12)
        shaken = [box + rng.uniform(0, 0.5, 4) for box in boxes]
        rows = [np.array([[*box[:2], *(box[2:] - box[:2])]]) for box in shaken]
        assert box_iou(*shaken) == pytest.approx(coco_mask.iou(*rows, [0])[0, 0], abs=1e-6)
    assert box_iou(np.zeros(4), np.zeros(4)) == 0


@pytest.mark.parametrize("background", ["black", "white", "grey"])
def test_a_drawn_box_is_read_back(background: str) -> None:
    task = Detect(background_colour=background)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        (x, y), (w, h) = rng.integers(0, 40, 2), rng.integers(8, 20, 2)
        sample = Sample(picture(seed, 64, 64), outline(mask_of(64, 64, (x, y, w, h))))
        assert bounds(sample.label).tolist() == [x, y, x + w, y + h]
        answer = task.read([task.draw(seen(task, sample, 64).label, 64)], task.questions(sample, 64), sample)
        assert task.measure(answer, sample) == {"box_iou": 1.0} and not task.shows_nothing(answer)
        empty = task.read([np.full((64, 64, 3), BACKGROUNDS[background], np.uint8)], task.questions(sample, 64), sample)
        assert empty is None and task.shows_nothing(empty) and task.measure(empty, sample) == {"box_iou": 0.0}
    tiny = Sample(picture(0, 640, 640), outline(mask_of(640, 640, (638, 5, 2, 2))))
    assert task.read([task.draw(seen(task, tiny).label, SIZE)], task.questions(tiny, SIZE), tiny) is not None


def test_the_box_of_a_turned_object_is_its_own_and_not_its_box_turned() -> None:
    rng = np.random.default_rng(0)
    for seed in range(10):
        mask = np.zeros((128, 128), np.uint8)
        y, x = np.mgrid[:128, :128]
        mask[(x - 64) ** 2 / rng.uniform(200, 900) + (y - 60) ** 2 / rng.uniform(200, 900) < 1] = 1
        view = View((0, 0, 128, 128), mirrored=bool(seed % 2), turned=float(rng.uniform(-40, 40)))
        moved = Detect().transform(Sample(picture(0, 128, 128), outline(mask)), view, 128, rng).label
        assert np.abs(bounds(moved) - bounds(outline(see_mask(mask, view, 128, outside=0)))).max() < 1.5


def test_every_copy_shows_the_whole_object() -> None:
    task, sample = Detect(), Sample(picture(0, 90, 120), outline(mask_of(90, 120, (80, 10, 12, 9))))
    for copy in range(1, 30):
        view = task.view(sample, SIZE, np.random.default_rng(copy))
        points = task.transform(sample, view, SIZE, np.random.default_rng(0)).label
        assert points.min() >= 0 and points.max() <= SIZE


def test_an_object_is_the_largest_of_its_image(tmp_path: Path) -> None:
    mask = mask_of(12, 16, (0, 0, 3, 3)) + 2 * mask_of(12, 16, (5, 2, 6, 4))
    mask[11] = 255
    for name, content in (("a", mask), ("b", np.zeros((12, 16), np.uint8))):
        write(tmp_path / "images" / f"{name}.png", encoded(picture(0)))
        write(tmp_path / "masks" / f"{name}.png", encoded(content))
    source = {"images": f"{tmp_path}/images", "masks": f"{tmp_path}/masks"}
    task = Detect.model_validate({"train": source})
    full, nothing = task.items("train")
    assert bounds(task.load(full, "train").label).tolist() == [5, 2, 11, 6]
    with pytest.raises(BadItem, match=r"b\.png: no object in this mask"):
        task.load(nothing, "train")
    with pytest.raises(BadItem, match=r"a\.png: a: the box covers 0\.12 of the image, more than most_covered"):
        Detect.model_validate({"train": source, "most_covered": 0.1}).load(full, "train")
    boxes = ((1, 1, 2, 2), (3, 4, 8, 5))
    entries = [
        {"id": i, "image_id": 1, "category_id": 18, "segmentation": rle_of(mask_of(12, 16, box))} for i, box in enumerate(boxes)
    ]
    task = Detect.model_validate({"train": {"format": "coco-instances", **coco(tmp_path / "coco", entries)}})
    assert bounds(task.load(next(iter(task.items("train"))), "train").label).tolist() == [3, 4, 11, 9]


def test_boxes_are_saved_as_coco_results_and_floors_need_no_model(tmp_path: Path) -> None:
    task, sample = Detect(), Sample(picture(0, 40, 80), outline(mask_of(40, 80, (20, 10, 40, 20))))
    for answer, boxes in ((bounds(sample.label), [[20, 10, 40, 20]]), (None, [])):
        (path,) = task.save(answer, sample, f"{tmp_path}/x")
        assert path.endswith("x-box.json") and [entry["bbox"] for entry in json.loads(Path(path).read_text())] == boxes
    found = trivial(task, sample, [seen(task, sample)])
    assert found["whole image"].tolist() == [0, 0, 80, 40] and np.allclose(found["mean box"], [20, 10, 60, 30])


@pytest.mark.parametrize("background", ["black", "white", "grey"])
def test_masks_on_any_background_are_read_back_exactly(background: str) -> None:
    colour = np.array(BACKGROUNDS[background])
    for count in (3, 18, 60):
        assert np.sqrt(((palette(count).astype(int) - colour) ** 2).sum(1)).min() > 40
    for task, most in (
        (Segmentation(classes=[f"c{i}" for i in range(18)], background_colour=background), 18),
        (Objects(background_colour=background), 18),
    ):
        label = np.random.default_rng(0).integers(0, most + 1, (SIZE, SIZE)).astype(np.uint8)
        sample, shown = Sample(picture(0, SIZE, SIZE), label), task.draw(label, SIZE)
        assert (shown[label == 0] == colour).all()
        assert np.array_equal(task.read([shown], task.questions(sample, SIZE), sample), label)
        blank = np.broadcast_to(colour, (SIZE, SIZE, 3)).astype(np.uint8)
        assert task.shows_nothing(task.read([blank], task.questions(sample, SIZE), sample))
