"""Checkpoints: weights and moments by parameter name, in fp32, whatever the worker count, ZeRO stage or precision.

    RUN/checkpoints/step-000400/
        model.safetensors      name -> parameter
        optimizer.safetensors  moment/name -> AdamW's exp_avg and exp_avg_sq, Muon's momentum_buffer
        state.json             the position: step, rows, tokens, seconds, and what recipe it belongs to

A checkpoint appears whole or not at all: it is written beside its place and renamed. Nothing here is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lvm_ray.errors import UserError

FOLDER = "checkpoints"
STEP_NAME = re.compile(r"^step-(\d{6,})$")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class State:
    """Where a run stands: a plain value, saved beside the weights.

    step         optimizer steps done
    rows         sentences consumed: the position in the plan
    tokens       tokens consumed
    seconds      training time so far, over all restarts
    fingerprint  of the recipe
    plan         fingerprint of the plan, hence of the data
    precision    bf16 or fp32
    score        validation loss, the mean over tasks; None where nothing was validated
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    fingerprint: str = ""
    plan: str = ""
    precision: str = ""
    score: float | None = None


def save(run: str | Path, state: State, parameters: Tensors, moments: Tensors, keep: int) -> Path:
    """Write a checkpoint, atomically, then remove all but the newest `keep`. The new checkpoint's folder."""
    folder = Path(run) / FOLDER
    target = folder / f"step-{state.step:06d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(parameters, temporary / "model.safetensors")
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in sorted(_checkpoints(run))[:-keep]:
        shutil.rmtree(_checkpoints(run)[old])
    return target


def latest(run: str | Path) -> Path | None:
    """The newest checkpoint's folder of a run, or None."""
    found = _checkpoints(run)
    return found[max(found)] if found else None


def read_state(checkpoint: Path) -> State:
    """The position of a checkpoint. Raises UserError where it cannot be read."""
    path = checkpoint / "state.json"
    try:
        return State(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint's state ({error}): remove {checkpoint} to go on from the one before") from None


def require_same(checkpoint: Path, state: State, fingerprint: str, plan: str) -> None:
    """Raises UserError where a checkpoint belongs to another recipe or to other data."""
    for found, wanted, what in ((state.fingerprint, fingerprint, "recipe"), (state.plan, plan, "data set or balance")):
        if found != wanted:
            raise UserError(
                f"{checkpoint}: written by another {what} (fingerprint {found}, this one is {wanted}): "
                "train into another --run, or remove the checkpoints"
            )


def load(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """Parameters and moments of a checkpoint by name. Raises UserError where a file is missing or damaged."""
    parameters, moments = (_load_tensors(checkpoint / name) for name in ("model.safetensors", "optimizer.safetensors"))
    return parameters, moments


def _load_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}): remove {path.parent} to go on from the one before") from None


def _checkpoints(run: str | Path) -> dict[int, Path]:
    """Whole checkpoints of a run by step."""
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        return {}
    named = ((STEP_NAME.match(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match and (path / "state.json").is_file()}
