"""Benchmarks: each runs on a tiny fixture in its published layout, and a loop over the answers' pixels gives its score."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lvm_ray import benchmarks, cli, config
from lvm_ray.config import Recipe
from lvm_ray.data.tokenize import tokenize
from lvm_ray.errors import UserError
from lvm_ray.evaluate import gallery
from lvm_ray.evaluate import units as units_module
from lvm_ray.evaluate.compare import compare
from lvm_ray.evaluate.subjects import benchmark_lines, listed, subjects
from lvm_ray.evaluate.units import make_units
from lvm_ray.model.folder import load_model
from lvm_ray.progress import Bar
from lvm_ray.tasks import PairTask
from lvm_ray.tasks.colours import palette
from lvm_ray.tasks.quality import luma
from tests import test_kept
from tests.layouts import coco, encoded, make_tar, person, picture, sa1b_pair, write
from tests.test_evaluate import answered_by_hand, contents, evaluate, make_run
from tests.toys import SIZE, ToyTokenizer, load_toy_tokenizer, toy_recipe

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CAMVID = benchmarks.read("camvid").settings
MANY = 7
asked = test_kept.asked  # a fixture
FOLDS = 4
ALIKE = 4  # images of each fold's class, and one more in the third: the mean of the folds is not that of all


def noise(seed: int, side: int = SIZE) -> np.ndarray:
    return picture(seed, side, side)


def masks_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 12, (SIZE, SIZE)).astype(np.uint8)


def camvid(folder: Path) -> None:
    for i in range(MANY):
        write(folder / "test" / "images" / f"{i}.png", encoded(noise(i)))
        write(folder / "test" / "masks" / f"{i}.png", encoded(masks_of(i)))


def pascal(folder: Path) -> None:
    """Each fold has a class of its own, and images of two further ones, which no list names."""
    for fold in range(FOLDS):
        names = [f"2008_{fold}{i:05d}" for i in range(ALIKE + (fold == 2))]
        for i, name in enumerate(names):
            mask = np.zeros((111, 111), np.uint8)
            mask[10 : 60 + 5 * i, 5 : 70 + 8 * fold] = 5 * fold + 1
            mask[80:100, :50], mask[:4] = 5 * fold + 2, 255
            write(folder / "JPEGImages" / f"{name}.jpg", encoded(noise(10 * fold + i, 111), "JPEG"))
            write(folder / "SegmentationClassAug" / f"{name}.png", encoded(mask))
        lines = "".join(f"{name}__{5 * fold + 1:02d}\n" for name in names)
        write(folder / "splits" / "pascal" / "val" / f"fold{fold}.txt", lines.encode())


def objects(folder: Path) -> None:
    masks = [np.zeros((SIZE, SIZE), np.uint8) for _ in range(2)]
    masks[0][2:9, 1:12], masks[1][8:15, 3:7] = 1, 1
    make_tar(folder / "sa_000000.tar", [entry for i in range(MANY) for entry in sa1b_pair(i, masks[: 1 + i % 2])])


def rain(folder: Path, many: int = MANY) -> None:
    for i in range(many):
        write(folder / "rainy" / f"norain-{i}.png", encoded(noise(i)))
        write(folder / "clean" / f"norain-{i}.png", encoded(noise(i + 50)))


def gopro(folder: Path) -> None:
    for i in range(MANY):
        for kind in ("blur", "sharp"):
            write(folder / "test" / f"GOPR0{i}" / kind / "000001.png", encoded(noise(i + 50 * (kind == "sharp"))))


def pairs(folder: Path) -> None:
    for i in range(MANY):
        for kind in ("images", "labels"):
            write(folder / kind / f"ILSVRC2012_val_{i}.png", encoded(noise(i + 50 * (kind == "labels"))))


def photos(folder: Path) -> None:
    for i in range(MANY):
        write(folder / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", encoded(noise(i), "JPEG"))


def davis(folder: Path) -> None:
    for i in range(4):
        for frame in range(5):
            write(folder / "JPEGImages" / "480p" / f"clip{i}" / f"{frame:05d}.jpg", encoded(noise(9 * i + frame), "JPEG"))


def people(folder: Path) -> None:
    made = folder / "made"
    coco(made, [person(i, i) for i in range(1, MANY + 1)], MANY)
    (folder / "annotations").mkdir()
    (made / "images").rename(folder / "val2017")
    (made / "annotations.json").rename(folder / "annotations" / "person_keypoints_val2017.json")


def boxes(folder: Path) -> None:
    """Every third image has a second object, or one that is too large; a class of its own for odd and even."""
    names = [f"2008_{i:06d}" for i in range(9)]
    for i, name in enumerate(names):
        large = {"xmin": 1, "ymin": 1, "xmax": SIZE, "ymax": SIZE}
        box = large if i == 3 else {"xmin": 2 + i, "ymin": 3, "xmax": 7 + i, "ymax": 14}
        edges = "".join(f"<{key}>{value}</{key}>" for key, value in box.items())
        one = f"<object><name>{'dog' if i % 2 else 'cat'}</name><bndbox>{edges}</bndbox></object>"
        size = f"<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
        text = f"<annotation>{size}{one * (2 if i in (0, 6) else 1)}</annotation>"
        write(folder / "Annotations" / f"{name}.xml", text.encode())
        write(folder / "JPEGImages" / f"{name}.jpg", encoded(noise(i), "JPEG"))
    write(folder / "ImageSets" / "Main" / "val.txt", "\n".join(names).encode())


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "camvid": camvid,
    "coco_pose": people,
    "colourise": photos,
    "complete": photos,
    "deblur": gopro,
    "derain": rain,
    "derain_256": lambda folder: rain(folder, 2),  # of 441 tiles each
    "detect": boxes,
    "lvm_perplexity": pairs,
    "next_frame": davis,
    "objects": objects,
    "pascal5i": pascal,
    "pascal5i_3": pascal,
}


def training(place: Path) -> dict[str, Any]:
    """The tasks of a run whose training pairs some benchmarks show."""
    for name in ("camvid", "coco_pose", "deblur", "derain", "objects"):
        (place / name).mkdir(parents=True)
        LAYOUTS[name](place / name)
    return {
        "segmentation": {**CAMVID, "train": {"images": f"{place}/camvid/test/images", "masks": f"{place}/camvid/test/masks"}},
        "pose": {
            "crop": 1.25,
            "train": {
                "images": f"{place}/coco_pose/val2017",
                "annotations": f"{place}/coco_pose/annotations/person_keypoints_val2017.json",
            },
        },
        "derain": {"train": {"rainy": f"{place}/derain/rainy", "clean": f"{place}/derain/clean"}},
        "deblur": {"train": {"blurred": f"{place}/deblur/test/*/blur", "clean": f"{place}/deblur/test/*/sharp"}},
        "objects": {"train": {"tars": f"{place}/objects"}},
    }


def make_benchmarks(folder: Path, names: list[str], **changes: Any) -> tuple[Recipe, str]:
    """A run that has learnt nothing, its shards, and the benchmarks' data."""
    tasks = training(folder / "training")
    for name in names:
        (folder / name).mkdir()
        LAYOUTS[name](folder / name)
    recipe = toy_recipe(
        folder / "run",
        pairs=6,
        tasks=tasks,
        benchmarks={name: str(folder / name) for name in names},
        evaluate={"batch": 3, "resamples": 100},
        **changes,
    )
    tokenize(recipe, Bar("tokenize", None, ""), load_toy_tokenizer)
    return recipe, make_run(folder / "run" / "student", recipe, seed=3)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, str, dict[str, Any]]:
    """Every benchmark asked of one run, the pictures of all answers kept."""
    recipe, run = make_benchmarks(tmp_path_factory.mktemp("benchmarks"), list(LAYOUTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "FIRST", 100)
        (evaluation,) = evaluate([run], recipe)
    return recipe, run, evaluation


def answers(run: str, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """(item, answer picture) of a benchmark."""
    for entry in json.loads((Path(run) / "gallery.json").read_text()):
        if entry["task"] == f"{name}@{benchmarks.read(name).version}":
            yield entry["item"], np.asarray(Image.open(Path(run) / entry["answer"]))


def pixel_iou(one: np.ndarray, other: np.ndarray) -> float:
    shared = both = 0
    for a, b in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True):
        shared, both = shared + (a and b), both + (a or b)
    return shared / both if both else 1.0


def camvid_by_hand(folder: Path, found: list[tuple[str, np.ndarray]]) -> dict[str, float]:
    colours = palette(11).astype(int)
    shared, union = [0] * 11, [0] * 11
    for item, answer in found:
        truth = np.asarray(Image.open(folder / "test" / "masks" / f"{item}.png"))
        for y in range(SIZE):
            for x in range(SIZE):
                if truth[y, x] == 11:
                    continue
                said = ((colours - answer[y, x]) ** 2).sum(1).argmin()
                shared[truth[y, x]] += said == truth[y, x]
                for i in {int(said), int(truth[y, x])}:
                    union[i] += 1
    return {"miou": float(np.mean([a / b for a, b in zip(shared, union, strict=True) if b]))}


def pascal_by_hand(folder: Path, found: list[tuple[str, np.ndarray]], threshold: float = 127.5) -> dict[str, float]:
    """An answer's pixel is as bright as that of its picture under its centre; the masks have the size of the square already."""
    under = [int((x + 0.5) * SIZE / 111) for x in range(111)]
    folds: list[list[float]] = [[] for _ in range(FOLDS)]
    for item, answer in found:
        name, number = item.split("__")
        truth = np.asarray(Image.open(folder / "SegmentationClassAug" / f"{name}.png")) == int(number)
        said = answer.mean(axis=-1)[under][:, under] > threshold
        folds[(int(number) - 1) // 5].append(pixel_iou(truth, said))
    means = [float(np.mean(values)) for values in folds]
    return {"miou": float(np.mean(means)), **{f"miou_fold{i}": value for i, value in enumerate(means)}}


def objects_by_hand(folder: Path, found: list[tuple[str, np.ndarray]]) -> dict[str, float]:
    colours = np.concatenate([np.zeros((1, 3), int), palette(18).astype(int)])
    best = []
    for k, (_, answer) in enumerate(found):
        truth = np.zeros((SIZE, SIZE), int)
        truth[2:9, 1:12] = 1
        if k % 2:
            truth[8:15, 3:7] = 2
        said = ((colours - answer[:, :, None].astype(int)) ** 2).sum(-1).argmin(-1)
        for i in {*truth.flat} - {0}:
            best.append(max(pixel_iou(truth == i, said == j) if (said == j).any() else 0 for j in range(1, 19)))
    return {"object_iou": float(np.mean(best))}


def restored_by_hand(truth: Callable[[str], Path]) -> Callable[[Path, list[tuple[str, np.ndarray]]], dict[str, float]]:
    def score(folder: Path, found: list[tuple[str, np.ndarray]]) -> dict[str, float]:
        settings = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        values = []
        for item, answer in found:
            a, b = luma(answer), luma(np.asarray(Image.open(folder / truth(item))))
            values.append((peak_signal_noise_ratio(b, a, data_range=255), structural_similarity(b, a, **settings)))
        psnr, ssim = np.mean(values, axis=0)
        return {"psnr_y": float(psnr), "ssim_y": float(ssim)}

    return score


def frame_after(item: str) -> Path:
    clip, start = item.split("/")
    return Path("JPEGImages", "480p", clip, f"{int(start) + 1:05d}.jpg")


def boxes_by_hand(folder: Path, found: list[tuple[str, np.ndarray]]) -> dict[str, float]:
    assert [item for item, _ in found] == [f"2008_{i:06d}" for i in (1, 2, 4, 5, 7, 8)]
    ious = []
    for item, answer in found:
        i = int(item[-1])
        truth, said = np.zeros((SIZE, SIZE), bool), np.zeros((SIZE, SIZE), bool)
        truth[2:14, 1 + i : 7 + i] = True  # from the first pixel to the last, which are counted from 1
        rows, columns = np.nonzero(answer.mean(axis=-1) > 127.5)
        if len(rows):
            said[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        ious.append(pixel_iou(truth, said))
    return {"box_iou": float(np.mean(ious))}


def colours_by_hand(folder: Path, found: list[tuple[str, np.ndarray]]) -> dict[str, float]:
    errors, decibels = [], []
    for item, answer in found:
        truth = np.asarray(Image.open(folder / "val" / f"{item}.JPEG"))
        errors.append(np.mean(((answer / 255 - truth / 255) / (0.229, 0.224, 0.225)) ** 2))
        decibels.append(peak_signal_noise_ratio(truth, answer))
    return {"colour_mse": float(np.mean(errors)), "psnr": float(np.mean(decibels))}


def hidden_by_hand(folder: Path, found: list[tuple[str, np.ndarray]]) -> dict[str, float]:
    half = np.s_[SIZE // 2 :]
    truths = [np.asarray(Image.open(folder / "val" / f"{item}.JPEG"))[half] for item, _ in found]
    return {"psnr_hidden": float(np.mean([peak_signal_noise_ratio(t, a[half]) for t, (_, a) in zip(truths, found, strict=True)]))}


BY_HAND: dict[str, Callable[[Path, list[tuple[str, np.ndarray]]], dict[str, float]]] = {
    "camvid": camvid_by_hand,
    "pascal5i": pascal_by_hand,
    "pascal5i_3": lambda folder, found: pascal_by_hand(folder, found, 25),
    "objects": objects_by_hand,
    "detect": boxes_by_hand,
    "derain": restored_by_hand(lambda item: Path("clean", f"{item}.png")),
    "deblur": restored_by_hand(lambda item: Path("test", item.split("/")[0], "sharp", f"{item.split('/')[1]}.png")),
    "next_frame": restored_by_hand(frame_after),
    "colourise": colours_by_hand,
    "complete": hidden_by_hand,
}


def test_every_benchmark_that_is_shipped_is_tested_on_its_layout() -> None:
    assert set(LAYOUTS) == set(benchmarks.names())


@pytest.mark.parametrize("name", BY_HAND)
def test_a_score_is_that_of_a_loop_over_the_answers(scored: tuple[Recipe, str, dict[str, Any]], name: str) -> None:
    recipe, run, evaluation = scored
    found = list(answers(run, name))
    entries = evaluation["benchmarks"][name]["scores"]
    expected = BY_HAND[name](Path(recipe.benchmarks[name]), found)
    assert all(entry["n"] == len(found) > 0 for entry in entries.values())
    for metric, value in expected.items():
        assert entries[metric]["value"] == pytest.approx(value, abs=1e-6), metric


def test_what_is_written_says_what_was_asked(scored: tuple[Recipe, str, dict[str, Any]]) -> None:
    recipe, run, evaluation = scored
    assert evaluation["tasks"] == {}, "the run's tasks have no test items"
    assert json.loads(Path(run, "evaluation.json").read_text()) == evaluation
    for name, entry in evaluation["benchmarks"].items():
        benchmark = benchmarks.read(name)
        assert (entry["version"], entry["task"]) == (benchmark.version, benchmark.task) and entry["bad"] == 0
        assert entry["protocol"]["says"] == benchmark.says and entry["protocol"]["examples"] == benchmark.examples
        assert list(entry["scores"]) == sorted(benchmark.metrics) or list(entry["scores"]) == benchmark.metrics
        for metric, values in entry["scores"].items():
            assert values["value"] is not None and len(values["ci95"]) == 2
            if metric not in ("mean_perplexity", "target_perplexity", "token_accuracy"):
                assert values["floor"] is not None and values["ceiling"] is not None, (name, metric)
    assert set(evaluation["benchmarks"]) == set(recipe.benchmarks)
    assert str(Path(run).parent) not in json.dumps(evaluation)


def test_the_pairs_before_a_query_are_of_its_class_and_others(scored: tuple[Recipe, str, dict[str, Any]]) -> None:
    recipe, _, _ = scored
    items = {name: found for name, found in units_module.test_items(recipe).items() if name.startswith("pascal5i")}
    units = make_units(recipe, items, None, list(items), 1, None)  # type: ignore[arg-type]
    prompts = [(unit.task, item, shown) for unit in units for item, shown in zip(unit.items, unit.shown, strict=True)]
    assert len(prompts) == 2 * (FOLDS * ALIKE + 1)
    for name, item, shown in prompts:
        assert len(shown) == {"pascal5i@1": 1, "pascal5i_3@1": 3}[name] == len({one.original for one in shown})
        for one in shown:
            assert one.original != item.original and one.extra == item.extra
    assert len({(name, shown[0].id) for name, _, shown in prompts if name == "pascal5i@1"}) > FOLDS, "drawn for each query"


def test_an_answer_is_the_models_after_those_pairs(scored: tuple[Recipe, str, dict[str, Any]]) -> None:
    """The prompt out of the files, answered by whole forwards."""
    recipe, run, _ = scored
    folder, tokenizer = Path(recipe.benchmarks["pascal5i"]), ToyTokenizer()
    task = subjects(recipe)["pascal5i@1"].task
    items = {"pascal5i@1": units_module.test_items(recipe)["pascal5i@1"]}
    chosen = {
        item.id: shown[0].id
        for unit in make_units(recipe, items, None, [], 1, None)  # type: ignore[arg-type]
        for item, shown in zip(unit.items, unit.shown, strict=True)
    }
    loaded = {item.id: task.load(item, "test") for item in items["pascal5i@1"]}
    for item, sample in loaded.items():
        name, number = item.split("__")
        mask = np.asarray(Image.open(folder / "SegmentationClassAug" / f"{name}.png"))
        assert np.array_equal(sample.label, mask == int(number))
    tokens = {item: tokenizer.encode(np.stack(task.see(sample, 0, [0], SIZE).pictures)) for item, sample in loaded.items()}
    prompts = [[*tokens[other].ravel(), *tokens[item][0]] for item, other in chosen.items()]
    model, _ = load_model(f"{run}/model")
    by_hand = answered_by_hand(model, torch.tensor(np.array(prompts, np.int64)), tokenizer.codebook)
    assert np.array_equal(tokenizer.decode(by_hand), np.stack([answer for _, answer in answers(run, "pascal5i")]))


def test_perplexity_is_that_of_the_true_labels_after_five_pairs(scored: tuple[Recipe, str, dict[str, Any]]) -> None:
    recipe, run, evaluation = scored
    tokenizer, folder = ToyTokenizer(), Path(recipe.benchmarks["lvm_perplexity"])
    (name,) = (name for name in subjects(recipe) if name.startswith("lvm_perplexity"))
    items = {name: units_module.test_items(recipe)[name]}
    rows = {
        path.stem: np.concatenate(
            tokenizer.encode(np.stack([np.asarray(Image.open(folder / kind / path.name)) for kind in ("images", "labels")]))
        )
        for path in (folder / "images").iterdir()
    }
    sentences = [
        np.concatenate([rows[one.id] for one in (*shown, item)])
        for unit in make_units(recipe, items, None, [], 1, None)  # type: ignore[arg-type]
        for item, shown in zip(unit.items, unit.shown, strict=True)
    ]
    tokens = torch.tensor(np.array(sentences, np.int64))
    assert tokens.shape == (MANY, 12 * 4)
    model, _ = load_model(f"{run}/model")
    with torch.inference_mode():
        logits = model(tokens).logits[:, -5:-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2).double(), tokens[:, -4:], reduction="none").mean(1)
    entries = evaluation["benchmarks"]["lvm_perplexity"]["scores"]
    assert entries["mean_perplexity"]["value"] == pytest.approx(losses.exp().mean().item(), rel=1e-4)
    assert entries["target_perplexity"]["value"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["coco_pose", "derain_256"])
def test_the_truth_moved_by_a_pixel_scores_as_by_hand(tmp_path: Path, name: str) -> None:
    LAYOUTS[name](tmp_path)
    training_tasks = config.Recipe.model_validate(toy_recipe(tmp_path, tasks=training(tmp_path / "training"))).tasks
    task = benchmarks.task_of(name, str(tmp_path), training_tasks, 4)
    measures, expected = [], []
    for item in task.items("test"):
        sample = task.load(item, "test")
        views = task.questions(sample, 64)
        rng = np.random.default_rng(0)
        shown = [np.roll(task.draw(task.transform(sample, view, 64, rng).label, 64), 1, axis=1) for view in views]
        answer = task.read(shown, views, sample)
        measures.append(task.measure(answer, sample))
        if name == "derain_256":
            files = [tmp_path / kind / f"{item.id}.png" for kind in ("rainy", "clean")]
            rainy, clean = (Image.open(file).resize((256, 256), Image.Resampling.BICUBIC) for file in files)
            assert np.abs(sample.image.astype(int) - np.asarray(rainy)).mean() < 16 and sample.label.shape == (256, 256, 3)
            assert np.abs(sample.label.astype(int) - np.asarray(clean)).mean() < 16
            expected.append({"psnr_y": peak_signal_noise_ratio(luma(sample.label), luma(answer), data_range=255)})
        else:
            near = [math.dist(a[:2], b[:2]) / 8 for a, b in zip(answer.joints, sample.label.joints, strict=True) if a[2]]
            radii = {"pck": 0.2, "pck_0.1": 0.1, "pck_0.05": 0.05}  # of the longer side of the box, 8 pixels
            expected.append({key: sum(part <= radius for part in near) / 17 for key, radius in radii.items()})
    found = task.score(measures)
    assert len(measures) == (2 if name == "derain_256" else MANY)
    for metric in expected[0]:
        assert found[metric] == pytest.approx(np.mean([values[metric] for values in expected]), abs=1e-6), metric
    assert name != "coco_pose" or 0.1 < found["pck"] <= 1


def test_killed_and_resumed_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    recipe, run = make_benchmarks(tmp_path, ["camvid", "pascal5i"])
    evaluate([run], recipe)
    undisturbed, total = contents([run]), sum(asked.values())
    shutil.rmtree(f"{run}/answered")
    (tmp_path / "run" / "data" / "references.json").unlink()
    Path(run, "evaluation.json").unlink()
    for units in (1, 4):
        with monkeypatch.context() as patch:
            test_kept.killed_after(patch, units)
            with pytest.raises(KeyboardInterrupt):
                evaluate([run], recipe)
        assert not Path(run, "evaluation.json").exists()
    asked.clear()
    evaluate([run], recipe)
    assert contents([run]) == undisturbed and sum(asked.values()) == total - 5
    asked.clear()
    evaluate([run], recipe)
    assert contents([run]) == undisturbed and not asked, "what is finished costs nothing"


def test_another_version_or_other_settings_are_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    recipe, run = make_benchmarks(tmp_path, ["camvid", "pascal5i"])
    evaluate([run], recipe)
    read = benchmarks.read
    for change in ({"version": 2}, {"settings": {"cell": 50}}, {"examples": 2}):
        asked.clear()
        changed = read("pascal5i").model_copy(update=change)
        with monkeypatch.context() as patch:
            patch.setattr(benchmarks, "read", lambda name, changed=changed: changed if name == "pascal5i" else read(name))
            (evaluation,) = evaluate([run], recipe)
        assert {name for name, _, _ in asked} == {f"pascal5i@{changed.version}"}
        assert evaluation["benchmarks"]["pascal5i"]["version"] == changed.version


def test_the_same_bytes_for_none_one_and_two_workers(tmp_path: Path, ray_session: None) -> None:
    recipe, run = make_benchmarks(tmp_path, ["camvid", "lvm_perplexity", "pascal5i"])
    found = []
    for workers in (0, 1, 2):
        shutil.rmtree(f"{run}/answered", ignore_errors=True)
        (tmp_path / "run" / "data" / "references.json").unlink(missing_ok=True)
        evaluate([run], recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"workers": workers})}))
        found.append(contents([run]))
    assert found[0] == found[1] == found[2]


