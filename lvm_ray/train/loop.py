"""The training loop: one for teacher and student, in this process and on Ray's workers.

For each global batch: load, step, log, validate, save. Everything else is a value that goes in or comes out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lvm_ray.config import Recipe
from lvm_ray.data.stream import Batch
from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import weight_at
from lvm_ray.seeds import stable_hash
from lvm_ray.train import checkpoint
from lvm_ray.train.checkpoint import State
from lvm_ray.train.engine import Engine
from lvm_ray.train.losses import Losses
from lvm_ray.train.meter import Meter, append_line, matmul_rate, operations_per_token
from lvm_ray.train.profile import profiled
from lvm_ray.train.schedule import rate_factor
from lvm_ray.train.validation import Validation


def train(
    engine: Engine,
    batches: Iterator[Batch],
    recipe: Recipe,
    state: State,
    accumulation: int,
    leader: bool,
    leave: Callable[[], bool],
    weights: Sequence[float] | None = None,
    even: Sequence[bool] | None = None,
    saved: Callable[[], None] = lambda: None,
) -> State:
    """Train from `state` to the recipe's last step. The state at the end.

    batches  this worker's micro batches, from the state's position on
    leader   whether this worker writes the journal, the checkpoints and the profile; all workers call this function
    leave    asked after each step by all workers: whether to save and return before the last step
    weights  each task's weight in the loss, in the recipe's order; None: all weigh the same
    even     whether each task's sentences are no pairs; None: all are pairs
    saved    called on the leader when a checkpoint is whole

    Raises UserError where a loss or a gradient is no longer a number, naming the step and the rows.
    """
    section = recipe.train
    of_tasks = task_values(recipe, weights, even)
    validation = Validation(recipe, even)
    teachers = [teacher.model for teacher in engine.module.teachers if teacher.model is not None]
    operations = operations_per_token(engine.module.student, teachers, recipe.sentence_tokens)
    meter = Meter(recipe, operations, matmul_rate(recipe.compute.precision, engine.device))
    with profiled(recipe.run, recipe.compute.profile and leader) as step_is_over:
        while state.step < section.steps:
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(accumulation)]
            factor = rate_factor(state.step, section)
            check = partial(_check, step=state.step, batches=micro_batches)
            of_step = changing_weights(recipe, state.step)
            inputs = [inputs_of(batch, of_tasks, of_step) for batch in micro_batches]
            if on_policy(recipe, state.step):
                inputs = [
                    _with_own_answers(engine, recipe, *pair, batch) for pair, batch in zip(inputs, micro_batches, strict=True)
                ]
            tokens, sentences = zip(*inputs, strict=True)
            losses = engine.step(tokens, factor, check, sentences)
            norm = engine.gradient_norm
            if not engine.overflowed:
                _require_finite("gradient", norm, state.step, micro_batches)
            seconds = time.perf_counter() - started

            state = _advanced(state, recipe, seconds)
            meter.add(losses, micro_batches, seconds)
            leaving = leave()
            due = state.step == section.steps or state.step % section.checkpoint_every == 0
            if due or leaving:
                with meter.stop():
                    scores = validation.scores(engine) if due else {}
                    state = replace(state, score=scores.get("validation"))
                    _log(recipe, meter.line(state, factor * section.rate, norm) | scores, leader)
                    _save(engine, recipe, state, leader, saved)
            elif state.step % section.log_every == 0:
                _log(recipe, meter.line(state, factor * section.rate, norm), leader)
            step_is_over()
            if leaving:
                break
    return state


def inputs_of(
    batch: Batch, of_tasks: Mapping[str, torch.Tensor], of_step: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens int64 [B, T] of a micro batch, and what else the module's forward takes of its sentences and its step, by name."""
    sentences = {name: values[batch["task"]] for name, values in of_tasks.items()}
    states = {name: torch.from_numpy(bits) for name, bits in batch.items() if name.startswith("states_")}
    return torch.from_numpy(batch["tokens"].astype(np.int64)), {**sentences, **of_step, **states}


