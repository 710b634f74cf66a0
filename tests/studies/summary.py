"""How a study says what several seeds gave."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

mean = statistics.fmean


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, lowest and highest: `2.31 (2.28 to 2.36)`; a single value by itself."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
