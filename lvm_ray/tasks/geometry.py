"""Seeing an image, a mask or points through a `View`. The one place where pixels and labels are moved.

A view maps the rectangle `box` of the original onto a size x size picture. Every function here takes the same view, so
an image and its label land in the same place; outside the original is black (or `outside`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lvm_ray.tasks.base import Picture, View

TRIES = 8  # of a crop that keeps what it must


def whole(image: NDArray[np.uint8]) -> View:
    """The view of everything: the image squeezed into the picture, nothing cut off."""
    height, width = image.shape[:2]
    return View((0.0, 0.0, float(width), float(height)))


def square_around(x: float, y: float, side: float) -> View:
    """The view of a square with its centre at x, y."""
    return View((x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def random_crop(view: View, rng: np.random.Generator, smallest: float) -> View:
    """A random part of a view with at least `smallest` of its area and its proportions, mirrored half of the time."""
    x0, y0, x1, y1 = view.box
    scale = math.sqrt(rng.uniform(smallest, 1.0))
    width, height = (x1 - x0) * scale, (y1 - y0) * scale
    left = x0 + rng.uniform(0, 1) * (x1 - x0 - width)
    top = y0 + rng.uniform(0, 1) * (y1 - y0 - height)
    return replace(view, box=(left, top, left + width, top + height), mirrored=bool(rng.random() < 0.5))


def random_turn(view: View, rng: np.random.Generator, most: float) -> View:
    """A view turned by at most `most` degrees to either side."""
    return replace(view, turned=float(rng.uniform(-most, most)))


def random_tint(view: View, rng: np.random.Generator, hue: float = 180.0) -> View:
    """A view in other colours: hues turned by at most `hue` degrees around the grey axis, saturation and brightness changed."""
    angle = rng.uniform(0, 2 * math.radians(hue))
    if hue < 180:  # on the full circle it does not matter where the range starts
        angle -= math.radians(hue)
    saturation, brightness = rng.uniform(0.5, 1.2), rng.uniform(0.7, 1.2)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * cross  # Rodrigues' rotation around grey, without its axis
    tint = brightness * (grey + saturation * turn)
    return replace(view, tint=tuple(float(value) for value in tint.reshape(-1)))


def part_of(image: NDArray[np.uint8], rng: np.random.Generator | None, smallest_crop: float, turn: float, hue: float) -> View:
    """The view of everything, or with `rng` an augmented one of at least `smallest_crop` of it."""
    return whole(image) if rng is None else augmented(whole(image), rng, smallest_crop, turn, hue)


def crop_that_keeps(points: NDArray[np.float64], view: View, rng: np.random.Generator, smallest: float, turn: float) -> View:
    """A random turned crop of a view that keeps all points [K, 2] of the original inside: the first of a few tries, or else the
    whole view, mirrored half of the time."""
    for _ in range(TRIES):
        crop = random_turn(random_crop(view, rng, smallest), rng, turn)
        seen = see_points(points, crop, 1)
        if (seen > 0).all() and (seen < 1).all():
            return crop
    return replace(view, mirrored=bool(rng.random() < 0.5))


def augmented(view: View, rng: np.random.Generator, smallest_crop: float, turn: float, hue: float) -> View:
    """A random crop of a view, mirrored half of the time, turned by at most `turn` degrees, its hues by at most `hue`; 0 leaves
    either as it is."""
    view = random_crop(view, rng, smallest_crop)
    if turn:
        view = random_turn(view, rng, turn)
    return random_tint(view, rng, hue) if hue else view


def see_image(image: Picture, view: View, size: int) -> Picture:
    """An image through a view: [H, W, 3] -> [size, size, 3], bicubic with antialiasing."""
    seen = _see(image, view, size, Image.Resampling.BICUBIC, outside=0)
    if view.tint is None:
        return seen
    tinted: Picture = (seen @ np.reshape(view.tint, (3, 3)).T).round().clip(0, 255).astype(np.uint8)
    return tinted


def see_mask(mask: NDArray[np.uint8], view: View, size: int, outside: int) -> NDArray[np.uint8]:
    """A mask of class ids through a view: [H, W] -> [size, size], nearest pixel, so that no id is invented."""
    return _see(mask, view, size, Image.Resampling.NEAREST, outside)


def see_points(points: NDArray[np.float64], view: View, size: int) -> NDArray[np.float64]:
    """Points [..., 2] of the original (pixel edges at whole numbers) in the picture's pixels."""
    x0, y0, x1, y1 = view.box
    seen = (_turn(points, view, view.turned) - (x0, y0)) * (size / (x1 - x0), size / (y1 - y0))
    if view.mirrored:
        seen[..., 0] = size - seen[..., 0]
    return np.asarray(seen)


def unsee_points(points: NDArray[np.float64], view: View, size: int) -> NDArray[np.float64]:
    """Points [..., 2] of the picture back in the original's pixels: the inverse of `see_points`."""
    x0, y0, x1, y1 = view.box
    seen = np.array(points, dtype=np.float64)
    if view.mirrored:
        seen[..., 0] = size - seen[..., 0]
    return _turn(seen * ((x1 - x0) / size, (y1 - y0) / size) + (x0, y0), view, -view.turned)


def unsee_mask(mask: NDArray[np.uint8], view: View, height: int, width: int, outside: int) -> NDArray[np.uint8]:
    """A picture's mask [S, S] laid back onto the original's [height, width] pixels, nearest pixel."""
    size = mask.shape[0]
    centres_y, centres_x = np.mgrid[0:height, 0:width] + 0.5
    seen = np.floor(see_points(np.stack([centres_x, centres_y], -1), view, size)).astype(int)
    inside = ((seen >= 0) & (seen < size)).all(-1)
    seen = seen.clip(0, size - 1)
    return np.where(inside, mask[seen[..., 1], seen[..., 0]], outside).astype(np.uint8)


def _turn(points: NDArray[np.float64], view: View, degrees: float) -> NDArray[np.float64]:
    """Points [..., 2] turned counter-clockwise around the box's centre, as a person looking at the image sees it."""
    x0, y0, x1, y1 = view.box
    centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.asarray((points - centre) @ np.array([[cosine, -sine], [sine, cosine]]) + centre)


def _see(pixels: NDArray[np.uint8], view: View, size: int, how: Image.Resampling, outside: int) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = view.box
    left, top = max(0, math.ceil(-x0)), max(0, math.ceil(-y0))
    right, bottom = max(0, math.ceil(x1 - width)), max(0, math.ceil(y1 - height))
    if left or top or right or bottom:
        borders = [(top, bottom), (left, right), (0, 0)][: pixels.ndim]
        pixels = np.pad(pixels, borders, constant_values=outside)
    box = (x0 + left, y0 + top, x1 + left, y1 + top)
    image = Image.fromarray(pixels)
    if view.turned:
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        fill = outside if pixels.ndim == 2 else (outside,) * 3
        image = image.rotate(view.turned, how, center=centre, fillcolor=fill)
    seen = np.asarray(image.resize((size, size), how, box=box))
    return np.ascontiguousarray(seen[:, ::-1]) if view.mirrored else seen