def changing_weights(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    """What the module's forward takes of a step, by name: the weights of its loss, where any changes over the steps."""
    steps, of_images = recipe.train.steps, recipe.train.image_weight
    strengths = [one.weight for one in recipe.teachers.values()]
    changing = {}
    if isinstance(of_images, tuple):
        changing["image_weight"] = torch.tensor(weight_at(of_images, step, steps))
    if any(isinstance(strength, tuple) for strength in strengths):
        changing["strengths_N"] = torch.tensor([weight_at(strength, step, steps) for strength in strengths])
    return changing


def on_policy(recipe: Recipe, step: int) -> bool:
    """Whether a step is about the student's own answers: `distill.on_policy` of all steps, evenly spread."""
    part = recipe.distill.on_policy if recipe.distill else 0.0
    return math.floor((step + 1) * part + 1e-9) > math.floor(step * part + 1e-9)


def _with_own_answers(
    engine: Engine, recipe: Recipe, tokens_BT: torch.Tensor, sentences: dict[str, torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro batch whose last pictures are drawn by the student, from the plan's rows and its weights alone (generalised
    distillation, Agarwal et al. 2024: the student learns where its own answers lead it)."""
    seeds = [stable_hash("on policy", recipe.training_seed, row) for row in batch["row"].tolist()]
    answers_BN = engine.draw(tokens_BT[:, : -recipe.image_tokens], recipe.image_tokens, seeds)
    own_BT = torch.cat([tokens_BT[:, : -recipe.image_tokens], answers_BN], dim=1)
    return own_BT, {**sentences, "own_answers": torch.tensor(True)}


def task_values(recipe: Recipe, weights: Sequence[float] | None, even: Sequence[bool] | None) -> dict[str, torch.Tensor]:
    """What the module's forward takes of each task, by name; without what all tasks have alike."""
    teachers = recipe.teachers.values()
    taught = [[one.of_task(task) for one in teachers] for task in recipe.tasks] if any(one.weights for one in teachers) else None
    values = (("weights_B", weights), ("even_B", even), ("taught_BN", taught))
    return {name: torch.tensor(of_tasks) for name, of_tasks in values if of_tasks is not None}


def _advanced(state: State, recipe: Recipe, seconds: float) -> State:
    """One step further, not validated yet."""
    rows = state.rows + recipe.train.batch
    seconds = round(state.seconds + seconds, 3)
    return replace(state, step=state.step + 1, rows=rows, tokens=rows * recipe.sentence_tokens, seconds=seconds, score=None)


def _log(recipe: Recipe, line: dict[str, Any], leader: bool) -> None:
    if leader:
        append_line(recipe.run, line)


def _save(engine: Engine, recipe: Recipe, state: State, leader: bool, saved: Callable[[], None]) -> None:
    parameters, moments = engine.parameters(), engine.moments()
    if leader:
        state = replace(state, loss_scale=engine.loss_scale)
        checkpoint.save(recipe.run, state, parameters, moments, recipe.train.keep_checkpoints, recipe.train.keep_best)
        saved()
    torch.distributed.barrier()


def _check(losses: Sequence[Losses], step: int, batches: Sequence[Batch]) -> None:
    """Raises UserError before a loss that is no number reaches the weights."""
    for outcome in torch.stack([outcome.loss for outcome in losses]).tolist():
        _require_finite("loss", outcome, step, batches)


def _require_finite(what: str, value: float, step: int, batches: Sequence[Batch]) -> None:
    if not math.isfinite(value):
        rows = np.concatenate([batch["row"] for batch in batches])
        raise UserError(
            f"step {step + 1}: the {what} is {value} (rows {rows.min()} to {rows.max()} of the plan): lower train.rate, or "
            "train.muon_rate, and train into another --run"
        )
