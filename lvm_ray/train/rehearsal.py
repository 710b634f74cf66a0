"""One micro batch forward and backward before the first step: what memory, precision or a bad teacher would stop, stops here.

A rehearsal costs what a micro batch costs, and leaves no trace: weights, gradients and random state stay as they are.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.train.losses import TrainingModule
from lvm_ray.train.preflight import less_memory

Tensors = dict[str, torch.Tensor]

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # as torch says it on GPUs and CPUs
A_HAIR = 1e-3  # by which a teacher that knows nothing may fall below a guess, by rounding
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rehearse(module: TrainingModule, tokens_BT: torch.Tensor, recipe: Recipe, sentences: Tensors, where: str) -> float:
    """The loss of one micro batch (tokens int64 [B, T]), forward and backward in the run's precision.

    sentences  what else the module's forward takes of the micro batch, by name
    where      names the batch in a message

    Raises UserError where memory is short, and where the loss or a gradient is no number.
    """
    dtype = DTYPES[recipe.compute.precision]
    # Leaves of their own collect the gradients. Of the same precision they share their storage with the weights.
    weights = {name: value.detach().to(dtype).requires_grad_(value.requires_grad) for name, value in module.named_parameters()}
    values = {f"module.{name}": value for name, value in weights.items()}
    try:
        loss: float = torch.func.functional_call(_ForwardAndBackward(module), values, (tokens_BT, sentences))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"train.micro_batch: {len(tokens_BT)} sentences of {tokens_BT.shape[1]} tokens do not fit into memory: "
            f"{less_memory(recipe)}"
        ) from None
    gradients = ((name, value.grad) for name, value in weights.items() if value.grad is not None)
    wrong = next((name for name, gradient in gradients if not gradient.isfinite().all()), None)
    if wrong or not math.isfinite(loss):
        what = f"the gradient of {wrong.removeprefix('student.')} is no number" if wrong else f"the loss is {loss}"
        other = "" if recipe.compute.precision == "fp32" else "set compute.precision to fp32, or "
        raise UserError(f"{where}: {what} in {recipe.compute.precision}, before any step: {other}start from other weights")
    return loss


def check_teacher_loss(teacher: TrainingModule, tokens_BT: torch.Tensor, sentences: Tensors, field: str, run: str | None) -> None:
    """Raises UserError where a teacher, in a module of its own, predicts no better than a guess among all codes.

    `field` of the recipe names it, `run` is its folder.
    """
    unweighted = {name: values for name, values in sentences.items() if name != "weights_B"}  # a guess would weigh as much
    with torch.no_grad():
        loss = float(teacher(tokens_BT, **unweighted).loss)
    codes = teacher.student.config.vocab_size
    if not loss < math.log(codes) - A_HAIR:
        raise UserError(
            f"{field}: {run}: its loss on the first micro batch is {loss:.3f}, no "
            f"better than a guess among {codes} codes ({math.log(codes):.3f}): train it longer, or name another teacher"
        )


class _ForwardAndBackward(nn.Module):
    """Passes backward inside its forward: layers that are computed again for their gradient must meet the same weights."""

    def __init__(self, module: TrainingModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens_BT: torch.Tensor, sentences: Tensors) -> float:
        loss = self.module(tokens_BT, **sentences).loss
        loss.backward()
        return float(loss.detach())


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
