"""How values are written: metrics by their usual names and digits, counts, percents and intervals as text.

Pure functions, used by the page and its charts alike. A value that does not exist is a dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TOKEN_METRICS = ("target_perplexity", "token_accuracy", "mean_perplexity")
DASH = "–"


@dataclass(frozen=True)
class Metric:
    """How a metric is written: its name, digits after the point, unit, and what it measures."""

    label: str
    digits: int = 3
    unit: str = ""
    meaning: str = ""


METRICS = {  # a task's main metric comes before its others
    "miou": Metric("mIoU", meaning="overlap with the true masks"),
    "pck": Metric("PCK", meaning="joints found within 0.2 of the person’s box"),
    "pck_0.1": Metric("PCK 0.1", meaning="joints found within 0.1 of the person’s box"),
    "pck_0.05": Metric("PCK 0.05", meaning="joints found within 0.05 of the person’s box"),
    "ap": Metric("AP", meaning="COCO keypoint average precision"),
    "ar": Metric("AR", meaning="COCO keypoint average recall"),
    "psnr_y": Metric("PSNR", 2, "dB", "fidelity of the brightness channel"),
    "ssim_y": Metric("SSIM", meaning="structural likeness of the brightness channel"),
    "object_iou": Metric("object IoU", meaning="best overlap of any drawn object with each true one"),
    "box_iou": Metric("box IoU", meaning="overlap with the true box"),
    "colour_mse": Metric("colour MSE", meaning="squared error of normalised colours"),
    "psnr": Metric("PSNR", 2, "dB", "fidelity of the colours"),
    "mae": Metric("MAE", 2, meaning="mean difference in grey levels"),
    "psnr_hidden": Metric("PSNR", 2, "dB", "fidelity of the hidden half"),
    "ssim_hidden": Metric("SSIM", meaning="structural likeness of the hidden half"),
    **{f"miou_fold{k}": Metric(f"mIoU of fold {k}", meaning="overlap with the true masks") for k in range(4)},
    "target_perplexity": Metric("perplexity", 1, meaning="of the true answer's tokens"),
    "token_accuracy": Metric("token accuracy", meaning="true tokens that were the likeliest"),
    "mean_perplexity": Metric("mean perplexity", 1, meaning="of the true answer's tokens, the mean over items"),
}


def metric_of(name: str) -> Metric:
    """How a metric is written; one that nobody has described by its own name."""
    return METRICS.get(name, Metric(name))


def ordered(names: Iterable[str]) -> list[str]:
    """A task's metrics, its main one first, those of tokens last."""
    known = [*METRICS]
    return sorted(names, key=lambda name: (name in TOKEN_METRICS, known.index(name) if name in known else len(known), name))


def finite(value: Any) -> float | None:
    """The value if it is a finite number: a file may hold anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any, digits: int) -> str:
    """A number with so many digits after the point, a dash where there is none."""
    known = finite(value)
    return DASH if known is None else f"{known:,.{digits}f}".replace("-", "−")


def short(value: Any, digits: int = 6) -> str:
    """A number in so many digits, a dash where there is none."""
    known = finite(value)
    return DASH if known is None else f"{known:.{digits}g}"


def ends_of(value: Any) -> tuple[float, float] | None:
    """The two ends of an interval, if that is what it is."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def interval(ends: Any, metric: Metric) -> str:
    """A 95 % interval as `0.38–0.44`, `−0.02 to 0.01` where a dash would read as a minus; empty where there is none."""
    known = ends_of(ends)
    if known is None:
        return ""
    low, high = (number(end, metric.digits) for end in known)
    return f"{low} to {high}" if "−" in low + high else f"{low}–{high}"


def count(value: float) -> str:
    """A large count in three digits: `840`, `3.28 M`, `300 k`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def percent(part: float, digits: int = 0) -> str:
    """A part as `53 %`."""
    rounded = round(100 * part, digits) + 0.0  # no "-0"
    return f"{rounded:.{digits}f} %".replace("-", "−")


def times(value: float | None) -> str:
    """How often, in three digits: `2.77 ×`, `139 ×`; a dash where nobody knows."""
    return DASH if value is None else f"{value:,.0f} ×" if value >= 99.5 else f"{value:.3g} ×"


def copies_text(copies: float | None) -> str:
    """Distinct copies in words: `20 copies`, `originals alone`, `2 % of the originals`."""
    if copies is None:
        return ""
    if copies < 1:
        return f"{percent(copies, 1)} of the originals"
    return "originals alone" if copies == 1 else f"{copies:.3g} copies"


def markdown(text: object) -> str:
    """A text as part of a Markdown table: on one line, and nothing of it is a tag, a link, a picture or a column's end."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "&#92;")
    for sign in "|[]`*":
        line = line.replace(sign, f"\\{sign}")
    return line
