"""Checkpoints: weights and moments by parameter name, in fp32, whatever the worker count, ZeRO stage or precision.

    RUN/checkpoints/step-000400/
        model.safetensors      name -> parameter
        optimizer.safetensors  moment/name -> AdamW's exp_avg and exp_avg_sq, Muon's momentum_buffer
        state.json             the position: step, rows, tokens, seconds, what recipe it belongs to, its score, and size and
                               sha256 of the other files

A checkpoint appears whole or not at all, after a power cut too: it is written beside its place, state.json last, brought to the
disk and renamed. One that is damaged later is set aside as `damaged-step-000400`. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lvm_ray.errors import UserError
from lvm_ray.storage import saving

FOLDER = "checkpoints"
STATE_FILE = "state.json"
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
STEP_NAME = re.compile(r"^step-(\d{6,})$")
DAMAGED = "damaged-"

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
    precision    bf16, fp16 or fp32
    score        validation loss of these weights, the mean over tasks, lower is better; None: not measured
    loss_scale   in fp16, as `Engine.loss_scale`
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    fingerprint: str = ""
    plan: str = ""
    precision: str = ""
    score: float | None = None
    loss_scale: list[float] | None = None


def save(run: str | Path, state: State, parameters: Tensors, moments: Tensors, keep: int, best: int = 0) -> Path:
    """Write a checkpoint, atomically, then remove all but the newest `keep` and the `best` of lowest score. Its folder.

    Raises UserError where the disk is full or cannot be written; nothing half-written stays, and older checkpoints do.
    """
    folder = Path(run) / FOLDER
    target = folder / f"step-{state.step:06d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with saving(f"{target}: cannot save the checkpoint", ": it goes on from the checkpoint before"):
            temporary.mkdir(parents=True)
            for name, tensors in zip(TENSOR_FILES, (parameters, moments), strict=True):
                save_file(tensors, temporary / name)
                _to_disk(temporary / name)
            files = {
                name: {"size": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in TENSOR_FILES
            }
            (temporary / STATE_FILE).write_text(json.dumps(asdict(state) | {"files": files}, indent=2) + "\n")
            for place in (temporary / STATE_FILE, temporary):
                _to_disk(place)
            _remove(target)
            temporary.rename(target)
            _to_disk(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    found = _checkpoints(run)
    for step in found.keys() - kept({step: _score(path) for step, path in found.items()}, keep, best):
        _remove(found[step])
    return target


def kept(scores: Mapping[int, float | None], newest: int, best: int) -> set[int]:
    """The steps to keep, of {step: score}: the `newest`, and the `best` of lowest score, of equal ones the earlier."""
    scored = sorted((score, step) for step, score in scores.items() if score is not None and score == score)
    return {*sorted(scores, reverse=True)[:newest], *(step for _, step in scored[:best])}


def latest(run: str | Path) -> Path | None:
    """The newest checkpoint's folder of a run, or None. It is whole where `set_aside_damaged` was asked before."""
    found = _checkpoints(run)
    return found[max(found)] if found else None


def set_aside_damaged(run: str | Path) -> list[str]:
    """Read every byte of the newest checkpoint and set it aside where it is damaged, and so on until one is whole.

    A line for each that was set aside: the checkpoint, the file and what is wrong with it. Leftovers of saves that were
    killed are removed.
    """
    lines = []
    for leftover in (Path(run) / FOLDER).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    while (newest := latest(run)) and (found := damage(newest)):
        aside = _free(newest.with_name(DAMAGED + newest.name))
        newest.rename(aside)
        lines.append(f"{newest}: damaged ({found}): set aside as {aside.name}")
    return lines


def damaged(run: str | Path) -> list[Path]:
    """The checkpoints of a run that were set aside, in order."""
    return sorted((Path(run) / FOLDER).glob(f"{DAMAGED}step-*"))


def damage(checkpoint: Path) -> str | None:
    """The file of a checkpoint that is missing, cut or changed, and how; None where all are what state.json says."""
    try:
        files = _content(checkpoint).get("files", {})
        read_state(checkpoint)
    except UserError as error:
        return str(error).removeprefix(f"{checkpoint}/").partition(": remove ")[0]
    for name in TENSOR_FILES:
        path, wanted = checkpoint / name, files.get(name, {})  # checkpoints of older versions hold no checksums
        try:
            size = path.stat().st_size
            if size != wanted.get("size", size):
                return f"{name}: {size:,} bytes of {wanted['size']:,}"
            if "sha256" in wanted and _sha256(path) != wanted["sha256"]:
                return f"{name}: its content is not what was saved: another checksum"
        except FileNotFoundError:
            return f"{name}: missing"
        except OSError as error:
            return f"{name}: cannot be read: {error.strerror}"
    return None


def read_state(checkpoint: Path) -> State:
    """The position of a checkpoint. Raises UserError where it cannot be read."""
    return parse_state(_content(checkpoint), checkpoint)


def parse_state(content: dict[str, Any], checkpoint: str | Path) -> State:
    """The position that the content of a state.json says. Raises UserError where it says none."""
    try:
        return State(**{key: value for key, value in content.items() if key != "files"})
    except TypeError as error:
        raise UserError(_no_state(checkpoint, error)) from None


def require_same(checkpoint: str | Path, state: State, fingerprint: str, plan: str) -> None:
    """Raises UserError where a checkpoint belongs to another recipe or to other data."""
    for found, wanted, what in ((state.fingerprint, fingerprint, "recipe"), (state.plan, plan, "data set or balance")):
        if found != wanted:
            raise UserError(
                f"{checkpoint}: written by another {what} (fingerprint {found}, this one is {wanted}): "
                "train into another --run, or remove the checkpoints"
            )


def load(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """Parameters and moments of a checkpoint by name. Raises UserError where a file is missing or damaged."""
    parameters, moments = (_load_tensors(checkpoint / name) for name in TENSOR_FILES)
    return parameters, moments


def _load_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}): remove {path.parent} to go on from the one before") from None


def _content(checkpoint: Path) -> dict[str, Any]:
    try:
        content = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        files = content.get("files", {}) if isinstance(content, dict) else None
        if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
            raise ValueError("JSON of another form")
        return dict(content)
    except FileNotFoundError:
        raise UserError(_no_state(checkpoint, "missing")) from None
    except (OSError, ValueError) as error:
        raise UserError(_no_state(checkpoint, error)) from None


def _no_state(checkpoint: str | Path, reason: object) -> str:
    return f"{checkpoint}/{STATE_FILE}: not a checkpoint's state ({reason}): remove {checkpoint} to go on from the one before"


def _score(checkpoint: Path) -> float | None:
    try:
        score = read_state(checkpoint).score
    except UserError:
        return None
    return score if isinstance(score, float | int) else None


def _checkpoints(run: str | Path) -> dict[int, Path]:
    """Checkpoints of a run by step."""
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        return {}
    named = ((STEP_NAME.match(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match}


def _remove(checkpoint: Path) -> None:
    """Renamed first: a kill in between leaves a leftover and no checkpoint with files missing."""
    if checkpoint.exists():
        leaving = checkpoint.with_name(f".{checkpoint.name}.old")
        shutil.rmtree(leaving, ignore_errors=True)
        checkpoint.rename(leaving)
        shutil.rmtree(leaving)


def _free(path: Path) -> Path:
    """The path, or with a number behind it where it is taken."""
    taken = (path.with_name(f"{path.name}-{number}") for number in range(2, 1000))
    return path if not path.exists() else next(place for place in taken if not place.exists())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """A file's content, or a folder's names, from the memory of the machine to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
