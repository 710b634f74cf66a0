"""A sweep beside its trainings alone: what Ray Tune, processes and bookkeeping cost.

python -m tests.bench.sweep RECIPE.yaml ...   # trains them here, one after another
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lvm_ray import config, pipeline, ray_session
from lvm_ray.progress import Bar
from lvm_ray.tune.space import read_space
from lvm_ray.tune.sweep import Sweep
from tests.bench.data import PLACE
from tests.bench.figure import Figure
from tests.bench.training import CORES, PRECISION

SPACE = """from ray import tune

space = {
    "distill.temperature": tune.grid_search([0.7, 1.4, 2.8]),
    "balance.ratios.derain": tune.grid_search([1.0, 5.0, 20.0, 50.0]),
}
repeats = 0
reference = {"distill.temperature": 0.7, "balance.ratios.derain": 1.0}
"""
STEPS = 100


def sweep_vs_bare() -> Figure:
    """Wall time of a sweep over that of its 12 trainings one after another in one process on all cores, each with its start.

    The embedded data set, the demo's student; tokens and teacher's answers are there on both sides.
    """
    settings = [f"train.steps={STEPS}", "teacher.train.steps=100", "train.checkpoint_every=200", f"compute.precision={PRECISION}"]
    recipe = config.load("recipes/demo.yaml", settings, run=str(PLACE / "sweep"))
    if not Path(recipe.run, "teacher", "model", "model.safetensors").is_file():
        pipeline.synth(recipe)
        pipeline.tokenize(recipe)
        pipeline.train(recipe, "teacher")
        ray_session.shutdown()
    path = PLACE / "temperature_and_ratio.py"
    path.write_text(SPACE)
    sweep = Sweep(recipe, read_space(str(path)))
    shutil.rmtree(sweep.folder, ignore_errors=True)
    recipes = _answered(sweep)
    bare = _seconds([sys.executable, "-m", "tests.bench.sweep", *recipes])
    changes = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "lvm_ray", "tune", "recipes/demo.yaml", "--space", str(path), "--run", recipe.run, *changes]
    ours = _seconds(command)
    found = json.loads(Path(sweep.folder, "sweep.json").read_text())
    assert [one["state"] for one in found["trials"]] == ["finished"] * len(recipes) and not any(found["counters"].values())
    how = (
        f"{ours:.0f} s against {bare:.0f} s for {len(recipes)} trainings of {STEPS} steps of the demo's student, {CORES} cores, "
        f"{PRECISION}, starts included; no trial tokenised or asked the teacher"
    )
    return Figure(ours / bare, "x", "<= 1.25", how)


def _answered(sweep: Sweep) -> list[str]:
    """Files of the trials' recipes as bare trainings, and the teacher's answers to their sentences, in the sweep."""
    from lvm_ray.train.caching import cache
    from lvm_ray.train.job import resolve

    paths = []
    for trial in sweep.first_round():
        run = PLACE / "sweep-bare" / f"{trial.number:02d}"
        shutil.rmtree(run, ignore_errors=True)
        compute = {"compute.workers": 0, "compute.threads": CORES}
        recipe = config.changed(sweep.recipe_of(trial), {"run": str(run), **compute}, "bench")
        cache(resolve(recipe), "teacher", Bar("answers", None, "sentences"))
        paths.append(PLACE / "sweep-bare" / f"{trial.number:02d}.yaml")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text(config.dump(recipe))
    return [str(path) for path in paths]


def _seconds(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    from lvm_ray.train import launch

    for path in sys.argv[1:]:
        launch.train(config.load(path), Bar("train", None, "steps"))


if __name__ == "__main__":
    main()
