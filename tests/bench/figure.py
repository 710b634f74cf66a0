"""One measured figure, and the two places where figures stand: `runs/bench.json` and the table of `docs/benchmarks.md`."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

JSON = Path("runs/bench.json")
PAGE = Path("docs/benchmarks.md")


@dataclass(frozen=True)
class Figure:
    """A value with its unit, what was wanted of it, and how it came about, in words."""

    value: float
    unit: str
    wanted: str
    how: str


def merge(name: str, figure: Figure, command: str) -> None:
    """Into the JSON as {name: {"value", "unit", "how"}}, and onto the page: one row a figure, sorted by name, below its text."""
    JSON.parent.mkdir(exist_ok=True)
    merged = json.loads(JSON.read_text()) if JSON.is_file() else {}
    merged[name] = {"value": figure.value, "unit": figure.unit, "how": figure.how}
    JSON.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    cells = [f"`{name}`", f"{figure.value:.4g} {figure.unit}", figure.wanted, figure.how, f"`{command}`", machine()]
    row = f"| {' | '.join([*cells, time.strftime('%Y-%m-%d')])} |"
    text = PAGE.read_text()
    rows = {found.group(1): line for line in text.splitlines() if (found := re.match(r"\| `(\w+)` \|", line))}
    head = [line for line in text.splitlines() if not re.match(r"\| `\w+` \|", line)]
    PAGE.write_text("\n".join([*head, *(line for _, line in sorted({**rows, name: row}.items()))]) + "\n")


def machine() -> str:
    """The processor and its cores."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return f"{found.group(1).strip() if found else platform.processor()}, {os.cpu_count()} cores"
