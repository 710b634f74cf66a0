"""Numbers for Prometheus, by way of the cluster that a process has joined; on a machine of one's own nothing happens.

Ray exports them from its nodes, with `ray_` before their names and its own labels after ours: `run`, `stage`, of some `task`.
`cluster/grafana.json` is a dashboard of them.

Ray forgets a number that nobody repeats for twenty seconds, so a thread repeats all of them as long as this process lives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvm_ray.progress import Bar

STAGE, TASK = ("run", "stage"), ("run", "stage", "task")
# name: (what it is, its labels)
METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lvm_ray_stage_done": ("What a stage has done so far, in its unit", STAGE),
    "lvm_ray_stage_total": ("What a stage has to do in all", STAGE),
    "lvm_ray_stage_eta_seconds": ("Seconds to the end of a stage; 0 once it is over", STAGE),
    "lvm_ray_bad_items": ("Items that a stage has set aside", STAGE),
    "lvm_ray_step": ("Optimizer steps of a training so far", STAGE),
    "lvm_ray_tokens_per_second": ("Tokens a second of all workers of a training", STAGE),
    "lvm_ray_matmul_share": ("Operations of a training over what its workers reach in plain matrix products", STAGE),
    "lvm_ray_loss": ("Mean loss of the latest steps", STAGE),
    "lvm_ray_target_loss": ("Mean cross-entropy of a task's label tokens in the latest steps", TASK),
    "lvm_ray_validation_loss": ("The same over held-out sentences, at the latest checkpoint", TASK),
    "lvm_ray_checkpoint_seconds": ("Seconds of the latest checkpoint with its validation", STAGE),
}
OF_LINE = {  # numbers of a journal's line
    "lvm_ray_step": "step",
    "lvm_ray_tokens_per_second": "tokens_per_s",
    "lvm_ray_matmul_share": "matmul_share",
    "lvm_ray_loss": "loss",
    "lvm_ray_checkpoint_seconds": "checkpoint_s",
}
OF_TASKS = {"lvm_ray_target_loss": "target_loss", "lvm_ray_validation_loss": "validation_loss"}
EVERY = 5.0  # seconds

Numbers = Iterator[tuple[str, dict[str, str], float]]  # (name, labels, value)

_run = ""
_bars: dict[str, Bar] = {}  # by name: a stage that is done again takes its place
_lines: dict[str, dict[str, Any]] = {}  # by stage: its newest numbers
_thread: threading.Thread | None = None


def name_run(run: str) -> None:
    """What numbers from here on carry as their `run`."""
    global _run
    _run = run


def show(bar: Bar) -> None:
    """Follow a stage's progress from here on."""
    _bars[bar.name] = bar


class Journal:
    """Follows the journal of a training, as one of those that get its lines."""

    def __init__(self, stage: str, last: int) -> None:
        self.stage, self.last = stage, last

    def log(self, line: Mapping[str, Any]) -> None:
        """Take a line's numbers; those that only some lines have stay."""
        _lines[self.stage] = _lines.get(self.stage, {}) | {key: value for key, value in line.items() if value is not None}

    def close(self, done: bool) -> None:
        """The last numbers stay as long as the process lives."""


def numbers() -> Numbers:
    """All that is known now."""
    for bar in list(_bars.values()):
        labels = {"run": _run, "stage": bar.name}
        yield "lvm_ray_stage_done", labels, float(bar.done)
        yield "lvm_ray_bad_items", labels, float(bar.bad)
        if bar.total is not None:
            yield "lvm_ray_stage_total", labels, float(bar.total)
        left = 0.0 if bar.over else bar.seconds_left()
        if left is not None:
            yield "lvm_ray_stage_eta_seconds", labels, left
    for stage, line in list(_lines.items()):
        yield from of_line(line, {"run": _run, "stage": stage})


def of_line(line: Mapping[str, Any], labels: dict[str, str]) -> Numbers:
    """The numbers of a journal's line, as far as it knows them."""
    for name, key in OF_LINE.items():
        if line.get(key) is not None:
            yield name, labels, float(line[key])
    for name, key in OF_TASKS.items():
        for task, value in line.get(key, {}).items():
            if value is not None:
                yield name, labels | {"task": task}, float(value)


def begin() -> None:
    """Have all numbers exported from now on, once a process is on its cluster. Called again it does nothing."""
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_export, name="prometheus", daemon=True)
        _thread.start()


def _export() -> None:
    import ray
    from ray.util.metrics import Gauge

    gauges = {name: Gauge(name, what, labels) for name, (what, labels) in METRICS.items()}
    while True:
        if ray.is_initialized():
            for name, labels, value in numbers():
                gauges[name].set(value, labels)
        time.sleep(EVERY)
