"""One measured figure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A value with its unit, what was wanted of it, and how it came about, in words."""

    value: float
    unit: str
    wanted: str
    how: str
