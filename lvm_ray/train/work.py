"""A worker's part of a run, in this process or on Ray: its models, a rehearsal, then the loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from lvm_ray import recipe_sections, working_copy
from lvm_ray.data.plan import make_plan
from lvm_ray.data.shards import open_shards
from lvm_ray.data.stream import Batch, accumulation, read_rows
from lvm_ray.errors import UserError
from lvm_ray.progress import duration
from lvm_ray.train import checkpoint, loop, memory, meter, rehearsal
from lvm_ray.train.engine import Engine
from lvm_ray.train.job import Job, device_of, fresh_model, inherit_weights, modules
from lvm_ray.train.losses import TrainingModule


def work(job: Job, batches_from: Callable[[int], Iterator[Batch]], workers: int, leader: bool, leave: Callable[[], bool]) -> None:
    """One worker's whole part of a run.

    `batches_from` gives its micro batches from a position on; `leave` says after each step whether to save and return.
    """
    memory.keep()
    part = partial(_work, job, batches_from, workers, leader, leave)
    # A GPU's tensors are elsewhere, and which GPU is current is a thread's own: Ray has set it for this one.
    memory.in_main_arena(part) if job.recipe.compute.device == "cpu" else part()


def _work(
    job: Job, batches_from: Callable[[int], Iterator[Batch]], workers: int, leader: bool, leave: Callable[[], bool]
) -> None:
    recipe = job.recipe
    assert recipe.compute.threads is not None
    torch.set_num_threads(recipe.compute.threads)
    student, state = fresh_model(job), job.state
    found = checkpoint.latest(recipe.run)
    if found:
        state = checkpoint.read_state(found)
        parameters, moments = checkpoint.load(found)
        student.load_state_dict(parameters, strict=True)
    else:
        inherit_weights(job, student)
    if leader:
        meter.cut_metrics(recipe.run, state.step)
    module, teachers = modules(job, student)
    batches = batches_from(state.rows)
    first = next(batches, None)
    if first is None:  # the plan is used up: workers that crashed after their last step start once more
        return
    _rehearse(job, module, teachers, first, state.step)
    batches = itertools.chain([first], batches)
    each = accumulation(recipe, workers)
    engine = Engine(module, recipe, each)
    if found:
        engine.restore(parameters, moments, state.step, *_inputs(job, first, state.step), state.loss_scale)
    try:
        with working_copy.uploads(recipe.run if leader else None) as saved:
            loop.train(engine, batches, recipe, state, each, leader, leave, job.weights, job.even, saved)
    finally:
        engine.close()


def rehearse(job: Job) -> str:
    """Pass the plan's first micro batch forward and backward, and nothing more: what it found, as text.

    Raises UserError as `work` would before its first step.
    """
    recipe = job.recipe
    assert recipe.compute.threads is not None
    torch.set_num_threads(recipe.compute.threads)
    student = fresh_model(job)
    inherit_weights(job, student)
    plan = make_plan(open_shards(recipe.shard_folder).manifest, recipe)
    started = time.perf_counter()
    loss = _rehearse(job, *modules(job, student), read_rows(recipe, plan, 0, recipe.train.micro_batch), 0)
    seconds = time.perf_counter() - started
    return f"a micro batch passes in {duration(seconds)}, loss {loss:.3f}"


def _rehearse(job: Job, module: TrainingModule, teachers: dict[str, TrainingModule], batch: Batch, step: int) -> float:
    """A micro batch before the step after `step`: its loss."""
    device = device_of(job)
    module.to(device)
    tokens_BT, sentences = _moved(device, *_inputs(job, batch, step))
    where = f"step {step + 1} (rows {batch['row'].min()} to {batch['row'].max()} of the plan)"
    for name, teacher in teachers.items():
        folder = job.recipe.teachers[name].teacher
        asked = tokens_BT, sentences
        if job.recipe.teachers[name].weights:
            asked = _inputs(job, _first_of_its_tasks(job, name), step)
        rehearsal.check_teacher_loss(teacher, *_moved(device, *asked), recipe_sections.place_of_teacher(name), folder)
    return rehearsal.rehearse(module, tokens_BT, job.recipe, sentences, where)


def _first_of_its_tasks(job: Job, name: str) -> Batch:
    """The plan's first rows of the tasks that a teacher is asked about: a micro batch at most."""
    recipe, one = job.recipe, job.recipe.teachers[name]
    plan = make_plan(open_shards(recipe.shard_folder).manifest, recipe)
    asked = [number for number, task in enumerate(recipe.tasks) if one.of_task(task)]
    places = np.flatnonzero(np.isin(plan.columns.task, asked))[: recipe.train.micro_batch]
    parts = [read_rows(recipe, plan, place, place + 1) for place in places.tolist()]
    if not parts:
        tasks = ", ".join(task for task in recipe.tasks if one.of_task(task))
        place = recipe_sections.place_of_teacher(name).removesuffix("teacher")
        raise UserError(
            f"{place}weights: the plan has no rows of {tasks}, which are all that this teacher is asked about: give "
            "them a share, or leave the teacher out"
        )
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _moved(
    device: torch.device, tokens_BT: torch.Tensor, sentences: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return tokens_BT.to(device), {name: values.to(device) for name, values in sentences.items()}


def _inputs(job: Job, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro batch of the step after `step`, as the loop will pass it."""
    of_tasks = loop.task_values(job.recipe, job.weights, job.even)
    return loop.inputs_of(batch, of_tasks, loop.changing_weights(job.recipe, step))
