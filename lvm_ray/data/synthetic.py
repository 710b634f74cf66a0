"""The embedded data set: drawn scenes with a long tail, written in the formats that users have.

Scenes are drawn, not stored: 2 to 4 overlapping objects on textured backgrounds, people of different sizes and poses,
rain of different angle and density. Each is a pure function of (seed, split, task, index), so training, validation
and test scenes never meet. The files are read back by the same readers as anyone's data:

    FOLDER/SPLIT/segmentation/{images,masks}/NAME.png   masks indexed, 0 background, 1 disk, 2 box, 3 triangle
    FOLDER/SPLIT/pose/images/NAME.png, keypoints.json   COCO person keypoints
    FOLDER/SPLIT/derain/{rainy,clean}/NAME.png
"""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lvm_ray.tasks.base import SPLITS, Picture
from lvm_ray.tasks.pose import JOINTS
from lvm_ray.tasks.rain import add_rain

VERSION = 2  # grows when the scenes change, so that a pipeline's older ones are drawn anew
CLASSES = ("disk", "box", "triangle")
OVERSAMPLE = 2  # shapes are drawn finer and averaged down
HUES = {
    "disk": (0.93, 1.21),
    "box": (0.22, 0.50),
    "triangle": (0.53, 0.83),
}  # as fruit, leaves and flowers differ: often, not always


def scene(rng: np.random.Generator, size: int) -> tuple[Picture, NDArray[np.uint8]]:
    """A scene [size, size, 3] of 2 to 4 overlapping objects and its mask of class ids [size, size]."""
    image, mask = background(rng, size), np.zeros((size, size), dtype=np.uint8)
    for _ in range(int(rng.integers(2, 5))):
        name = CLASSES[int(rng.integers(len(CLASSES)))]
        cover = _shape(rng, name, size)
        image = _paint(image, cover, _object_texture(rng, name, size))
        mask[cover >= 0.5] = CLASSES.index(name) + 1
    return image, mask


def background(rng: np.random.Generator, size: int) -> Picture:
    """A muted two-tone texture: a gradient, waves of several directions and some grain."""
    y, x = np.mgrid[0:size, 0:size] / size
    tone = rng.uniform(-1, 1) * x + rng.uniform(-1, 1) * y
    for _ in range(3):
        angle, waves = rng.uniform(0, math.pi), rng.uniform(1, 5)
        tone = tone + rng.uniform(0.1, 0.5) * np.sin(
            2 * math.pi * (waves * (x * math.cos(angle) + y * math.sin(angle)) + rng.random())
        )
    tone = np.clip(0.5 + tone / 2, 0, 1)[..., None]
    low, high = (_colour(rng, rng.random(), (0.0, 0.35), (0.25, 0.95)) for _ in range(2))
    return _to_picture(low * (1 - tone) + high * tone + rng.normal(0, 4, (size, size, 1)))


def person(rng: np.random.Generator, size: int) -> tuple[Picture, NDArray[np.float64]]:
    """A person in a scene: picture [size, size, 3] and 17 joints x, y, visibility (COCO's order; the face unlabelled)."""
    joints, height = _body(rng, size)
    image = background(rng, size)
    shirt, trousers = (_colour(rng, rng.random(), (0.45, 1.0), (0.35, 1.0)) for _ in range(2))
    skin = _colour(rng, rng.uniform(0.03, 0.1), (0.3, 0.6), (0.45, 0.95))
    thick = height * rng.uniform(0.055, 0.08)
    j = {name: joints[i, :2] for i, name in enumerate(JOINTS)}
    image = _paint(
        image, _limbs([(j["left_hip"], j["left_knee"]), (j["left_knee"], j["left_ankle"])], thick * 1.2, size), trousers * 0.8
    )
    image = _paint(
        image, _limbs([(j["right_hip"], j["right_knee"]), (j["right_knee"], j["right_ankle"])], thick * 1.2, size), trousers
    )
    chest = [j["left_shoulder"], j["right_shoulder"], j["right_hip"], j["left_hip"]]
    image = _paint(image, _polygon(chest, size, outline=thick), shirt)
    for side, shade in (("left", 0.75), ("right", 1.0)):
        image = _paint(image, _limbs([(j[f"{side}_shoulder"], j[f"{side}_elbow"])], thick, size), shirt * shade)
        image = _paint(image, _limbs([(j[f"{side}_elbow"], j[f"{side}_wrist"])], thick * 0.8, size), skin * shade)
    neck = (j["left_shoulder"] + j["right_shoulder"]) / 2
    up = neck - (j["left_hip"] + j["right_hip"]) / 2
    head = neck + up / np.linalg.norm(up) * height * 0.13
    image = _paint(image, _limbs([(head, head + 0.01)], height * 0.17, size), skin)
    return image, joints


