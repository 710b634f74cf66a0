"""Reading a folder: a pipeline or run folder as a `Report`, what is not there left empty.

A pipeline folder holds `student/` and `teacher/`, or a folder a stage; any other folder is a single run. Files are read
strictly: one that is there and holds something else raises UserError, which names it and says what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lvm_ray.continual import stage_folders
from lvm_ray.errors import UserError
from lvm_ray.report.charts import Role
from lvm_ray.storage import redacted
from lvm_ray.train.meter import read_metrics


@dataclass(frozen=True)
class Run:
    """A run folder as far as it is there: lines of metrics, evaluation, gallery entries, number of parameters."""

    role: Role
    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    gallery: Sequence[Mapping[str, Any]]
    parameters: int | None


@dataclass(frozen=True)
class Report:
    """Everything that the page is made of. The last run is the one that the page is about."""

    folder: Path
    config: Mapping[str, Any]
    config_text: str
    balance: Sequence[Mapping[str, Any]]
    runs: Sequence[Run]

    @property
    def main(self) -> Run:
        return self.runs[-1]

    @property
    def tasks(self) -> list[str]:
        """The tasks in the recipe's order."""
        known = self.config.get("tasks")
        scored = self.main.evaluation.get("tasks", {})
        named = [*known] if isinstance(known, Mapping) else []
        return [str(task) for task in [*named, *(task for task in scored if task not in named)]]


def read(folder: Path) -> Report:
    """Gather what a folder holds."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name a pipeline or run folder, for example runs/demo")
    roles: tuple[tuple[Role, Path], ...] = (("teacher", folder / "teacher"), ("student", folder / "student"))
    runs = [run for role, place in roles if (run := _read_run(role, place)).metrics or run.evaluation]
    runs = runs or [_read_run("model", next(reversed(stage_folders(folder)), folder))]
    if not (runs[-1].metrics or runs[-1].evaluation):
        raise UserError(f"{folder}: neither metrics.jsonl nor evaluation.json here: run lvm-ray train, then lvm-ray evaluate")
    text = _text(folder / "config.yaml") or ""
    balance = read_json(folder / "data" / "balance.json", list)
    return Report(folder, _config(folder), redacted(text), balance, runs)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _read_run(role: Role, folder: Path) -> Run:
    evaluation = read_json(folder / "evaluation.json", dict)
    tasks = evaluation.get("tasks", {})
    if not isinstance(tasks, dict) or not all(isinstance(entries, dict) for entries in tasks.values()):
        raise UserError(f"{folder}/evaluation.json: tasks: not a mapping of tasks to metrics: run lvm-ray evaluate again")
    return Run(
        role,
        folder,
        _config(folder),
        read_metrics(folder),
        evaluation,
        [entry for entry in read_json(folder / "gallery.json", list) if isinstance(entry, dict)],
        parameters(folder / "model" / "model.safetensors"),
    )


def parameters(path: Path) -> int | None:
    """How many numbers a safetensors file holds, from its header alone; None where there is no such file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:  # the format's own limit
                raise ValueError
            header = json.loads(file.read(length))
        return sum(int(math.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a safetensors file: train the run again, or remove it") from None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        value = yaml.safe_load(_text(path) or "")
    except yaml.YAMLError:
        raise UserError(f"{path}: not valid YAML: write the recipe anew by training again, or remove the file") from None
    return value if isinstance(value, dict) else {}


def read_json(path: Path, kind: type[Any]) -> Any:
    """The content of a JSON file, an empty one of its kind where there is none."""
    text = _text(path)
    if text is None:
        return kind()
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise UserError(f"{path}: not a JSON {'list' if kind is list else 'object'}: remove it, or make it again")
    return value


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot read it as text in UTF-8: remove it, or make it again") from None
