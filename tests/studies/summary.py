"""How a study says what several seeds gave."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy import stats

mean = statistics.fmean


def spread(values: Sequence[float], digits: int) -> str:
    """Mean over seeds and Student's 95 % interval of it: `2.31 [2.19, 2.43]`; a single value by itself."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    centre = mean(values)
    return f"{centre:.{digits}f} [{centre - half:.{digits}f}, {centre + half:.{digits}f}]"
