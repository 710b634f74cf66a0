"""Which small tokenizer: patch k-means, a convolutional network with a learnt codebook, or with a grid of finite scalars.

All have 64 tokens a picture, 1,024 codes and as many training steps; the same model learns from each as long as from the others.
Three seeds, each with scenes, tokenizer and model of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvm_ray import config
from lvm_ray.config import Recipe
from tests.studies.summary import mean, spread

SEEDS = (11, 12, 13)
STEPS = 600  # of every tokenizer
KINDS = {
    "patch": {"kind": "patch", "codes": 1024},
    "vq": {"kind": "vq", "codes": 1024},
    "fsq": {"kind": "fsq", "levels": [8, 8, 4, 4]},
}
METRICS = (("segmentation", "miou"), ("pose", "pck"), ("derain", "psnr_y"), ("derain", "ssim_y"))


def recipes(place: Path) -> Iterator[tuple[str, Recipe]]:
    """The demo's tasks with fewer scenes and copies, and one model of the student's size without a teacher."""
    for seed in SEEDS:
        for kind, section in KINDS.items():
            settings = [
                f"seed={seed}",
                "synth={train: {segmentation: 1500, pose: 300, derain: 60}, test: {segmentation: 64, pose: 64, derain: 64}}",
                *(f"tasks.{task}.validation=null" for task in ("segmentation", "pose", "derain")),
                "tasks.pose.copies=8",
                "tasks.derain.copies=20",
                f"tokenizer={ {'patch': 8, 'steps': STEPS, **section} }",
                "teacher=null",
                "distill=null",
                "train.steps=400",
                "train.rate=6e-3",
                "train.muon_rate=0.045",
                "evaluate={items: 64}",
            ]
            yield f"{kind}, seed {seed}", config.load("recipes/demo.yaml", settings, run=str(place / f"tokenizers-{kind}-{seed}"))


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with the lowest and the highest, of scores and ceilings."""
    names = [f"{task} {metric}" for task, metric in METRICS]
    lines = [f"| tokenizer | seeds | seconds to train | {' | '.join(f'{name}: ceiling | model' for name in names)} |"]
    lines.append("|---" * (3 + 2 * len(names)) + "|")
    for kind in KINDS:
        mine = [row for row in rows if row["label"].startswith(f"{kind},")]
        if not mine:
            continue
        cells = [kind, str(len(mine)), f"{mean(row['seconds']['tokenizer'] for row in mine):.0f}"]
        for task, metric in METRICS:
            for key in ("ceiling", "value"):
                values = [row["tasks"][task][metric][key] for row in mine]
                digits = 2 if metric == "psnr_y" else 3
                cells.append(spread(values, digits))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
