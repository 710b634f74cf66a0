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
    of_tasks = task_values(weights, even)
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
            tokens, sentences = zip(*(inputs_of(batch, of_tasks) for batch in micro_batches), strict=True)
            losses = engine.step(tokens, factor, check, sentences)
            norm = engine.gradient_norm
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


def inputs_of(batch: Batch, of_tasks: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens int64 [B, T] of a micro batch, and what else the module's forward takes of its sentences, by name."""
    sentences = {name: values[batch["task"]] for name, values in of_tasks.items()}
    states = {name: torch.from_numpy(bits).view(torch.bfloat16) for name, bits in batch.items() if name.startswith("states_")}
    return torch.from_numpy(batch["tokens"].astype(np.int64)), sentences | states


def task_values(weights: Sequence[float] | None, even: Sequence[bool] | None) -> dict[str, torch.Tensor]:
    """What the module's forward takes of each task, by name; without what all tasks have alike."""
    return {name: torch.tensor(values) for name, values in (("weights_B", weights), ("even_B", even)) if values is not None}


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
