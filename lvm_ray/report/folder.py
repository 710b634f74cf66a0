"""Reading folders: one pipeline or run folder, or several runs to be set beside each other, as a `Report`.

A pipeline folder holds `student/` and `teacher/`, or a folder a stage; any other folder is a single run. Files are read
strictly: one that is there and holds something else raises UserError, which names it and says what to do. What is not there is
left empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lvm_ray.continual import stage_folders
from lvm_ray.errors import UserError
from lvm_ray.report.series import MODEL, STUDENT, TEACHER, Series, series_of
from lvm_ray.report.words import finite
from lvm_ray.storage import redacted, short_names
from lvm_ray.train.meter import read_metrics

Entries = Mapping[str, Mapping[str, Any]]  # of a task: {metric: entry}


@dataclass(frozen=True)
class Run:
    """A run folder as far as it is there.

    series      its name and looks in charts and tables
    metrics     the lines of its journal
    evaluation  its scores, and `references` those of the devoted networks
    gallery     its entries
    parameters  how many its model has
    pairs       how many each task has in its training, by the balance table
    """

    series: Series
    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    references: Mapping[str, Any]
    gallery: Sequence[Mapping[str, Any]]
    parameters: int | None
    pairs: Mapping[str, float]

    @property
    def name(self) -> str:
        return self.series.name

    @cached_property
    def benchmarks(self) -> Mapping[str, Mapping[str, Any]]:
        """What was found on benchmarks, by NAME@VERSION."""
        found = self.evaluation.get("benchmarks", {})
        return {name if "@" in name else f"{name}@{entry.get('version')}": entry for name, entry in found.items()}

    @cached_property
    def scores(self) -> Mapping[str, Entries]:
        """The metrics of every task and benchmark."""
        tasks = self.evaluation.get("tasks", {}) | {name: entry["scores"] for name, entry in self.benchmarks.items()}
        return {str(name): _mappings(entries) for name, entries in tasks.items()}

    def reference(self, task: str, metric: str) -> Mapping[str, Any]:
        """What a devoted network scores, empty where nobody has tried."""
        return _mappings(self.references.get(task)).get(metric, {})

    @property
    def last(self) -> Mapping[str, Any]:
        """The last line of the journal."""
        return self.metrics[-1] if self.metrics else {}


@dataclass(frozen=True)
class Report:
    """Everything that the page is made of.

    main      the run that the page is about
    pipeline  whether the folder holds a teacher and a student
    compared  whether several folders were named, so that runs stand beside each other
    """

    folder: Path
    config: Mapping[str, Any]
    config_text: str
    balance: Sequence[Mapping[str, Any]]
    runs: Sequence[Run]
    main: Run
    pipeline: bool = False
    compared: bool = False

    @property
    def layered(self) -> list[Run]:
        """The runs as charts draw them: the main one last, above the others."""
        return [*(run for run in reversed(self.runs) if run is not self.main), self.main]

    @property
    def tasks(self) -> list[str]:
        """The tasks in the recipe's order, then those that only other runs know."""
        known = self.config.get("tasks")
        named = [*known] if isinstance(known, Mapping) else []
        runs = [self.main, *self.runs]
        scored = [task for run in runs for task in (*run.evaluation.get("tasks", {}), *(section(run.config, "tasks") or ()))]
        return list(dict.fromkeys(str(task) for task in [*named, *scored]))

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks that any run was asked, as NAME@VERSION."""
        return list(dict.fromkeys(name for run in [self.main, *self.runs] for name in run.benchmarks))


def read(*folders: Path, names: Sequence[str] = ()) -> Report:
    """Gather what a folder holds; of several what their runs hold, of a pipeline its student or its last stage. The first one is
    what the page is about.

    `names` are those of the runs in legends; without them what their paths differ in.
    """
    found = [_read_folder(folder) for folder in folders]
    if len(found) == 1:
        return found[0]
    places = [report.main.folder.resolve() for report in found]
    twice = next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice:
        raise UserError(f"{twice}: this run is named twice: leave one out")
    named = names or short_names(*map(str, folders))
    runs = [replace(report.main, series=series_of(k, name)) for k, (report, name) in enumerate(zip(found, named, strict=True))]
    return replace(found[0], runs=runs, main=runs[0], compared=True)


def _read_folder(folder: Path) -> Report:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name a pipeline or run folder, for example runs/demo")
    balance = read_json(folder / "data" / "balance.json", list)
    roles = ((TEACHER, folder / "teacher"), (STUDENT, folder / "student"))
    runs = [run for series, place in roles if (run := _read_run(series, place, balance)).metrics or run.evaluation]
    pipeline = bool(runs)
    runs = runs or [_read_run(MODEL, next(reversed(stage_folders(folder)), folder), balance)]
    if not (runs[-1].metrics or runs[-1].evaluation):
        raise UserError(f"{folder}: neither metrics.jsonl nor evaluation.json here: run lvm-ray train, then lvm-ray evaluate")
    text = _text(folder / "config.yaml") or ""
    return Report(folder, _config(folder), redacted(text), balance, runs, runs[-1], pipeline)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a recipe, empty where there is none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _read_run(series: Series, folder: Path, balance: Sequence[Any]) -> Run:
    evaluation = read_json(folder / "evaluation.json", dict)
    for key, what in (("tasks", "metrics"), ("benchmarks", "scores")):
        found = evaluation.get(key, {})
        if not isinstance(found, dict) or not all(isinstance(entries, dict) for entries in found.values()):
            raise UserError(f"{folder}/evaluation.json: {key}: not a mapping of {key} to {what}: run lvm-ray evaluate again")
    if not all(isinstance(entry.get("scores"), dict) for entry in evaluation.get("benchmarks", {}).values()):
        raise UserError(f"{folder}/evaluation.json: benchmarks: one has no scores: run lvm-ray evaluate again")
    rows = [row for row in balance if isinstance(row, dict)]
    return Run(
        series,
        folder,
        _config(folder),
        read_metrics(folder),
        evaluation,
        read_json(folder / "references.json", dict),
        [entry for entry in read_json(folder / "gallery.json", list) if isinstance(entry, dict)],
        parameters(folder / "model" / "model.safetensors"),
        {str(row.get("task")): pairs for row in rows if (pairs := finite(row.get("pairs"))) is not None},
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


def _mappings(value: Any) -> dict[str, Mapping[str, Any]]:
    """Those values of a mapping that are mappings themselves: a file may hold anything."""
    return {str(name): entry for name, entry in value.items() if isinstance(entry, Mapping)} if isinstance(value, Mapping) else {}
