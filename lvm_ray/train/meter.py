"""What one sees while it trains: the journal's lines, how they are made and how they are read.

RUN/metrics.jsonl has a JSON object a line, every `train.log_every` steps and at every checkpoint. Means are over all workers
and the steps since the line before.

    step, rows, tokens  done so far: optimizer steps, sentences, tokens
    loss, ce, kd        means of the loss and of its two terms; kd, of all teachers by their weights, is null without one; ce and
                        the target losses leave out steps on the student's own answers
    target_loss         {task: mean cross-entropy of its label tokens in nats}; null where no sentence was of the task
    target_perplexity   {task: exp of that}
    teachers            {name: {"kd": {task: mean divergence x T^2 over its label tokens, by the weight of what this teacher says
                        of the task}, "entropy": mean of the distributions at its temperature, in nats, "agreement": share of
                        tokens for which the student finds none likelier than the teacher's likeliest}}
    features            1 - alignment with the vision network (`distill.features`), the mean over images, where there is one
    rate                AdamW's learning rate in the last step
    grad_norm           norm of the last step's gradient before clipping; null where it was too large for fp16: a step left out
    tokens_per_s        of all workers together
    seconds             training time so far over all restarts, without starts, checkpoints and validations
    matmul_share        computed operations a second over what the workers reach in plain matrix products, measured at the start;
                        both count as `lvm_ray/estimate.py` does, the teacher's forward included
    checkpoint_s        the latest checkpoint's seconds, with its validation; null before the first one of this start
    eta_s               training time to the last step at the pace of the latest steps, and the checkpoints on the way

Lines of checkpoints also have, where the data hold validation sentences and the run was not asked to leave early:

    validation_loss     {task: mean cross-entropy of their label tokens in nats}
    validation          mean over those tasks: what decides which checkpoint is best

Reading needs no torch: the report and the terminal do it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvm_ray import estimate
from lvm_ray.config import Recipe
from lvm_ray.data.stream import Batch
from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.storage import changing

if TYPE_CHECKING:
    import torch
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    from lvm_ray.train.checkpoint import State
    from lvm_ray.train.losses import Losses

METRICS_FILE = "metrics.jsonl"

LATEST_STEPS = 100  # whose pace the time left is estimated from
TAIL_BYTES = 65536  # of the journal: more than any line has
MATMUL_SECONDS = 0.3
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}  # of square matrices large enough for the processor's full rate


class Meter:
    """Sums since the last line of the journal, and the pace of the whole run.

    operations   that a step computes for a token
    matmul_rate  operations a second that all workers reach together in plain matrix products
    """

    def __init__(self, recipe: Recipe, operations: float, matmul_rate: float) -> None:
        self._tasks = tuple(recipe.tasks)
        self._section = recipe.train
        self._teachers = tuple(recipe.teachers)
        self._features = bool(recipe.distill and recipe.distill.features)
        self._share_of_a_token = operations / matmul_rate
        self._paces: deque[float] = deque(maxlen=LATEST_STEPS)
        self._steps = 0
        self._stops: list[float] = []
        self._clear()

    def _clear(self) -> None:
        self._terms = np.zeros(6)  # kd, loss, features, their number, ce, its number
        self._targets = np.zeros((len(self._tasks), 2))  # sum and number of target losses
        self._sentences = np.zeros(len(self._tasks))
        self._kd = np.zeros((len(self._teachers), len(self._tasks)))
        self._answers = np.zeros((len(self._teachers), 3))  # entropy, agreement, the number of micro batches that have them
        self._seconds = 0.0
        self._tokens = 0

    def add(self, losses: Sequence[Losses], batches: Sequence[Batch], seconds: float) -> None:
        """One step's micro batches of this worker."""
        import torch

        teachers = len(self._teachers)
        for outcome, batch in zip(losses, batches, strict=True):
            rows = torch.cat([outcome.target_B[None], outcome.kd_NB]).double().cpu().numpy()
            scalars = torch.cat(
                [torch.stack([outcome.kd, outcome.loss, outcome.features, outcome.ce]), outcome.entropy_N, outcome.agreement_N]
            )
            (kd, loss, features, ce), answers = np.split(scalars.double().cpu().numpy(), [4])
            of_data = math.isfinite(ce)  # a student's own answers have no truth to be compared with
            self._terms += kd, loss, features, 1, ce if of_data else 0, of_data
            asked = np.isfinite(answers.reshape(2, teachers).T)
            self._answers += np.concatenate([np.where(asked, answers.reshape(2, teachers).T, 0), asked[:, :1]], axis=1)
            if of_data:
                np.add.at(self._targets, batch["task"], np.stack([rows[0], np.ones_like(rows[0])], axis=1))
            np.add.at(self._kd.T, batch["task"], rows[1:].T)
            np.add.at(self._sentences, batch["task"], 1)
            self._tokens += batch["tokens"].size
        self._seconds += seconds
        self._steps += 1
        if self._steps == 2:
            self._paces.clear()  # a process's first step is slower than all others
        self._paces.append(seconds)

    @contextmanager
    def stop(self) -> Iterator[None]:
        """Measure what a checkpoint costs, which is not training time."""
        started = time.perf_counter()
        yield
        self._stops.append(time.perf_counter() - started)

    def _of_answers(self, number: int) -> dict[str, float | None]:
        """Mean entropy and agreement of a teacher's answers; null where it was asked about nothing."""
        entropy, agreement, asked = self._answers[number].tolist()
        return (
            {"entropy": round(entropy / asked, 6), "agreement": round(agreement / asked, 6)}
            if asked
            else dict.fromkeys(("entropy", "agreement"))
        )

    def line(self, state: State, rate: float, norm: float) -> dict[str, Any]:
        """The journal's next line; starts anew. All workers call it together."""
        import torch

        for sums in (self._terms, self._targets, self._sentences, self._kd, self._answers):
            torch.distributed.all_reduce(torch.from_numpy(sums))
        kd, loss, features, batches, ce, of_data = self._terms.tolist()
        kd, loss = kd / batches, loss / batches
        targets, counts = self._of_tasks(*self._targets.T.tolist()), self._sentences.tolist()
        teachers = {
            name: {
                "kd": self._of_tasks(self._kd[number].tolist(), counts),
                **self._of_answers(number),
            }
            for number, name in enumerate(self._teachers)
        }
        speed = self._tokens * torch.distributed.get_world_size() / self._seconds
        line = {
            "step": state.step,
            "rows": state.rows,
            "tokens": state.tokens,
            "loss": round(loss, 6),
            "ce": round(ce / of_data, 6) if of_data else None,
            "kd": round(kd, 6) if teachers else None,
            "target_loss": targets,
            "target_perplexity": {task: None if value is None else perplexity(value) for task, value in targets.items()},
            **({"teachers": teachers} if teachers else {}),
            **({"features": round(features / batches, 6)} if self._features else {}),
            "rate": rate,
            "grad_norm": round(norm, 6) if math.isfinite(norm) else None,
            "tokens_per_s": round(speed, 1),
            "seconds": round(state.seconds, 3),
            "matmul_share": round(speed * self._share_of_a_token, 4),
            "checkpoint_s": round(self._stops[-1], 3) if self._stops else None,
            "eta_s": round(self._seconds_left(state.step), 1),
        }
        self._clear()
        return line

    def _of_tasks(self, sums: Sequence[float], counts: Sequence[float]) -> dict[str, float | None]:
        """Means by task; None where no sentence was of the task."""
        of_tasks = zip(self._tasks, sums, counts, strict=True)
        return {task: round(total / count, 6) if count else None for task, total, count in of_tasks}

    def _seconds_left(self, step: int) -> float:
        every, steps = self._section.checkpoint_every, self._section.steps
        stops_left = -(-steps // every) - step // every
        stop = sum(self._stops) / len(self._stops) if self._stops else 0.0
        return (steps - step) * sum(self._paces) / len(self._paces) + stops_left * stop


def perplexity(loss: float) -> float:
    """The perplexity of a mean loss in nats, in five significant digits."""
    return float(f"{math.exp(min(loss, 700.0)):.5g}")


def operations_per_token(student: LlamaForCausalLM, teachers: Sequence[LlamaForCausalLM], length: int) -> float:
    """Floating-point operations of a training step for one token of a sentence of `length`: the student's forward and backward,
    and each teacher's forward, a third of as much."""
    return _operations(student, length) + sum(_operations(teacher, length) for teacher in teachers) / 3


def _operations(model: LlamaForCausalLM, length: int) -> float:
    shape = model.config
    section = ModelSection(
        width=shape.hidden_size, layers=shape.num_hidden_layers, heads=shape.num_attention_heads, mlp=shape.intermediate_size
    )
    return estimate.operations_per_token(section, shape.vocab_size, length)


def matmul_rate(precision: str, device: torch.device) -> float:
    """Operations a second that all workers reach together in products of square matrices, in the precision of a run.

    All call it together and compute at the same time, so that cores or cards that they share count once.
    """
    import torch

    torch.distributed.barrier()
    rate = torch.tensor(_own_matmul_rate(precision, device, torch.get_num_threads()), dtype=torch.float64)
    torch.distributed.all_reduce(rate)
    return rate.item()


@cache
def _own_matmul_rate(precision: str, device: torch.device, threads: int) -> float:
    """This process's own rate; measured once, with as many threads as it has now."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    side = MATMUL_SIDE[device.type]
    # Numbers of its own: the training's random state stays as it is.
    left, right = (torch.randn((side, side), generator=torch.Generator().manual_seed(k)).to(device, dtype) for k in (0, 1))

    def seconds() -> float:
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the card
        return time.perf_counter() - started

    seconds()
    times: list[float] = []
    while sum(times) < MATMUL_SECONDS:
        times.append(seconds())
    return 2 * side**3 / min(times)  # other processes still start: the best is the machine's


def append_line(run: str | Path, line: dict[str, Any]) -> None:
    """Write a line at the end of a run's journal. Raises UserError where the disk is full."""
    path = Path(run) / METRICS_FILE
    with changing(str(path)), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Every whole line of a run's journal, in order; [] where there is none yet. A last line without its end is still being
    written and left out. Raises UserError naming a line that is no JSON object."""
    path = Path(run) / METRICS_FILE
    return [_parsed(path, number, line) for number, line in enumerate(_whole_lines(path), 1) if line.strip()]


def last_line(run: str | Path) -> dict[str, Any] | None:
    """The newest whole line of a run's journal, read from the file's end; None where there is none yet."""
    lines, _ = _tail(run)
    return json.loads(lines[-1]) if lines else None


def lines_after(run: str | Path, step: int) -> list[dict[str, Any]]:
    """The whole lines of a run's journal after a step, in order. Of a long journal only the end is read, where that is enough."""
    tail, whole = _tail(run)
    lines = [json.loads(line) for line in (tail if whole else tail[1:])]
    if not whole and (not lines or lines[0]["step"] > step):
        lines = read_metrics(run)
    return [line for line in lines if line["step"] > step]


def _tail(run: str | Path) -> tuple[list[bytes], bool]:
    """The last whole lines of a run's journal, the first of them perhaps cut, and whether these are all."""
    try:
        with (Path(run) / METRICS_FILE).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().rpartition(b"\n")[0].splitlines(), size <= TAIL_BYTES
    except FileNotFoundError:
        return [], True


def cut_metrics(run: str | Path, step: int) -> None:
    """Drop the journal's lines after a step, so that no step stands twice when training goes on from there."""
    path = Path(run) / METRICS_FILE
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    temporary = path.with_suffix(".new")
    with changing(str(path)):
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)


def _whole_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot read it as text in UTF-8: remove it, or train the run again") from None
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: line {number} is not a JSON object: remove it, or train the run again")
    return value
