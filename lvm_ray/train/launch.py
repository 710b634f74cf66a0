"""From a recipe to a trained run folder: checks, then the loop here or on Ray Train's workers, then the export.

    RUN/config.yaml   the resolved recipe: running it again is the same run
    RUN/metrics.jsonl RUN/checkpoints/  written while it trains
    RUN/model/        written when it is done

`compute.workers: 0` trains in this process without Ray; 1 and more are Ray Train's. Both read the same rows and write the same
folder. Where a run that was interrupted goes on from stands in `resume.py`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lvm_ray import config, placement, ray_session, working_copy
from lvm_ray.config import Recipe
from lvm_ray.data.plan import make_plan
from lvm_ray.data.shards import open_shards
from lvm_ray.data.stream import data_config, local_batches, training_dataset, worker_batches
from lvm_ray.errors import Stopped
from lvm_ray.observe.follow import followed
from lvm_ray.progress import Bar, say
from lvm_ray.threads import watching
from lvm_ray.train import workers
from lvm_ray.train.job import Job, make_job, resolve
from lvm_ray.train.meter import cut_metrics, last_line
from lvm_ray.train.nodes import ask_a_worker
from lvm_ray.train.preflight import check_batch, checks

if TYPE_CHECKING:
    from lvm_ray.train.checkpoint import State

SCRATCH = ".ray"  # below the run folder: what Ray Train writes, removed at the end


def train(recipe: Recipe, bar: Bar, asked: threading.Event | None = None, until: int | None = None) -> Path:
    """Train a single-run recipe (its `run` is the run folder). The run folder.

    `recipe.distill.teacher` names a finished teacher's run folder. `bar` counts steps. `asked` may be given to
    `workers.ask_to_leave`. `until`: the step after which a run without workers leaves, without a model; the last one otherwise.

    Raises UserError where the recipe, the shards, the tokenizer, the teacher or a checkpoint do not fit together, where a check
    of `preflight` fails, and where the loss stops being a number; Stopped where the run was asked to leave, and has saved.
    """
    assert recipe.teacher is None, "a pipeline recipe: split it with teacher_recipe and student_recipe"
    recipe = resolve(recipe)
    check_batch(recipe)
    job = make_job(recipe)

    from lvm_ray.train import resume  # torch, only now that the cheap checks are over

    run, state = Path(recipe.run), resume.resume(recipe, job.state)
    last = until or recipe.train.steps
    done = state.step >= last
    if not done:
        for check in checks(recipe):
            check.run()
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config.dump(working_copy.published(recipe)), encoding="utf-8")
    bar.set(state.step, note="already trained" if done else f"from step {state.step}" if state.step else "starting")
    if not done:
        cut_metrics(run, state.step)
        with _watched(run, bar), followed(recipe, bar):
            _train(job, asked or threading.Event(), last)
        operations = run / "profile" / "operations.txt"
        if recipe.compute.profile and operations.is_file():
            say(f"where the time of three steps went: {operations}, and trace-rank0.json.gz beside it")
    if last == recipe.train.steps and not (done and (run / "model" / "model.safetensors").is_file()):
        _export(job)
    return run


def rehearse(recipe: Recipe) -> str:
    """Pass the first micro batch of a resolved recipe forward and backward, on a worker's resources, and nothing more: what it
    found, as text. Raises UserError as `train` would in its first step."""
    from lvm_ray.train import work

    job = make_job(recipe)
    if not recipe.compute.most_workers:
        return work.rehearse(job)
    ray_session.start(recipe)
    here = placement.options(placement.place_of(recipe, "train"))
    return str(ask_a_worker(work.rehearse, job, recipe.compute.device == "cuda", here))


def _train(job: Job, asked: threading.Event, last: int) -> None:
    """To a step, here or on workers. Raises Stopped where the run was asked to leave before, and has saved."""
    recipe = job.recipe
    if recipe.compute.most_workers:
        ray_session.start(recipe)  # first: it takes SIGTERM for itself
    shutil.rmtree(Path(recipe.run) / SCRATCH, ignore_errors=True)
    token = workers.take_over(recipe.run)
    with workers.asked_to_leave(recipe.run, asked):
        reached = _reached(job).step
        while reached < last:
            _train_on_ray(job, token) if recipe.compute.most_workers else _train_here(job, token, asked, last - reached)
            before, reached = reached, _reached(job).step
            if reached < last and asked.is_set():
                raise Stopped(
                    f"saved step {reached} of {recipe.train.steps} in {recipe.run}: the same command goes on from there"
                )
            # Workers that return early have saved since Ray took a node away: they start again where there is room.
            assert reached > before, "training ended early and without a step"
    workers.give_up(recipe.run)


def _train_here(job: Job, token: str, asked: threading.Event, steps: int) -> None:
    from lvm_ray.train.work import work

    plan = make_plan(open_shards(job.recipe.shard_folder).manifest, job.recipe)
    steps_left = itertools.count(steps - 1, -1)

    def leave() -> bool:
        workers.require_owner(job.recipe.run, token)
        return next(steps_left) <= 0 or asked.is_set()

    work(job, lambda position: local_batches(job.recipe, plan, position), 1, True, leave)


def _train_on_ray(job: Job, token: str) -> None:
    recipe, scratch = job.recipe, Path(job.recipe.run) / SCRATCH
    datasets, place = {"train": training_dataset(recipe, lambda: _reached(job).rows)}, placement.place_of(recipe, "train")
    workers.run(partial(_work_on_ray, job, token), recipe.compute, place, scratch / token, datasets, data_config())
    shutil.rmtree(scratch, ignore_errors=True)


def _work_on_ray(job: Job, token: str) -> None:
    import ray.train

    from lvm_ray.train.work import work

    workers.require_owner(job.recipe.run, token)
    context = ray.train.get_context()
    shard = ray.train.get_dataset_shard("train")
    # Ray has opened the stream at the last checkpoint's position, as `_train_on_ray` says.
    work(
        job,
        lambda position: worker_batches(shard, job.recipe.train.micro_batch),
        context.get_world_size(),
        context.get_world_rank() == 0,
        workers.must_leave(job.recipe.run, token),
    )


def _reached(job: Job) -> State:
    """The last checkpoint's state, which was found whole or has been written since, or the fresh one."""
    from lvm_ray.train import checkpoint

    found = checkpoint.latest(job.recipe.run)
    return checkpoint.read_state(found) if found else job.state