def rain_pair(rng: np.random.Generator, size: int) -> tuple[Picture, Picture]:
    """A rainy scene and the same scene without rain, both [size, size, 3]."""
    clean, _ = scene(rng, size)
    return add_rain(clean, rng), clean


def write(folder: str, counts: dict[str, dict[str, int]], size: int, seed: int, advance: Callable[[int], None]) -> None:
    """Write the data set: `counts` is {split: {task: pairs}}. `advance` hears of every finished pair."""
    writers: dict[str, Callable[..., None]] = {"segmentation": _write_segmentation, "pose": _write_pose, "derain": _write_derain}
    for split, tasks in counts.items():
        for task, count in tasks.items():
            place = Path(folder) / split / task
            writers[task](
                place,
                [np.random.default_rng([seed, SPLITS.index(split), list(writers).index(task), i]) for i in range(count)],
                size,
                advance,
            )


def _write_segmentation(place: Path, rngs: list[np.random.Generator], size: int, advance: Callable[[int], None]) -> None:
    images, masks = _folders(place, "images", "masks")
    colours = [0, 0, 0, 220, 60, 60, 60, 180, 75, 65, 105, 225]
    for i, rng in enumerate(rngs):
        image, mask = scene(rng, size)
        Image.fromarray(image).save(images / f"{i:05d}.png", compress_level=1)
        indexed = Image.fromarray(mask, mode="P")
        indexed.putpalette(colours)
        indexed.save(masks / f"{i:05d}.png")
        advance(1)


def _write_pose(place: Path, rngs: list[np.random.Generator], size: int, advance: Callable[[int], None]) -> None:
    (images,) = _folders(place, "images")
    records: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for i, rng in enumerate(rngs):
        image, joints = person(rng, size)
        Image.fromarray(image).save(images / f"{i:05d}.png", compress_level=1)
        seen = joints[joints[:, 2] > 0, :2]
        low, high = seen.min(0), seen.max(0)
        margin = 0.05 * (high - low)
        low, high = np.maximum(low - margin, 0), np.minimum(high + margin, size)
        box = [round(float(value), 2) for value in (*low, *(high - low))]
        keypoints = joints.round(2).reshape(-1).tolist()
        records.append({"id": i, "file_name": f"{i:05d}.png", "width": size, "height": size})
        entries.append(
            {
                "id": i,
                "image_id": i,
                "category_id": 1,
                "iscrowd": 0,
                "keypoints": keypoints,
                "num_keypoints": len(seen),
                "bbox": box,
                "area": round(0.53 * box[2] * box[3], 2),
            }
        )
        advance(1)
    category = {"id": 1, "name": "person", "keypoints": JOINTS}
    content = {"images": records, "annotations": entries, "categories": [category]}
    (place / "keypoints.json").write_text(json.dumps(content))


def _write_derain(place: Path, rngs: list[np.random.Generator], size: int, advance: Callable[[int], None]) -> None:
    rainy_folder, clean_folder = _folders(place, "rainy", "clean")
    for i, rng in enumerate(rngs):
        rainy, clean = rain_pair(rng, size)
        Image.fromarray(rainy).save(rainy_folder / f"{i:05d}.png", compress_level=1)
        Image.fromarray(clean).save(clean_folder / f"{i:05d}.png", compress_level=1)
        advance(1)


def _folders(place: Path, *names: str) -> list[Path]:
    for name in names:
        (place / name).mkdir(parents=True, exist_ok=True)
    return [place / name for name in names]


