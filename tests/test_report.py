"""The report page: charts as text, a whole folder as a page, hostile names, missing parts, and a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lvm_ray.errors import UserError
from lvm_ray.report import charts, page, pictures
from lvm_ray.report.page import write_report

HOSTILE = "<img src=x onerror=alert(1)>.png"
FLOORS = {"segmentation": "all background", "pose": "mean pose", "derain": "median 3x3"}
# task -> metric -> (floor, teacher, student, ceiling, half an interval)
SCORES: dict[str, dict[str, tuple[float, float, float, float | None, float]]] = {
    "segmentation": {"miou": (0.112, 0.534, 0.471, 0.861, 0.031)},
    "pose": {"ap": (0.004, 0.118, 0.071, 0.704, 0.022), "pck": (0.212, 0.618, 0.547, 0.978, 0.035)},
    "derain": {"psnr_y": (20.71, 20.92, 20.43, 22.94, 0.41), "ssim_y": (0.611, 0.628, 0.604, 0.742, 0.018)},
}
SCORES = {
    task: scores | {"target_perplexity": (212.4, 17.8, 20.9, None, 1.6), "token_accuracy": (0.09, 0.381, 0.344, None, 0.014)}
    for task, scores in SCORES.items()
}


def evaluation(role: str) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task, scores in SCORES.items():
        tasks[task] = {}
        for metric, (floor, teacher, student, ceiling, half) in sorted(scores.items()):
            value = teacher if role == "teacher" else student
            tasks[task][metric] = {
                "value": value,
                "ci95": [value - half, value + half],
                "n": 96,
                "floor": floor,
                "floor_name": FLOORS[task],
                "ceiling": ceiling,
                "progress": None if ceiling is None else (value - floor) / (ceiling - floor),
                "higher_is_better": metric != "target_perplexity",
            }
    return {"schema": 1, "tasks": tasks, "bad": {"pose": 2}, "examples": 3, "seed": 0}


def journal(tasks: tuple[str, ...], final: float, rng: np.random.Generator) -> str:
    lines = []
    for step in range(10, 401, 10):
        decay = np.exp(-step / 110)
        losses = {task: final + k * 0.35 + 3.2 * decay + rng.normal(0, 0.05) for k, task in enumerate(tasks)}
        lines.append(
            {"step": step, "rows": step * 8, "tokens": step * 4096, "loss": 3.0, "target_loss": losses, "seconds": step / 4}
        )
    return "".join(json.dumps(line) + "\n" for line in lines)


def draw(task: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A query and its true answer, 64 x 64: shapes on a gradient, a figure of discs, a scene in the rain."""
    y, x = np.mgrid[0:64, 0:64] / 63
    scene = np.stack([90 + 80 * x, 110 + 60 * y, 150 - 50 * x * y], axis=2)
    truth = np.zeros((64, 64, 3))
    if task == "pose":
        joints = 0.5 + (rng.random((9, 2)) - 0.5) * 0.7
        for k, (across, down) in enumerate(joints):
            near = (x - across) ** 2 + (y - down) ** 2
            scene[near < 0.006] = (60, 50, 45)
            truth[near < 0.004] = np.array([(k * 83) % 200 + 55, (k * 151) % 200 + 55, (k * 47) % 200 + 55])
    else:
        for colour in ((220, 80, 60), (60, 170, 90), (70, 90, 210)):
            across, down = rng.random(2) * 0.6 + 0.2
            shape = (np.abs(x - across) < 0.16) & (np.abs(y - down) < 0.16)
            if colour[0] > 200:
                shape = (x - across) ** 2 + (y - down) ** 2 < 0.03
            scene[shape] = np.array(colour) * 0.8 + 20
            truth[shape] = colour
    if task == "derain":
        truth = scene.copy()
        for column in rng.integers(0, 60, 26):
            start = rng.integers(0, 44)
            for k in range(18):
                scene[start + k, min(63, column + k // 5)] += 70
    scene = scene + rng.normal(0, 5, scene.shape)
    return np.clip(scene, 0, 255).astype(np.uint8), np.clip(truth, 0, 255).astype(np.uint8)


def answer(truth: np.ndarray, wrong: float, rng: np.random.Generator) -> np.ndarray:
    """The truth with some of its 8 x 8 patches taken from elsewhere."""
    out = truth.copy()
    for row in range(0, 64, 8):
        for column in range(0, 64, 8):
            if rng.random() < wrong:
                other = rng.integers(0, 8, 2) * 8
                out[row : row + 8, column : column + 8] = truth[other[0] : other[0] + 8, other[1] : other[1] + 8]
    return out


MEASURES: dict[str, dict[str, Any]] = {
    "segmentation": {"intersection": [90, 0, 40], "union": [120, 0, 80]},
    "pose": {"hit": 8, "labelled": 13, "answer": None},
    "derain": {"psnr_y": 20.43, "ssim_y": 0.6},
}


def make_run(folder: Path, role: str, seed: int = 0) -> None:
    """A run folder as training and evaluation leave it."""
    rng = np.random.default_rng(5 + (role == "teacher"))
    (folder / "model").mkdir(parents=True)
    config = {"run": str(folder), "seed": 0, "tasks": dict.fromkeys(SCORES, {}), "model": {"width": 128, "layers": 4}}
    if role == "teacher":
        config["model"] = {"width": 192, "layers": 6}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text(journal(tuple(SCORES), 2.9 if role == "teacher" else 3.1, rng))
    (folder / "evaluation.json").write_text(json.dumps(evaluation(role), sort_keys=True))
    shape = [1024, 2500] if role == "teacher" else [1024, 1000]
    header = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}, "__metadata__": {}}).encode()
    (folder / "model" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    entries = []
    for task in SCORES:
        scenes = np.random.default_rng(seed)  # the same scenes for every role
        (folder / "gallery" / task).mkdir(parents=True)
        for k in range(8):
            query, truth = draw(task, scenes)
            shown = {"query": query, "truth": truth, "answer": answer(truth, 0.1 if role == "teacher" else 0.2, rng)}
            entry = {"task": task, "item": f"{task}-{k:05d}", "measures": MEASURES[task]}
            if task == "segmentation" and k == 0:
                entry["item"] = HOSTILE
            for part, picture in shown.items():
                name = HOSTILE if (task, k, part) == ("segmentation", 0, "query") else f"{k:02d}-{part}.png"
                entry[part] = f"gallery/{task}/{name}"
                Image.fromarray(picture).save(folder / entry[part])
            entries.append(entry)
    (folder / "gallery.json").write_text(json.dumps(entries))


def make_pipeline(folder: Path) -> None:
    """A pipeline folder: both runs, the recipe, the balance table."""
    make_run(folder / "teacher", "teacher")
    make_run(folder / "student", "student")
    tasks = {
        "segmentation": {"train": "s3://reader:hunter2@bucket/a?secret_key=hunter2"},
        "pose": {"copies": 10},
        "derain": {"copies": 50},
    }
    config = {"run": "runs/demo", "seed": 0, "tasks": tasks, "balance": {"strategy": "augment"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "data").mkdir()
    counts = {"segmentation": (3000, 1.0), "pose": (300, 10.0), "derain": (60, 50.0)}
    table = [
        {
            "task": task,
            "pairs": pairs,
            "copies": copies,
            "tokens": pairs * copies * 128,
            "share_before": pairs / 3360,
            "share_after": 1 / 3,
            "rows": 1067,
            "seen": 1067 * 4 / pairs,
            "epochs": 1067 * 4 / pairs / copies,
        }
        for task, (pairs, copies) in counts.items()
    ]
    (folder / "data" / "balance.json").write_text(json.dumps(table))
