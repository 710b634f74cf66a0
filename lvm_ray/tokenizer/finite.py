"""Finite scalar quantisation (Mentzer et al. 2023): a code is a point of a fixed grid, each channel one of a few levels.

Nothing is learnt about the codes, so none can die. A grid is told by its `levels`, the number of values of each channel;
its codes are numbered with the first channel running fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MARGIN = 1e-3  # the outermost levels are reached before tanh saturates


def grid(levels: Sequence[int]) -> Tensor:
    """All codes as points, float32 [V, D] within -1..1, V the product of the levels."""
    code_V = torch.arange(math.prod(levels))
    digits_VD = torch.stack([code_V // stride % level for stride, level in zip(_strides(levels), levels, strict=True)], dim=1)
    return (digits_VD - _middle(levels)) / _middle(levels)


def bound(latents_PD: Tensor, levels: Sequence[int]) -> Tensor:
    """Latents squeezed by tanh into the grid's range, in steps of the grid: rounding them gives a level of each channel."""
    level_D = torch.tensor(levels, dtype=torch.float32, device=latents_PD.device)
    half_D = (level_D - 1) * (1 - MARGIN) / 2
    offset_D = torch.where(level_D % 2 == 0, 0.5, 0.0)  # an even number of levels has no middle one at 0
    return torch.tanh(latents_PD + torch.atanh(offset_D / half_D)) * half_D - offset_D


def codes_of(steps_PD: Tensor, levels: Sequence[int]) -> Tensor:
    """Index [P] of the code nearest to bounded latents."""
    digits_PD = steps_PD.round().long() + _middle(levels).to(steps_PD.device)
    return (digits_PD * torch.tensor(_strides(levels), device=steps_PD.device)).sum(dim=1)


def points_of(steps_PD: Tensor, levels: Sequence[int]) -> Tensor:
    """The nearest points of the grid, whose gradient is that of the bounded latents themselves."""
    rounded_PD = steps_PD + (steps_PD.round() - steps_PD).detach()
    return rounded_PD / _middle(levels).to(steps_PD.device)


def _strides(levels: Sequence[int]) -> list[int]:
    return [math.prod(levels[:channel]) for channel in range(len(levels))]


def _middle(levels: Sequence[int]) -> Tensor:
    return torch.tensor([level // 2 for level in levels])
