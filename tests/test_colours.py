"""The colours of runs: everybody tells them apart, whatever their colour vision, and sees them on the page, light and dark."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from lvm_ray.report import mixture, series

CSS = mixture.colours()
# What those see who lack one kind of cone: in linear RGB, of severity 1, after Machado, Oliveira & Fernandes 2009.
VISIONS = {
    "all": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
RUNS = [f"run-{k}" for k in range(series.COLOURS)]
APART = 10.0  # CIEDE2000: about 1 can just be seen side by side, 10 at a glance


def colours(mode: str) -> dict[str, np.ndarray]:
    """The variables of a mode, RGB in 0..1."""
    block = CSS.split("@media")[0] if mode == "light" else CSS.split("@media")[1].split("}")[0]
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6})", block)
    return {name: np.array([int(digits[k : k + 2], 16) for k in (0, 2, 4)]) / 255 for name, digits in found}


def linear(rgb: np.ndarray) -> np.ndarray:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def seen(rgb: np.ndarray, vision: str) -> np.ndarray:
    """A colour as somebody of this vision sees it."""
    changed = np.clip(VISIONS[vision] @ linear(rgb), 0, 1)
    return np.where(changed <= 0.0031308, changed * 12.92, 1.055 * changed ** (1 / 2.4) - 0.055)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(deltaE_ciede2000(rgb2lab(one), rgb2lab(other)))


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """As WCAG 2 defines it, 1..21."""
    dark, light = sorted(float(linear(rgb) @ [0.2126, 0.7152, 0.0722]) for rgb in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("vision", VISIONS)
def test_runs_are_told_apart_by_every_vision(mode: str, vision: str) -> None:
    known = {name: seen(rgb, vision) for name, rgb in colours(mode).items()}
    near = [(one, other) for one, other in combinations(RUNS, 2) if distance(known[one], known[other]) < APART]
    assert not near
    assert distance(known["student"], known["teacher"]) >= APART


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "raised"])
def test_marks_and_lines_are_seen_on_the_page(mode: str, ground: str) -> None:
    known = colours(mode)
    faint = [name for name in [*RUNS, "student", "teacher", "after", "warned"] if contrast(known[name], known[ground]) < 3]
    assert not faint
    assert all(contrast(known[name], known[ground]) >= 4.5 for name in ("text", "quiet"))


def test_the_measures_tell_bad_colours() -> None:
    """Red and green of one brightness are far apart for most people and the same for some; yellow on white cannot be seen."""
    red, green = np.array([0.80, 0.36, 0.2]), np.array([0.45, 0.55, 0.2])
    assert distance(red, green) > 40 and distance(seen(red, "deutan"), seen(green, "deutan")) < 10
    assert contrast(np.array([0.94, 0.89, 0.26]), np.ones(3)) < 1.5 and contrast(np.zeros(3), np.ones(3)) == pytest.approx(21)


def test_every_look_has_its_rule() -> None:
    style = (Path(mixture.__file__).parent / "style.css").read_text()
    looks = [*RUNS, *(one.look for one in (series.STUDENT, series.TEACHER, series.MODEL, series.REFERENCE))]
    assert all(re.search(rf"\.{look}\b[^{{]*{{ --role: var", style) for look in looks)


def test_runs_of_one_colour_have_another_mark() -> None:
    looks = [series.series_of(k, str(k)) for k in range(28)]
    assert len({(one.look, one.shape) for one in looks}) == 28
    assert [one.dashed for one in looks[:14]] == [False] * 7 + [True] * 7
