"""A tiny pipeline for clusters: images that every host sees, a recipe, four verbs with what they come to, and how far they are.

The pictures are 16 x 16 pixels and the model has 22 thousand weights, 90 KB: at 1 Mbit/s gradients are exchanged in a second.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from lvm_ray.data.shards import open_shards
from tests.faults.runs import journal, model, reached

SIZE, IMAGES, HELD_OUT, COPIES = 16, 640, 192, 16
STEPS, EVERY = 80, 10
RATES = [1e-3, 2e-3, 4e-3]
SPACE = f"""from ray import tune

space = {{"train.rate": tune.grid_search({RATES})}}
best = 1
repeats = 0
"""
THREE = ("compute.workers=3",)  # processes of one thread: on hosts of two logical CPUs they are never all on one
ALONE = ("compute.workers=1",)  # a trial trains in its own process


class Stage(NamedTuple):
    """A verb on a cluster.

    worker     what stands in the titles of the processes that work for it
    settings   of its recipe, beside the run's folder
    needs      folders of the base that a run starts with, copied
    progress   by a run's folder: how much is done, 0 when it starts
    begun      the progress from which on it is in the middle of its work
    result     by a run's folder: what must not depend on where or how disturbed it ran
    """

    worker: str
    settings: tuple[str, ...]
    needs: tuple[str, ...]
    progress: Callable[[Path], int]
    begun: int
    result: Callable[[Path], Any]


def make_images(folder: Path) -> None:
    """Images of coloured squares, and masks of what is bright, of all splits."""
    generator = np.random.default_rng(0)
    for split, number in (("train", IMAGES), ("validation", 16), ("test", HELD_OUT)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for item in range(number):
            squares = generator.integers(0, 4, (4, 4, 3)) * 85
            image = squares.astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            Image.fromarray(image).save(folder / split / "images" / f"{item:03d}.png")
            Image.fromarray((image.mean(axis=2) > 127).astype(np.uint8)).save(folder / split / "masks" / f"{item:03d}.png")


def write_recipe(folder: Path) -> Path:
    """The recipe of two tasks on the images below a folder."""
    splits = ("train", "validation", "test")
    values = {
        "size": SIZE,
        "tasks": {
            "segmentation": {"classes": ["bright"], "copies": COPIES}
            | {split: {"images": f"{folder}/{split}/images", "masks": f"{folder}/{split}/masks"} for split in splits},
            "colourise": {split: {"images": f"{folder}/{split}/images"} for split in splits},
        },
        "tokenizer": {"codes": 64, "steps": 5, "pictures": 64},
        "model": {"width": 32, "layers": 2, "heads": 2, "mlp": 64},
        "train": {
            **{"steps": STEPS, "batch": 16, "micro_batch": 2, "rate": 1e-3, "log_every": 1, "checkpoint_every": EVERY},
            **{"validation": 4, "keep_best": 0},
        },
        "evaluate": {"batch": 4},
        "compute": {"workers": 2, "threads": 1, "precision": "fp32", "device": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    (folder / "rates.py").write_text(SPACE)
    return path


def arguments(recipe: Path, verb: str, run: Path, *settings: str) -> list[str]:
    """What follows the verb on the command line."""
    space = ["--space", str(recipe.parent / "rates.py")] if verb == "tune" else []
    changes = [part for setting in settings for part in ("--set", setting)]
    return [str(recipe), "--run", str(run), *space, *changes]


def prepare(base: Path, run: Path, stage: Stage) -> None:
    """A run's folder with what the stage starts from, out of a finished pipeline."""
    run.mkdir(parents=True)
    for part in stage.needs:
        shutil.copytree(base / part, run / part)


def content(run: Path) -> dict[str, str]:
    """A checksum of each part of a run's shards: ids and tokens, in the order of ids."""
    shards, sums = open_shards(str(run / "data" / "shards")), {}
    for split, tasks in shards.manifest.rows.items():
        for task, copies in tasks.items():
            for copy in copies:
                ids, tokens = shards.pairs(split, task, copy)
                assert len(ids) == len(set(ids)), f"{split} {task} {copy}: pairs stand twice"
                order = sorted(range(len(ids)), key=ids.__getitem__)
                both = repr([ids[place] for place in order]).encode() + np.ascontiguousarray(tokens[order]).tobytes()
                sums[f"{split} {task} {copy}"] = hashlib.sha256(both).hexdigest()
    return sums


def evaluation(run: Path) -> bytes:
    return (run / "evaluation.json").read_bytes()


def sweep(run: Path) -> Mapping[str, Any]:
    """A sweep's values without what a clock says, and its best recipe."""
    values = json.loads((run / "tune" / "rates" / "sweep.json").read_text())
    trials = [{key: value for key, value in one.items() if key != "seconds"} for one in values["trials"]]
    best = values["best"] and {key: value for key, value in values["best"].items() if key != "seconds"}
    return values | {"trials": trials, "best": best}


def trained(run: Path) -> Any:
    """Each step's rows, losses and gradient, and the model."""
    return journal(run), model(run)


def _units(run: Path) -> int:
    return len(list((run / "data" / "shards" / ".units").glob("*.json")))


def _answered(run: Path) -> int:
    return len([path for path in (run / "answered").rglob("*") if path.is_file()])


def _trial_steps(run: Path) -> int:
    return max((reached(path.parent) for path in run.glob("tune/rates/trials/*/metrics.jsonl")), default=0)


STAGES = {
    "tokenize": Stage("UnitTokenizer", THREE, ("tokenizer",), _units, 2, content),
    "train": Stage("RayTrainWorker", (), ("tokenizer", "data"), reached, EVERY + 3, trained),
    "tune": Stage("ImplicitFunc", ALONE, ("tokenizer", "data"), _trial_steps, EVERY + 3, sweep),
    "evaluate": Stage("Scorer", THREE, ("tokenizer", "data", "model"), _answered, 3, evaluation),
}
