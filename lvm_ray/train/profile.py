"""A profile of the training: what three steps spend their time on (`compute.profile`).

    RUN/profile/trace-rank0.json.gz  every operation of the three steps, for chrome://tracing or Perfetto
    RUN/profile/operations.txt       the 15 most expensive operations

The first worker's third to fifth step after a start are traced, if there are so many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile, schedule

FOLDER = "profile"
WARM_UP, STEPS, OPERATIONS = 2, 3, 15


@contextmanager
def profiled(run: str | Path, wanted: bool) -> Iterator[Callable[[], None]]:
    """Profile the body's steps, where that is wanted. The body calls what it gets after each step."""
    if not wanted:
        yield lambda: None
        return
    folder = Path(run) / FOLDER
    # The profiler's own first step is slow, so it runs beside the last one of the warm-up.
    phases = schedule(wait=WARM_UP - 1, warmup=1, active=STEPS, repeat=1)
    with profile(schedule=phases, on_trace_ready=lambda found: _write(found, folder)) as profiler:
        yield profiler.step


def _write(found: profile, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / "trace-rank0.json.gz"))
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=OPERATIONS, max_name_column_width=60)
    (folder / "operations.txt").write_text(table, encoding="utf-8")
