"""Finite scalar quantisation (Mentzer et al. 2023): a code is a point of a fixed grid, each channel one of a few levels.

Nothing is learnt about the codes, so none can die. A grid is told by its `levels`, the number of values of each channel;
its codes are numbered with the first channel running fastest. A channel's levels lie evenly from -1 to 1. (The paper shifts
those of an even number so that one is 0; with two levels that would leave no gradient.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def grid(levels: Sequence[int]) -> Tensor:
    """All codes as points, float32 [V, D] within -1..1, V the product of the levels."""
    code_V = torch.arange(math.prod(levels))
    strides = zip(_strides(levels), levels, strict=True)
    return points_of(torch.stack([code_V // stride % level for stride, level in strides], dim=1).float(), levels)


def bound(latents_PD: Tensor, levels: Sequence[int]) -> Tensor:
    """Latents squeezed by tanh into 0..levels - 1: rounded, they are the level of each channel."""
    return (torch.tanh(latents_PD) + 1) * _half(levels, latents_PD)


def codes_of(steps_PD: Tensor, levels: Sequence[int]) -> Tensor:
    """Index [P] of the code nearest to bounded latents."""
    return (steps_PD.round().long() * torch.tensor(_strides(levels), device=steps_PD.device)).sum(dim=1)


def points_of(steps_PD: Tensor, levels: Sequence[int]) -> Tensor:
    """The grid's points nearest to bounded latents, with the gradient of the bounded latents themselves."""
    rounded_PD = steps_PD + (steps_PD.round() - steps_PD).detach()
    return rounded_PD / _half(levels, steps_PD) - 1


def _strides(levels: Sequence[int]) -> list[int]:
    return [math.prod(levels[:channel]) for channel in range(len(levels))]


def _half(levels: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([(level - 1) / 2 for level in levels], device=like.device)
