"""One recipe with every task and every kind of source, from published layouts to a scored model: nothing but files goes in."""

import json
from pathlib import Path

import yaml

from lvm_ray import cli
from lvm_ray.data.shards import open_shards
from lvm_ray.tasks import TASKS
from tests.layouts import coco, encoded, good_sa1b_pair, make_lmdb, make_tar, mask_of, member, person, picture, rle_of, write

MANY = 14


def sources(place: Path) -> dict[str, dict]:
    """A task's section each, on a data set of its own."""
    dogs = [
        {"id": i, "image_id": i, "category_id": 18, "iscrowd": 0, "segmentation": rle_of(mask_of(12, 16, (2, 3, 6, 5)))}
        for i in range(1, MANY + 1)
    ]
    make_tar(place / "sa1b" / "sa_000000.tar", [entry for i in range(MANY) for entry in good_sa1b_pair(i)])
    make_tar(place / "laion" / "00000.tar", [member(f"{i:09d}.jpg", encoded(picture(i), "JPEG")) for i in range(MANY)])
    for side in ("input", "target"):
        make_lmdb(place / f"{side}.lmdb", {f"{i:04d}": encoded(picture(i + 50 * (side == "target"))) for i in range(MANY)})
    for i in range(MANY):
        for kind in ("blur", "sharp"):
            write(place / "gopro" / f"scene{i:02d}" / kind / "000001.png", encoded(picture(i + (kind == "blur"))))
        for kind in ("photos", "edges"):
            write(place / kind / f"{i}.png", encoded(picture(i + 9 * (kind == "edges"))))
        for frame in range(4):
            write(place / "clips" / f"clip{i}" / f"{frame}.png", encoded(picture(i + frame)))
        write(place / "voc" / "masks" / f"2008_{i:06d}.png", encoded(mask_of(12, 16, (2, 3, 6, 5))))
        write(place / "voc" / "images" / f"2008_{i:06d}.jpg", encoded(picture(i), "JPEG"))
    for fold in range(4):
        lines = "".join(f"2008_{i:06d}__01\n" for i in range(fold, MANY, 4))
        write(place / "voc" / "folds" / f"fold{fold}.txt", lines.encode())
    held_out = {"hold_out": {"test": 0.3}}
    people = [person(i, i) for i in range(1, MANY + 1)]
    return {
        "segmentation": {
            "classes": ["dog"],
            "train": {"format": "coco-instances", **coco(place / "dogs", dogs, MANY)},
            **held_out,
        },
        "foreground": {"train": {key: f"{place}/voc/{key}" for key in ("images", "masks", "folds")}, **held_out},
        "objects": {"train": {"tars": str(place / "sa1b")}, "copies": 2, **held_out},
        "pose": {
            "train": {"people": "all", **coco(place / "people", people, MANY)},
            **held_out,
        },
        "derain": {"train": {"format": "lmdb", "degraded": f"{place}/input.lmdb", "clean": f"{place}/target.lmdb"}, **held_out},
        "deblur": {"train": {"blurred": f"{place}/gopro/*/blur", "clean": f"{place}/gopro/*/sharp"}, **held_out},
        "pictures": {"train": {"images": f"{place}/photos", "labels": f"{place}/edges"}, **held_out},
        "detect": {"train": {"format": "coco-instances", **coco(place / "dogs", dogs, MANY)}, "copies": 2, **held_out},
        "colourise": {"train": {"images": f"{place}/photos"}, **held_out},
        "complete": {"train": {"format": "webdataset", "tars": f"{place}/laion"}, **held_out},
        "next_frame": {"train": {"clips": f"{place}/clips", "stride": 3}, **held_out},
        "video": {"train": {"clips": f"{place}/clips", "length": 4}},
        "images": {"train": {"format": "webdataset", "tars": f"{place}/laion"}, "copies": 2},
    }


def test_every_source_goes_from_its_published_layout_to_scores(tmp_path: Path) -> None:
    tasks = sources(tmp_path)
    assert set(tasks) == {name for name in TASKS if TASKS[name].__module__.startswith("lvm_ray")}
    values = {
        "run": f"{tmp_path}/run",
        "size": 16,
        "pairs": 2,
        "tasks": tasks,
        "tokenizer": {"codes": 16, "steps": 1, "pictures": 64},
        "model": {"width": 16, "layers": 1, "heads": 1, "mlp": 16},
        "train": {"steps": 2, "batch": 8, "micro_batch": 8},
        "evaluate": {"examples": 1, "resamples": 100},
        "benchmarks": {"colourise": str(tmp_path / "imagenet")},
        "compute": {"workers": 0, "threads": 1},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    for i in range(3):
        write(tmp_path / "imagenet" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", encoded(picture(i), "JPEG"))
    for verb in ("tokenize", "balance", "train", "evaluate"):
        assert cli.main([verb, str(recipe)]) == 0, verb
    manifest = open_shards(f"{tmp_path}/run/data/shards").manifest
    for name in tasks:
        held_out = manifest.rows.get("test", {}).get(name, {0: 0})[0]
        assert manifest.rows["train"][name][0] + held_out == MANY, name
        assert (held_out > 0) == ("hold_out" in tasks[name]), name
        assert not manifest.bad[name]
    assert manifest.images_per_row["video"] == 4 and manifest.images_per_row["images"] == 1
    # A copy of 0.4 to 1 of the picture's area, and of the square in the middle of 16 x 12 pixels.
    whole, part = manifest.covered["train"]["objects"]
    assert whole == 1 and 0.4 < part < 1 and manifest.covered["train"]["images"][0] == 0.75
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    scores = evaluation["tasks"]
    assert evaluation["benchmarks"]["colourise"]["scores"]["psnr"]["n"] == 3
    assert set(scores) == {name for name in tasks if "hold_out" in tasks[name]}
    for name, metrics in scores.items():
        assert set(metrics) == {*TASKS[name].metrics, "target_perplexity", "token_accuracy"}
    for metrics in scores.values():  # a fold of which no image is held out has no score
        assert all(entry["value"] is not None for name, entry in metrics.items() if not name.startswith("miou_fold"))


def test_an_original_never_changes_its_split_when_images_are_added(tmp_path: Path) -> None:
    for i in range(200):
        write(tmp_path / "photos" / f"{i}.png", b"")
        write(tmp_path / "edges" / f"{i}.png", b"")
    section = {
        "train": {"images": f"{tmp_path}/photos", "labels": f"{tmp_path}/edges"},
        "hold_out": {"test": 0.1, "validation": 0.2},
    }
    task = TASKS["pictures"].model_validate(section)
    before = {split: {item.id for item in task.items(split)} for split in ("train", "validation", "test")}
    assert len(before["test"]) in range(8, 34) and len(before["validation"]) in range(22, 60)
    assert sum(map(len, before.values())) == len(set.union(*before.values())) == 200
    for i in range(200, 260):
        write(tmp_path / "photos" / f"{i}.png", b"")
        write(tmp_path / "edges" / f"{i}.png", b"")
    assert all(before[split] <= {item.id for item in task.items(split)} for split in before)
