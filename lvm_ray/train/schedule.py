"""The learning rate of a step, as a part of its peak: linear warmup, then a cosine down to the final rate."""

from __future__ import annotations

import math


def rate_factor(step: int, steps: int, warmup: float, final_rate: float) -> float:
    """Rate of step 0..steps-1 as a part of the peak, in 0..1.

    warmup      part of the steps over which the rate rises; the first step already moves
    final_rate  the last step's rate as a part of the peak
    """
    assert 0 <= step < steps, (step, steps)
    rising = warmup * steps
    if step < rising:
        return min(1.0, (step + 1) / rising)
    # The cosine runs from the first step at the peak to the last step.
    start = math.ceil(rising)
    progress = (step - start) / max(1, steps - 1 - start)
    return final_rate + (1 - final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
