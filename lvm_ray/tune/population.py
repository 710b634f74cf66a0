"""Population-based training of a schedule of shares (Jaderberg et al. 2017), generation by generation.

A member is a schedule as far as it goes: [(first step, {task: share}), ...]. After each generation the worst quarter goes on from
the
best quarter's weights, with shares moved up or down. A plan is the same up to where two schedules part, so a member's checkpoint
is one of its schedule's own, and that schedule trained from nothing is an ordinary run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvm_ray.tune.domains import draw
from lvm_ray.tune.space import Settings

SHARES = "balance.shares."
QUARTER = 0.25  # of the population that is replaced, at least one member
FACTORS = (0.8, 1.25)  # by which a share that is explored is moved

Member = list[tuple[int, dict[str, float]]]


def boundary(generation: int, generations: int, steps: int) -> int:
    """The step after which so many generations are over."""
    return steps * generation // generations


def first(varied: Mapping[str, Any], size: int, generator: np.random.Generator) -> list[Member]:
    """Members whose shares are drawn."""
    return [[(0, {key: draw(domain, generator) for key, domain in varied.items()})] for _ in range(size)]


def next_generation(
    members: Sequence[Member], found: Sequence[Sequence[float] | None], step: int, generator: np.random.Generator
) -> tuple[list[int], list[Member]]:
    """(whose weights each goes on from, the members) after a generation that ended after a step. `found`: small is good; None is
    the worst. Those that are not replaced go on as they are."""
    order = sorted(range(len(members)), key=lambda place: (math.inf if found[place] is None else found[place][0], place))  # type: ignore[index]
    moved = min(max(1, round(QUARTER * len(members))), len(members) // 2)
    places, following = list(range(len(members))), [list(member) for member in members]
    for bad, good in zip(order[len(order) - moved :], order, strict=False):
        shares = {key: float(f"{value * generator.choice(FACTORS):.4g}") for key, value in members[good][-1][1].items()}
        places[bad], following[bad] = good, [*members[good], (step, shares)]
    return places, following


def settings_of(member: Member, fixed: Mapping[str, Any], steps: int) -> Settings:
    """A member's settings; `fixed` has the shares of tasks that are not varied."""
    constant = {key: value for key, value in fixed.items() if key.startswith(SHARES)}
    parts = [
        {"start": step / steps, "shares": {key.removeprefix(SHARES): float(value) for key, value in (constant | shares).items()}}
        for step, shares in member
    ]
    return {"balance.shares": {}, "balance.schedule": parts}
