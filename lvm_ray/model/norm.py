"""The norm of a model in training on a CPU: the stock one's numbers in fewer passes over memory.

A norm is bound by memory, not by arithmetic. The stock one turns all states to fp32, passes over them a dozen times forward and
back, and keeps fp32 copies for the gradient. Here a few rows at a time go through in a core's cache, the gradient is written out,
and what waits for it is the input as it came and a number a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lvm_ray.estimate import PASSED_AT_ONCE

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM


class RMSNorm(nn.Module):
    """States [..., D] / their root mean square x weight [D], in their own dtype; computed in fp32 or better."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = _RMSNorm.apply(states, self.weight, self.epsilon)  # type: ignore[no-untyped-call]
        return normed


def use_norm_in_cache(llama: LlamaForCausalLM) -> None:
    """Let a model train with `RMSNorm`: its parameters and their names stay."""
    decoder = llama.model
    for holder, name in [(layer, name) for layer in decoder.layers for name in ("input_layernorm", "post_attention_layernorm")]:
        stock = getattr(holder, name)
        setattr(holder, name, RMSNorm(stock.weight, stock.variance_epsilon))
    decoder.norm = RMSNorm(decoder.norm.weight, decoder.norm.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """Keeps the states as they came, [N, D] in their dtype, and what each row is scaled by, [N, 1] in fp32 or better."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        states_ND, normed = states.flatten(0, -2), torch.empty_like(states, memory_format=torch.contiguous_format)
        precise_D = _precise(weight_D)
        normed_ND, scale_N1 = normed.view(states_ND.shape), precise_D.new_empty(len(states_ND), 1)
        for row in _rows(states_ND):
            part_RD = _precise(states_ND[row])
            scale_N1[row] = part_RD.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
            normed_ND[row] = (part_RD * scale_N1[row]).mul_(precise_D)
        ctx.save_for_backward(states_ND, weight_D, scale_N1)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_normed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states_ND, weight_D, scale_N1 = ctx.saved_tensors
        by_normed_ND, by_states_ND = by_normed.reshape(states_ND.shape), torch.empty_like(states_ND)
        precise_D = _precise(weight_D)
        by_weight_D = torch.zeros_like(precise_D)
        for row in _rows(states_ND):
            unit_RD, by_RD = states_ND[row] * scale_N1[row], _precise(by_normed_ND[row])
            by_weight_D += (unit_RD * by_RD).sum(dim=0)
            by_RD = by_RD * precise_D
            along_R1 = (unit_RD * by_RD).mean(dim=-1, keepdim=True)
            by_states_ND[row] = by_RD.addcmul_(unit_RD, along_R1, value=-1).mul_(scale_N1[row])
        return by_states_ND.view(by_normed.shape), by_weight_D.to(weight_D.dtype), None


def _precise(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def _rows(states_ND: torch.Tensor) -> list[slice]:
    """Slices of rows that fit a core's cache."""
    size = max(1, PASSED_AT_ONCE[states_ND.device.type] // states_ND.shape[1])
    return [slice(start, start + size) for start in range(0, len(states_ND), size)]