def _export(job: Job) -> None:
    """Write RUN/model from the last checkpoint."""
    from lvm_ray.train import checkpoint

    found = checkpoint.latest(job.recipe.run)
    assert found is not None, "training ended without a checkpoint"
    write_model(job.recipe, job.codebook_VE, job.codebook, found, job.tokenizer, Path(job.recipe.run) / "model")


def write_model(
    recipe: Recipe, codebook_VE: NDArray[np.float32], codebook: str, found: Path, tokenizer: str, folder: Path
) -> None:
    """Write a checkpoint as a stock folder. `codebook` is the hash, and `tokenizer` the folder, of the tokenizer."""
    import torch

    from lvm_ray.model.export import export
    from lvm_ray.model.llama import build
    from lvm_ray.train import checkpoint

    model = build(recipe.model, torch.from_numpy(codebook_VE), recipe.sentence_tokens, recipe.image_tokens, recipe.training_seed)
    model.load_state_dict(checkpoint.load(found)[0], strict=True)
    info = {
        "kind": recipe.tokenizer.kind,
        "hash": codebook,
        "codes": len(codebook_VE),
        "patch": recipe.tokenizer.patch,
        "size": recipe.size,
        "image_tokens": recipe.image_tokens,
        "folder": os.path.relpath(tokenizer, folder),
    }
    export(model, folder, info)


@contextmanager
def _watched(run: Path, bar: Bar) -> Iterator[None]:
    """Move the bar by the journal while the body trains: the one source that workers anywhere write to."""
    before = shown = last_line(run)  # of a run that goes on: the line that it was left with

    def show() -> None:
        nonlocal shown
        line = last_line(run)
        if line and line != shown:
            if shown is before:  # by its first own line Ray has started all that it needs
                ray_session.let_helpers_yield()
            shown = line
            bar.set(line["step"], note=_note(line), left=line.get("eta_s"))

    with watching(show):
        yield


def _note(line: dict[str, Any]) -> str:
    """`loss 2.345 · 12,300 tokens/s · 41 % of matmul`, as far as a line of the journal knows it."""
    share = line.get("matmul_share")
    parts = [f"loss {line['loss']:.3f}", f"{line['tokens_per_s']:,.0f} tokens/s"]
    return " · ".join(parts + ([] if share is None else [f"{100 * share:.0f} % of matmul"]))
