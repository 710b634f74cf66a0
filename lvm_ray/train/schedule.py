"""The learning rate of a step, as a part of its peak: linear warmup, then a cosine, or the peak and a linear decay."""

from __future__ import annotations

import math

from lvm_ray.recipe_sections import TrainSection


def rate_factor(step: int, section: TrainSection) -> float:
    """Rate of step 0..steps-1 as a part of the peak, in 0..1; the first step already moves, the last has the final rate.

    cosine  from the first step after the warmup down to the last step
    wsd     the peak until the last `decay` part of the steps, then a straight line; the lower of both where warmup and decay meet
    """
    assert 0 <= step < section.steps, (step, section.steps)
    rising = section.warmup * section.steps
    if section.schedule == "wsd":
        falling = section.decay * section.steps
        left = min(1.0, (section.steps - 1 - step) / falling)
        risen = min(1.0, (step + 1) / rising) if rising else 1.0
        return min(risen, section.final_rate + (1 - section.final_rate) * left)
    if step < rising:
        return min(1.0, (step + 1) / rising)
    # The cosine runs from the first step at the peak to the last step.
    start = math.ceil(rising)
    progress = (step - start) / max(1, section.steps - 1 - start)
    return section.final_rate + (1 - section.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
