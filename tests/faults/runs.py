"""A small training that the command line runs as users run it: token shards, a tokenizer, a recipe, and what a run left.

The model has 5 million weights in sentences of 32 tokens: a step takes about a tenth of a second and a checkpoint's 60 MB half as
long, so that a kill finds either.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lvm_ray.recipe_sections import TokenizerSection
from lvm_ray.storage import is_uri
from lvm_ray.tokenizer import patch
from tests.faults.processes import descendants, is_alive, kill, wait
from tests.toys import CODES, PATCH, SIZE, make_toy_shards

Case = dict[str, Any]

STEPS = 240  # workers that lost their raylet go on for 13 s before they end
SHORT = 32  # steps of the runs without Ray
EVERY = 8  # steps between two checkpoints
PATIENCE = 600.0  # seconds that a whole command may take; a minute where nothing else computes
COMPARED = ("step", "rows", "loss", "target_loss", "grad_norm")


def case(name: str, outcome: str, ok: bool) -> Case:
    return {"case": name, "outcome": outcome, "ok": ok}


class Base:
    """One data set, one recipe, and the undisturbed runs that all others are compared with."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.recipe = prepare(place)
        self.home = place / "home"  # of the working copies of runs at URIs
        self._references: dict[tuple[str, ...], Path] = {}

    def start(self, name: str, *settings: str) -> Command:
        """The command of a run below the base, or at a URI."""
        run = name if is_uri(name) else str(self.place / name)
        return Command(self.recipe, run, settings, {**os.environ, "LVM_RAY_HOME": str(self.home)})

    def folder(self, name: str) -> Path:
        """Where a run's files are written: of a run at a URI its working copy."""
        if not is_uri(name):
            return self.place / name
        return next((self.home / "runs").glob("*"), self.home / "runs" / "none yet")

    def reference(self, *settings: str) -> Path:
        """The finished undisturbed run of these settings."""
        if settings not in self._references:
            name = f"undisturbed-{len(self._references)}"
            command = self.start(name, *settings)
            code = command.finish()
            assert code == 0, f"the undisturbed run ended with {code}: {command.output[-2000:]}"
            self._references[settings] = self.place / name
        return self._references[settings]


@contextmanager
def base() -> Iterator[Base]:
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        yield Base(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def prepare(place: Path) -> Path:
    """Token shards of two tasks and a tokenizer of random pictures below a folder; the recipe's path."""
    pictures = np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3), np.uint8)
    section = TokenizerSection(patch=PATCH, codes=CODES, width=8, steps=1)
    tokenizer = patch.train(section, pictures, 0, lambda step, note: None)
    patch.save(tokenizer, str(place / "tokenizer"))
    make_toy_shards(place / "data/shards", {"pictures": (64, 4), "segmentation": (64, 4)}, tokenizer=tokenizer.hash)
    values = {
        "size": SIZE,
        "shards": str(place / "data/shards"),
        "tasks": {
            "pictures": {"train": {"images": "images", "labels": "labels"}},
            "segmentation": {"classes": ["thing"], "train": {"images": "images", "masks": "masks"}},
        },
        "tokenizer": {"patch": PATCH, "codes": CODES, "width": 8},
        "model": {"width": 320, "layers": 4, "heads": 5, "mlp": 832},
        "train": {
            **{"steps": STEPS, "batch": 8, "micro_batch": 2, "rate": 1e-3, "log_every": 1, "checkpoint_every": EVERY},
            **{"keep_best": 0, "validation": 0},
        },
        "compute": {"workers": 2, "threads": 1, "precision": "fp32"},
    }
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass
class Command:
    """`lvm-ray train RECIPE --run RUN --set ...`, running; its output goes into a file."""

    recipe: Path
    run: str
    settings: Sequence[str] = ()
    environment: dict[str, str] | None = None
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "lvm_ray", "train", str(self.recipe), "--run", self.run]
        for setting in self.settings:
            command += ["--set", setting]
        self._out = self.recipe.parent / f"output-{time.monotonic_ns()}.txt"
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        self.family: set[int] = set()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def look(self) -> list[int]:
        """Its processes; they are remembered, since orphans have no parent to be found by."""
        found = descendants(self.pid)
        self.family.update(found)
        return found

    def finish(self, seconds: float = PATIENCE) -> int | None:
        """Its exit code, or None where it hangs. Whatever it leaves is ended."""
        wait(lambda: self.look() is None or self.ended, seconds, 0.5)
        code = self.process.poll()
        self.end()
        return code

    def end(self) -> None:
        """End it and all of its processes: Ray's own agents look for their parent only once a minute."""
        self.look()
        kill([self.pid])
        self.process.wait()
        wait(lambda: not any(is_alive(pid) for pid in self.family), 3)
        kill(self.family)

    @property
    def output(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        return last_line(self.output)

    @property
    def refusal(self) -> str:
        return refusal(self.output, "train")


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def refusal(output: str, verb: str) -> str:
    """The one line of bad input or a bad machine; empty where the output holds a traceback or no such line."""
    mark = f"lvm-ray {verb}: "
    said = [line for line in output.splitlines() if line.startswith(mark)]
    return said[0].removeprefix(mark) if len(said) == 1 and "Traceback" not in output else ""


def journal(run: Path) -> list[dict[str, Any]]:
    """The run's journal without what is measured in seconds."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except OSError:
        return []
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: line.get(key) for key in COMPARED} for line in lines]


def reached(run: Path) -> int:
    """The last step in the journal."""
    lines = journal(run)
    return int(lines[-1]["step"]) if lines else 0


def checkpoints(run: Path) -> list[int]:
    """Steps of the whole checkpoints, in order."""
    return sorted(int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step-*/state.json"))


def newest(run: Path) -> int:
    return max(checkpoints(run), default=0)


def model(run: Path) -> str:
    """A checksum of the finished model, empty where there is none."""
    path = run / "model" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def differs(run: Path, reference: Path) -> str:
    """How a finished run differs from the undisturbed one, empty where it does not: steps, losses digit by digit, the model."""
    return lines_differ(journal(run), journal(reference)) or ("" if model(run) == model(reference) else "other weights")


def lines_differ(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> str:
    """How a journal differs from the undisturbed one, empty where it does not."""
    numbers = [line["step"] for line in found]
    if numbers != [line["step"] for line in wanted]:
        return f"{len(numbers)} lines of {len(set(numbers))} steps, {len(wanted)} wanted"
    for line, other in zip(found, wanted, strict=True):
        if line != other:
            return f"from step {line['step']} on the loss is {line['loss']}, undisturbed {other['loss']}"
    return ""
