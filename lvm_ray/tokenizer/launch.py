"""Where our own tokenizers train: in this process, or on Ray Train's workers (`compute.workers`).

The pictures are drawn once, by the driver, and lie in a file that the workers map into memory. The first worker saves the
tokenizer and tells how far it is by way of a file.

    RUN/.tokenizer/   pictures, notes, what Ray Train writes; removed at the end
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lvm_ray import placement, ray_session
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.threads import WATCH_EVERY, torch_threads, watching
from lvm_ray.train import workers
from lvm_ray.train.job import resolve
from lvm_ray.train.workers import write

SCRATCH = ".tokenizer"  # below the pipeline folder

Report = Callable[[int, str], None]


@dataclass(frozen=True)
class Job:
    """All that a worker needs: a plain value that travels to it. `recipe` is resolved; the paths are absolute."""

    recipe: Recipe
    folder: str
    scratch: str

    @property
    def note(self) -> Path:
        return Path(self.scratch) / "note.json"


def train(recipe: Recipe, pictures: NDArray[np.uint8], report: Report) -> None:
    """Train the recipe's tokenizer of the kind vq or fsq on pictures [B, S, S, 3], and save it in its folder.

    The pictures of a step do not depend on the number of workers; what is learnt does in its last digits, and a little by the
    commitment's scale, which each worker takes from its own pictures.
    Raises UserError as `training.train`, and where the workers cannot share the batch.
    """
    compute = recipe.compute
    on_cpus = {"device": "cpu", "workers": compute.most_workers, "precision": compute.precision.replace("fp16", "auto")}
    recipe = resolve(recipe.model_copy(update={"compute": compute.model_copy(update=on_cpus)}))
    if recipe.tokenizer.batch % max(1, recipe.compute.most_workers):
        raise UserError(
            f"tokenizer.batch: {recipe.tokenizer.batch} is not a multiple of compute.workers {recipe.compute.most_workers}: "
            "the workers share it, so choose one that is"
        )
    job = Job(recipe, os.path.abspath(recipe.tokenizer_folder), os.path.abspath(f"{recipe.run}/{SCRATCH}"))
    if not recipe.compute.most_workers:
        work(job, pictures, report, leader=True)
        return
    shutil.rmtree(job.scratch, ignore_errors=True)
    os.makedirs(job.scratch)
    try:
        np.save(f"{job.scratch}/pictures.npy", pictures)
        with _watched(job.note, report):
            ray_session.start(recipe)
            placement.require(recipe, "tokenize", recipe.compute.least_workers)
            place = placement.place_of(recipe, "tokenize").without_gpu()
            workers.run(partial(_work_on_ray, job), job.recipe.compute, place, f"{job.scratch}/ray")
    finally:
        shutil.rmtree(job.scratch, ignore_errors=True)


def work(job: Job, pictures: NDArray[np.uint8], report: Report, leader: bool) -> None:
    """One worker's whole part. The leader saves."""
    from lvm_ray.train import memory

    memory.keep()
    memory.in_main_arena(partial(_work, job, pictures, report, leader))


def _work(job: Job, pictures: NDArray[np.uint8], report: Report, leader: bool) -> None:
    from lvm_ray.tokenizer import training, vqmodel

    recipe = job.recipe
    assert recipe.compute.threads is not None
    with torch_threads(recipe.compute.threads):
        tokenizer, found = training.train(recipe.tokenizer, pictures, recipe.seed, recipe.compute.precision, report)
    if leader:
        vqmodel.save(tokenizer, job.folder, recipe.tokenizer.kind, found)


def _work_on_ray(job: Job) -> None:
    import ray.train

    leader = ray.train.get_context().get_world_rank() == 0
    pictures = np.load(f"{job.scratch}/pictures.npy", mmap_mode="r", allow_pickle=False)
    work(job, pictures, _noted(job.note, job.recipe.tokenizer.steps) if leader else lambda done, note: None, leader)


def _noted(path: Path, steps: int) -> Report:
    """A report into a file: not more often than it is read, and the last one in any case."""
    last = 0.0

    def report(done: int, note: str) -> None:
        nonlocal last
        if done == steps or time.monotonic() - last >= WATCH_EVERY:
            last = time.monotonic()
            write(path, json.dumps([done, note]))

    return report


@contextmanager
def _watched(path: Path, report: Report) -> Iterator[None]:
    """Pass on what stands in the file while the body trains."""

    def pass_on() -> None:
        if path.is_file():
            report(*json.loads(path.read_text(encoding="utf-8")))

    with watching(pass_on):
        yield