def _body(rng: np.random.Generator, size: int) -> tuple[NDArray[np.float64], float]:
    """Joints of a person in a random pose who stands wholly in the picture, and the person's upright height."""
    while True:
        height = size * rng.uniform(0.5, 0.95)
        lean = rng.normal(0, 0.9)  # gymnasts: also lying and head over heels
        up = np.array([math.sin(lean), -math.cos(lean)])
        across = np.array([-up[1], up[0]])  # towards the person's left, who faces us
        hips = np.array([0.0, 0.0])
        neck = hips + up * height * 0.3
        joints = np.zeros((17, 3))
        for side, sign in (("left", 1), ("right", -1)):
            shoulder, hip = neck + sign * across * height * 0.11, hips + sign * across * height * 0.075
            arm, bend = rng.uniform(-0.3, 2.9), rng.uniform(-0.2, 2.0)
            elbow = shoulder + _turned(-up, -sign * arm) * height * 0.17
            wrist = elbow + _turned(-up, -sign * (arm + bend)) * height * 0.16
            leg, fold = rng.uniform(-0.15, 1.1), rng.uniform(-1.0, 0.15)
            knee = hip + _turned(-up, -sign * leg) * height * 0.23
            ankle = knee + _turned(-up, -sign * (leg + fold)) * height * 0.23
            for name, place in (
                ("shoulder", shoulder),
                ("elbow", elbow),
                ("wrist", wrist),
                ("hip", hip),
                ("knee", knee),
                ("ankle", ankle),
            ):
                joints[JOINTS.index(f"{side}_{name}")] = (*place, 2)
        seen = joints[joints[:, 2] > 0, :2]
        low, high = np.minimum(seen.min(0), neck + up * height * 0.22 - height * 0.02), np.maximum(seen.max(0), neck)
        room = size * 0.94 - (high - low)
        if (room > 0).all():
            joints[joints[:, 2] > 0, :2] += size * 0.03 - low + rng.random(2) * room
            return joints, height


def _turned(direction: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([cosine * direction[0] - sine * direction[1], sine * direction[0] + cosine * direction[1]])


def _shape(rng: np.random.Generator, name: str, size: int) -> NDArray[np.float32]:
    """Coverage [size, size] in 0..1 of a disk, box or triangle at a random place, size, proportion and turn."""
    centre = rng.uniform(0.15, 0.85, 2) * size
    radius = rng.uniform(0.14, 0.3) * size
    stretch = np.array([1.0, rng.uniform(0.65, 1.0)])
    turn = rng.uniform(0, 2 * math.pi)
    corners = {"disk": 32, "box": 4, "triangle": 3}[name]
    angles = np.arange(corners) * 2 * math.pi / corners
    outline = np.stack([np.cos(angles), np.sin(angles)], -1) * radius * stretch * {"disk": 1.0, "box": 1.2, "triangle": 1.4}[name]
    return _polygon([centre + _turned(point, turn) for point in outline], size)


def _object_texture(rng: np.random.Generator, name: str, size: int) -> NDArray[np.float64]:
    """A vivid colour of the class's own range, shaded, [size, size, 3]."""
    low, high = HUES[name]
    colour = _colour(rng, rng.uniform(low, high) % 1.0, (0.6, 1.0), (0.5, 1.0))
    y, x = np.mgrid[0:size, 0:size] / size
    angle, waves = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 3)
    shade = 1 + rng.uniform(0.05, 0.25) * np.sin(2 * math.pi * waves * (x * math.cos(angle) + y * math.sin(angle)) + angle)
    return np.asarray(colour * shade[..., None])


def _colour(
    rng: np.random.Generator, hue: float, saturation: tuple[float, float], value: tuple[float, float]
) -> NDArray[np.float64]:
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value))) * 255


def _polygon(points: list[NDArray[np.float64]], size: int, outline: float = 0) -> NDArray[np.float32]:
    canvas = Image.new("L", (size * OVERSAMPLE, size * OVERSAMPLE))
    flat = [(float(x) * OVERSAMPLE, float(y) * OVERSAMPLE) for x, y in points]
    pen = ImageDraw.Draw(canvas)
    pen.polygon(flat, fill=255)
    if outline:
        pen.line([*flat, flat[0]], fill=255, width=max(1, round(outline * OVERSAMPLE)), joint="curve")
    return _cover(canvas, size)


def _limbs(lines: list[tuple[NDArray[np.float64], NDArray[np.float64]]], thick: float, size: int) -> NDArray[np.float32]:
    canvas = Image.new("L", (size * OVERSAMPLE, size * OVERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    radius = thick * OVERSAMPLE / 2
    for a, b in lines:
        pen.line([*(a * OVERSAMPLE), *(b * OVERSAMPLE)], fill=255, width=max(1, round(2 * radius)))
        for x, y in (a * OVERSAMPLE, b * OVERSAMPLE):
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    return _cover(canvas, size)


def _cover(canvas: Image.Image, size: int) -> NDArray[np.float32]:
    cover = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    return cover / np.float32(255)


def _paint(image: Picture, cover: NDArray[np.float32], colour: NDArray[np.float64]) -> Picture:
    alpha = cover[..., None]
    return _to_picture(image * (1 - alpha) + colour * alpha)


def _to_picture(values: NDArray[np.float64]) -> Picture:
    return values.round().clip(0, 255).astype(np.uint8)