def test_two_runs_are_compared_on_benchmarks_too(tmp_path: Path) -> None:
    recipe, run = make_benchmarks(tmp_path, ["camvid", "pascal5i"])
    other = make_run(tmp_path / "run" / "other", recipe, seed=8)
    evaluations = evaluate([run, other], recipe)
    found = compare(run, other)["tasks"]
    first, second = (one["benchmarks"]["pascal5i"]["scores"]["miou"]["value"] for one in evaluations)
    assert found["pascal5i@1"]["miou"]["difference"] == pytest.approx(second - first, abs=2e-6)
    assert "camvid@1" in found


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"imagenet": "x"}, "benchmarks: no benchmark is called 'imagenet': there are camvid, "),
        (
            {"lvm_perplexity": "x"},
            "benchmarks.lvm_perplexity: it shows 5 pairs before a query, and sentences of 4 pairs take at most 3: "
            "train with pairs: 6, or leave it out",
        ),
        ({"deblur": "x"}, "benchmarks.deblur: it shows training pairs of deblur, which is not among the tasks segmentation"),
        ({"camvid": "x"}, "benchmarks.camvid: it asks for tasks.segmentation.classes: ['sky', "),
    ],
)
def test_what_a_run_cannot_be_asked_is_refused_in_one_line(named: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        toy_recipe("x", tasks={"segmentation": {"classes": ["car"]}}, benchmarks=named)
    assert "\n" not in caught.value.errors()[0]["msg"]  # type: ignore[attr-defined]


def test_missing_data_is_refused_with_the_layout_it_should_have(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, tasks={"invert": {}}, benchmarks={"pascal5i": f"{tmp_path}/VOC2012/"})
    place = f"{tmp_path}/VOC2012"
    with pytest.raises(UserError) as caught:
        benchmark_lines(recipe)
    assert str(caught.value).startswith(f"benchmarks.pascal5i.images: no folder {place}/JPEGImages")
    assert f"(it expects images in {place}/JPEGImages, masks in {place}/SegmentationClassAug, folds in" in str(caught.value)
    pascal(tmp_path / "VOC2012")
    (tmp_path / "VOC2012" / "splits" / "pascal" / "val" / "fold2.txt").unlink()
    with pytest.raises(UserError, match=r"benchmarks\.pascal5i\.folds: .* has no fold2\.txt"):
        benchmark_lines(recipe)


def test_a_query_without_enough_others_of_its_class_is_refused(tmp_path: Path) -> None:
    pascal(tmp_path / "VOC2012")
    write(tmp_path / "VOC2012" / "splits" / "pascal" / "val" / "fold1.txt", b"2008_100000__06\n")
    recipe = toy_recipe(tmp_path, tasks={"invert": {}}, benchmarks={"pascal5i": f"{tmp_path}/VOC2012"})
    items = {"pascal5i@1": listed(recipe, subjects(recipe)["pascal5i@1"])}
    with pytest.raises(UserError, match=r"benchmarks\.pascal5i@1: 0 other items of class 6 can stand before 2008_100000__06"):
        make_units(recipe, items, None, [], 1, None)  # type: ignore[arg-type]


def test_a_line_of_a_fold_that_names_no_image_is_set_aside(tmp_path: Path) -> None:
    pascal(tmp_path)
    lists = tmp_path / "splits" / "pascal" / "val" / "fold0.txt"
    lists.write_text(lists.read_text() + "../../etc/passwd__01\nnonsense\n\n2008_000000__01\n")
    task = benchmarks.task_of("pascal5i", str(tmp_path), {}, 4)
    problems = [item.problem for item in task.items("test") if item.problem]
    assert len(problems) == 3
    assert problems[0].endswith("fold0.txt: line 5 names ../../etc/passwd, which has no image")
    assert problems[1].endswith("line 6 is 'nonsense', expected IMAGE__CLASS") and "duplicate id" in problems[2]


def test_annotations_that_are_none_are_set_aside(tmp_path: Path) -> None:
    boxes(tmp_path)
    notes, names = tmp_path / "Annotations", tmp_path / "ImageSets" / "Main" / "val.txt"
    (notes / "2008_000001.xml").write_text('<!DOCTYPE a [<!ENTITY b "bb">]><annotation>&b;</annotation>')
    (notes / "2008_000002.xml").write_text("<annotation><object></annotation>")
    (notes / "2008_000004.xml").write_text("<annotation><object><bndbox/></object></annotation>")
    names.write_text(names.read_text() + "\n../../etc/passwd\n")
    items = list(benchmarks.task_of("detect", str(tmp_path), {}, 4).items("test"))
    assert [item.id for item in items if not item.problem] == [f"2008_{i:06d}" for i in (5, 7, 8)]
    reasons = ("with declarations", "mismatched tag", "it has no bndbox/xmin", "names ../../etc/passwd, which has no image")
    for problem, reason in zip((item.problem for item in items if item.problem), reasons, strict=True):
        assert reason in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["iou"]}, "metrics: no metric of colourise is called 'iou': there are colour_mse, psnr, target_perplexity"),
        ({"task": "images"}, "task: found 'images', which is no task with labels"),
        ({"example": 1}, "example: no such key; did you mean 'examples'?"),
    ],
)
def test_a_benchmarks_file_is_read_strictly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    values = yaml.safe_load((benchmarks.FOLDER / "colourise.yaml").read_text()) | change
    (tmp_path / "mine_alone.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"benchmarks: {tmp_path}/mine_alone.yaml: {message}")):
        toy_recipe("x", benchmarks={"mine_alone": "data"})


def test_a_dry_run_lists_benchmarks_and_their_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pascal(tmp_path / "VOC2012")
    recipe = toy_recipe(tmp_path / "run", tasks={"invert": {}}, benchmarks={"pascal5i": f"{tmp_path}/VOC2012"})
    (tmp_path / "recipe.yaml").write_text(config.dump(recipe))
    assert cli.main(["evaluate", f"{tmp_path}/recipe.yaml", "--dry-run"]) == 0
    assert "benchmark pascal5i@1: 17 items, 1 pairs of its own before each; miou, miou_fold0" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_benchmark_changes_no_training(tmp_path: Path) -> None:
    with_it = toy_recipe(tmp_path, benchmarks={"pascal5i": "x"})
    assert config.fingerprint(with_it) == config.fingerprint(toy_recipe(tmp_path))


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="the research copies of real images are not here")
def test_camvid_itself_scores_as_a_loop_over_its_classes() -> None:
    tasks = toy_recipe("x", tasks={"segmentation": CAMVID}).tasks
    task = benchmarks.task_of("camvid", str(SHARED / "camvid"), tasks, 4)
    items = list(task.items("test"))
    assert len(items) == 233 and not any(item.problem for item in items)
    samples = [task.load(item, "test") for item in items[::40]]
    said = [np.roll(sample.label, 9, axis=1) % 11 for sample in samples]
    measures = [task.measure(answer, sample) for answer, sample in zip(said, samples, strict=True)]
    ious = []
    for i in range(11):
        shared = union = 0
        for answer, sample in zip(said, samples, strict=True):
            counted = sample.label != 11
            one, other = (sample.label == i) & counted, (answer == i) & counted
            shared, union = shared + int((one & other).sum()), union + int((one | other).sum())
        ious += [shared / union] if union else []
    assert task.score(measures)["miou"] == pytest.approx(np.mean(ious), abs=1e-9)


@pytest.mark.skipif(not (SHARED / "rain100L").is_dir(), reason="the research copies of real images are not here")
def test_doing_nothing_on_the_derain_benchmark_scores_what_it_says() -> None:
    rain_source = {"rainy": str(SHARED / "rain100L" / "rainy"), "clean": str(SHARED / "rain100L" / "clean")}
    tasks = toy_recipe("x", tasks={"derain": {"train": rain_source}}).tasks
    task: PairTask = benchmarks.task_of("derain", str(SHARED / "rain100L"), tasks, 4)
    samples = [task.load(item, "test") for item in task.items("test")]
    found = task.score([task.measure(sample.image, sample) for sample in samples])
    assert len(samples) == 100 and found["psnr_y"] == pytest.approx(26.90, abs=0.01)
    assert found["ssim_y"] == pytest.approx(0.838, abs=0.0006) and "26.90 dB and 0.838" in benchmarks.read("derain").says
