"""A teacher's distribution over a vocabulary as its likeliest tokens and a few random others.

Of each place are kept the `top` likeliest tokens, `tail` tokens that are drawn out of the rest as often as the teacher finds them
likely, all with their logits, and the logarithm of the rest's sum. At temperature 1 the drawn tokens share the rest's exact
probability, so the gradient of forward KL is right in the mean. At temperature T each drawn token counts as often as it would
have been drawn then (importance weights); the sum of these is random, which biases the mean by the order of 1 / tail.

    uint16 [..., 2 x top + 2 x tail + 2]    ids of the top, bits of their bf16 logits, the same of the tail, the sum's fp32 bits
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lvm_ray.recipe_sections import SparseSection


def pack(logits_PV: torch.Tensor, section: SparseSection, seeds: Sequence[int]) -> torch.Tensor:
    """Logits of some sentences' places, as many of each, as uint16 [P, W]. A sentence's draws depend on its seed."""
    logits_PV = logits_PV.bfloat16().float()  # as they are kept, so that the parts of the distribution fit together
    top_PK, top_ids_PK = logits_PV.topk(section.top, dim=-1)
    rest_PV = logits_PV.scatter(1, top_ids_PK, -torch.inf)
    uniform = [np.random.default_rng(seed).random((len(logits_PV) // len(seeds), section.tail)) for seed in seeds]
    uniform_PK = torch.from_numpy(np.concatenate(uniform)).to(logits_PV.device)
    cumulative_PV = rest_PV.double().softmax(dim=-1).cumsum(dim=-1)
    tail_ids_PK = torch.searchsorted(cumulative_PV, uniform_PK * cumulative_PV[:, -1:], right=True)
    tail_ids_PK = tail_ids_PK.clamp(max=logits_PV.shape[1] - 1)
    numbers = [top_PK.bfloat16(), logits_PV.gather(1, tail_ids_PK).bfloat16(), rest_PV.logsumexp(dim=-1, keepdim=True)]
    top, tail, rest = (values.contiguous().view(torch.uint16) for values in numbers)
    top_ids, tail_ids = (ids_PK.to(torch.int32).to(torch.uint16) for ids_PK in (top_ids_PK, tail_ids_PK))
    return torch.cat([top_ids, top, tail_ids, tail, rest], dim=-1)


def unpack(packed_PW: torch.Tensor, section: SparseSection, codes: int, temperature: float) -> torch.Tensor:
    """Logarithms of the kept distributions at a temperature: float32 [P, V]. Tokens that are not kept have next to no chance."""
    sizes = [section.top, section.top, section.tail, section.tail, 2]
    top_ids, top, tail_ids, tail, rest = torch.split(packed_PW, sizes, dim=-1)
    top_PK, tail_PK = (bits.contiguous().view(torch.bfloat16).float() for bits in (top, tail))
    rest_P1 = rest.contiguous().view(torch.float32)
    # A draw stands for exp(z / T) over its chance to be drawn, exp(z) / rest; the rest is the mean over the draws.
    tail_weights_PK = tail_PK / temperature - tail_PK + rest_P1 - math.log(section.tail)
    chances_PK = torch.cat([top_PK / temperature, tail_weights_PK], dim=-1).softmax(dim=-1)
    ids_PK = torch.cat([top_ids, tail_ids], dim=-1).to(torch.int64)
    chances_PV = torch.zeros(len(packed_PW), codes, device=packed_PW.device).scatter_add_(1, ids_PK, chances_PK)
    return chances_PV.clamp_(min=1e-38).log_()
