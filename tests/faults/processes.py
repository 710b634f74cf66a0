"""Processes below a process, what they are called, and waiting: all that a harness of kills needs of the machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def descendants(root: int) -> list[int]:
    """Processes below a process, at any depth."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, queue = [], [root]
    while queue:
        parent = queue.pop()
        children = [pid for pid, above in parents.items() if above == parent]
        found += children
        queue += children
    return found


def named(root: int, part: str) -> list[int]:
    """Processes below a process whose command line holds a text."""
    return [pid for pid in descendants(root) if part in title(pid)]


def title(pid: int) -> str:
    """A process's command line, with spaces; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pids: Iterable[int]) -> None:
    """SIGKILL those that still live."""
    for pid in pids:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def wait(condition: Callable[[], object], seconds: float, every: float = 0.05) -> bool:
    """Whether the condition came true within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every)
    return False
