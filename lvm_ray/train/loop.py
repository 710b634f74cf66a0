"""The training loop: one for teacher and student, in this process and on Ray's workers.

For each global batch: a step, a line in the journal, a checkpoint. Everything else is a value that goes in or comes out.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
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
from lvm_ray.train.schedule import rate_factor

METRICS_FILE = "metrics.jsonl"


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
) -> State:
    """Train from `state` to the recipe's last step. The state at the end.

    batches  this worker's micro batches, from the state's position on
    leader   whether this worker writes the journal and the checkpoints; all workers call this function
    leave    asked after each step by all workers: whether to save and return before the last step
    weights  each task's weight in the loss, in the recipe's order; None: all weigh the same
    even     whether each task's sentences are no pairs; None: all are pairs

    Raises UserError where a loss or a gradient is no longer a number, naming the step and the rows.
    """
    section = recipe.train
    meter = Meter(tuple(recipe.tasks), distilled=recipe.distill is not None)
    of_tasks = {name: torch.tensor(values) for name, values in (("weights_B", weights), ("even_B", even)) if values is not None}
    for step in range(state.step, section.steps):
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(accumulation)]
        factor = rate_factor(step, section.steps, section.warmup, section.final_rate)
        tokens = [torch.from_numpy(batch["tokens"].astype(np.int64)) for batch in micro_batches]
        sentences = [{name: values[batch["task"]] for name, values in of_tasks.items()} for batch in micro_batches]
        losses = engine.step(tokens, factor, partial(_check, step=step, batches=micro_batches), sentences)
        norm = engine.gradient_norm
        if not math.isfinite(norm):
            raise UserError(_diverged("gradient", norm, step, micro_batches))
        seconds = time.perf_counter() - started
        meter.add(losses, micro_batches, seconds)
        rows = state.rows + section.batch
        state = replace(
            state, step=step + 1, rows=rows, tokens=rows * recipe.sentence_tokens, seconds=round(state.seconds + seconds, 3)
        )
        last = state.step == section.steps
        if last or state.step % section.log_every == 0:
            line = meter.line(state, rate=factor * section.rate, norm=norm)
            if leader:
                _append(Path(recipe.run) / METRICS_FILE, line)
        leaving = leave()
        if last or leaving or state.step % section.checkpoint_every == 0:
            _save(engine, recipe, state, leader)
        if leaving:
            break
    return state


class Meter:
    """Means since the last line of the journal, over all workers."""

    def __init__(self, tasks: tuple[str, ...], distilled: bool) -> None:
        self._tasks = tasks
        self._distilled = distilled
        self._clear()

    def _clear(self) -> None:
        # ce, kd, loss, micro batches, then each task's sum and number of target losses.
        self._sums = torch.zeros(4 + 2 * len(self._tasks), dtype=torch.float64)
        self._seconds = 0.0
        self._tokens = 0

    def add(self, losses: Sequence[Losses], batches: Sequence[Batch], seconds: float) -> None:
        """One step's micro batches of this worker."""
        for outcome, batch in zip(losses, batches, strict=True):
            self._sums[:4] += torch.stack([outcome.ce, outcome.kd, outcome.loss, torch.ones_like(outcome.ce)])
            task_B = torch.from_numpy(batch["task"].astype(np.int64))
            self._sums.index_add_(0, 4 + 2 * task_B, outcome.target_B.double())
            self._sums.index_add_(0, 5 + 2 * task_B, torch.ones(len(task_B), dtype=torch.float64))
            self._tokens += batch["tokens"].size
        self._seconds += seconds

    def line(self, state: State, rate: float, norm: float) -> dict[str, Any]:
        """The journal's next line; starts anew. All workers call it together."""
        torch.distributed.all_reduce(self._sums)
        ce, kd, loss = (self._sums[:3] / self._sums[3]).tolist()
        sums, counts = self._sums[4::2].tolist(), self._sums[5::2].tolist()
        tokens = self._tokens * torch.distributed.get_world_size()
        targets = {
            task: round(total / count, 6) if count else None for task, total, count in zip(self._tasks, sums, counts, strict=True)
        }
        line = {
            "step": state.step,
            "rows": state.rows,
            "tokens": state.tokens,
            "loss": round(loss, 6),
            "ce": round(ce, 6),
            "kd": round(kd, 6) if self._distilled else None,
            "target_loss": targets,
            "rate": rate,
            "grad_norm": round(norm, 6),
            "tokens_per_s": round(tokens / self._seconds, 1),
            "seconds": round(state.seconds, 3),
        }
        self._clear()
        return line


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Every whole line of a run's journal, in order; [] where there is none yet."""
    try:
        text = (Path(run) / METRICS_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    # A line without its end is still being written.
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def cut_metrics(run: str | Path, step: int) -> None:
    """Drop the journal's lines after a step, so that no step stands twice when training goes on from there."""
    path = Path(run) / METRICS_FILE
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _save(engine: Engine, recipe: Recipe, state: State, leader: bool) -> None:
    parameters, moments = engine.parameters(), engine.moments()
    if leader:
        checkpoint.save(recipe.run, state, parameters, moments, recipe.train.keep_checkpoints)
    torch.distributed.barrier()


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _check(outcome: Losses, step: int, batches: Sequence[Batch]) -> None:
    loss = outcome.loss.item()
    if not math.isfinite(loss):
        raise UserError(_diverged("loss", loss, step, batches))


def _diverged(what: str, value: float, step: int, batches: Sequence[Batch]) -> str:
    rows = np.concatenate([batch["row"] for batch in batches])
    return (
        f"step {step + 1}: the {what} is {value} (rows {rows.min()} to {rows.max()} of the plan): lower train.rate, or "
        "train.muon_rate, and train into another --run"
    )
