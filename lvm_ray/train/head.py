"""A model's head and its losses as one function, with the gradient written out (`HeadLosses`).

Going forward it computes the logits of some places, their losses and their gradient, and drops the logits for those of the next
places: no more than `LOGITS_AT_ONCE` of each model are ever held, and no product is computed twice. What happens between the
products passes over the logits many times, so it takes `PASSED_AT_ONCE` of them at a time, which stay in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from lvm_ray.estimate import LOGITS_AT_ONCE, PASSED_AT_ONCE
from lvm_ray.recipe_sections import SparseSection
from lvm_ray.train import sparse
from lvm_ray.train.divergences import Distribution, Divergence, distribution, forward_kl, of_logarithms

WATCHED = 15  # every so manieth place counts in a teacher's entropy and agreement: they would cost as much as the loss at all


class Head(nn.Module):
    """The head of a model, its weights [V, D]: last hidden states [..., D] -> logits [..., V], or whatever `function` makes of
    the states, the weights and `arguments`.

    Under ZeRO-3 the weights are whole inside their own module's forward only.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor, function: Callable[..., Any] = F.linear, *arguments: Any) -> Any:
        return function(hidden, self.weight, *arguments)


class Teacher(NamedTuple):
    """A frozen model to learn from, and how: strength x T^2 x divergence.

    model   None: its last hidden states come with the sentences, out of a cache
    head    its weights [V, D]
    sparse  what its sparse answers keep, where they come in place of hidden states
    """

    model: LlamaForCausalLM | None
    head: torch.Tensor
    strength: float = 1.0
    temperature: float = 1.0
    divergence: Divergence = forward_kl
    sparse: SparseSection | None = None


class Answers(NamedTuple):
    """A teacher's last hidden states [P, D], or its sparse answers uint16 [P, W]: its distributions, before they are computed.

    factor_P  by which each place's divergence is multiplied; None: 1 everywhere
    """

    states: torch.Tensor
    teacher: Teacher
    factor_P: torch.Tensor | None = None

    def at(self, place: slice) -> Answers:
        return self._replace(states=self.states[place], factor_P=None if self.factor_P is None else self.factor_P[place])

    def said(self) -> torch.Tensor:
        """What its distributions are made of: logits over the temperature [P, V], which the product divides by it for nothing, or
        sparse answers as they are."""
        teacher = self.teacher
        if teacher.sparse:
            return self.states
        return torch.addmm(self.states.new_zeros(1), self.states, teacher.head.T, beta=0, alpha=1 / teacher.temperature)

    def distribution(self, said: torch.Tensor, precise: torch.dtype) -> Distribution:
        """At the teacher's temperature, of the places at which it said this."""
        teacher = self.teacher
        if teacher.sparse is None:
            return distribution(said.to(precise))
        return of_logarithms(sparse.unpack(said, teacher.sparse, len(teacher.head), teacher.temperature).to(precise))


def _losses_of(
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    taught_N: Iterable[tuple[Teacher, Distribution, torch.Tensor | None]],
    with_data: bool,
    differentiate: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """Of R places: the cross-entropy [R], the distillation [R] of each teacher, and the gradient [R, V] by the logits of
    cross-entropy + sum of strength x distillation. A teacher comes with what it finds likely and each place's factor of its
    divergence; one at a time, if `taught_N` computes them."""
    student = distribution(logits_RV)
    ce_R = student.normaliser_C - logits_RV.gather(1, targets_R[:, None]).squeeze(1)
    kd_NR, gradients = [], []
    for teacher, taught, factor_R in taught_N:
        temperature = teacher.temperature
        softened = student if temperature == 1 else distribution(logits_RV, temperature)
        value_R, by_softened_RV = teacher.divergence(softened, taught)
        if factor_R is not None:
            value_R, by_softened_RV = value_R * factor_R, by_softened_RV * factor_R[:, None]
        kd_NR.append(temperature**2 * value_R)
        if differentiate:
            gradients.append((by_softened_RV, teacher.strength * temperature))
    if not differentiate:
        return ce_R, kd_NR, None
    by_logits_RV = student.probabilities_CV  # which no divergence reads any more
    if with_data:
        by_logits_RV.scatter_add_(1, targets_R[:, None], -torch.ones_like(ce_R[:, None]))
    else:
        by_logits_RV.zero_()
    for by_softened_RV, factor in gradients:
        by_logits_RV.add_(by_softened_RV, alpha=factor)
    return ce_R, kd_NR, by_logits_RV


def _losses_of_chunk(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_C: torch.Tensor,
    weights_C: torch.Tensor,
    answers: Sequence[Answers],
    first_watched: int,
    with_data: bool,
    differentiate: bool,
) -> tuple[torch.Tensor, ...]:
    """Of C places, whose logits are held until it returns: the cross-entropy [C], the distillation [N, C], of the watched places
    teachers' entropy [N, W] and agreement [N, W], and the gradients [C, D] and [V, D] by states and head, if wanted."""
    precise = weights_C.dtype
    logits_CV = hidden_CD @ weight_VD.T
    said_N = [one.said() for one in answers]
    watched = slice(first_watched, None, WATCHED)  # a small chunk may have none
    entropy_NW, agrees_NW = (weights_C.new_empty(len(answers), len(targets_C[watched])) for _ in range(2))
    for number, (one, said) in enumerate(zip(answers, said_N, strict=True)):
        # So few distributions a second time cost less than so many small calls among the rows, which also overwrite the logits.
        watched_W = one.distribution(said[watched], precise)
        entropy_NW[number] = watched_W.entropy()
        agrees_NW[number] = _agrees(logits_CV[watched], watched_W.logits_CV).to(precise)
    ce_C, kd_NC = torch.empty_like(weights_C), weights_C.new_empty(len(answers), len(weights_C))
    rows = max(1, PASSED_AT_ONCE[hidden_CD.device.type] // len(weight_VD))
    for first in range(0, len(logits_CV), rows):
        row = slice(first, first + rows)
        taught_N = (
            (one.teacher, one.distribution(said[row], precise), None if one.factor_P is None else one.factor_P[row])
            for one, said in zip(answers, said_N, strict=True)
        )
        ce_C[row], kd_NR, by_logits_RV = _losses_of(
            logits_CV[row].to(precise), targets_C[row], taught_N, with_data, differentiate
        )
        for number, kd_R in enumerate(kd_NR):
            kd_NC[number, row] = kd_R
        if by_logits_RV is not None:
            logits_CV[row] = by_logits_RV.mul_(weights_C[row, None])  # the gradient takes the logits' place
    found = ce_C, kd_NC, entropy_NW, agrees_NW
    return (*found, logits_CV @ weight_VD, logits_CV.T @ hidden_CD) if differentiate else found


def _agrees(student_CV: torch.Tensor, teacher_CV: torch.Tensor) -> torch.Tensor:
    """Where the student finds no token likelier than the one that the teacher finds the likeliest: bool [C].

    One argmax and one largest logit, and not two argmaxes: an argmax over bf16 takes longer than all else about these places.
    """
    likeliest_C1 = teacher_CV.argmax(dim=-1, keepdim=True)
    return student_CV.gather(1, likeliest_C1).squeeze(1) == student_CV.amax(dim=-1)


class HeadLosses(torch.autograd.Function):
    """(hidden [P, D], head [V, D], targets int64 [P], weights float [P], total, answers, with data, whether to differentiate)
    -> (loss, cross-entropy [P], distillation [N, P], and of places 0, WATCHED, ...: teachers' entropy [N, W], agreement [N, W]).

    loss = sum of weights x (cross-entropy + sum of strength x distillation) / total, without the cross-entropy where not `with
    data`. It has a gradient by hidden and head, and nothing else has any.
    Sums over a vocabulary are computed in float32, of float64 inputs in float64.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden_PD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_P: torch.Tensor,
        weights_P: torch.Tensor,
        total: float,
        answers: Sequence[Answers],
        with_data: bool,
        differentiate: bool,
    ) -> tuple[torch.Tensor, ...]:
        precise = torch.float64 if hidden_PD.dtype == torch.float64 else torch.float32
        places = len(targets_P)
        weights_P = weights_P.to(precise)
        ce_P = torch.empty_like(weights_P)
        kd_NP = ce_P.new_empty(len(answers), places)
        entropy_NW, agrees_NW = (ce_P.new_empty(len(answers), -(-places // WATCHED)) for _ in range(2))
        # Divided by `total` only in the end: in fp16 smaller numbers would vanish.
        by_hidden_PD, by_weight_VD = torch.empty_like(hidden_PD), torch.zeros_like(weight_VD, dtype=precise)
        chunk = max(1, LOGITS_AT_ONCE[hidden_PD.device.type] // len(weight_VD))
        for start in range(0, places, chunk):
            place = slice(start, start + chunk)
            found = _losses_of_chunk(
                hidden_PD[place],
                weight_VD,
                targets_P[place],
                weights_P[place],
                [one.at(place) for one in answers],
                -start % WATCHED,
                with_data,
                differentiate,
            )
            watched = slice(-(-start // WATCHED), -(-(start + chunk) // WATCHED))
            ce_P[place], kd_NP[:, place], entropy_NW[:, watched], agrees_NW[:, watched], *gradients = found
            if gradients:
                by_hidden_PD[place], by_head_VD = gradients
                by_weight_VD += by_head_VD
        strength_N = ce_P.new_tensor([said.teacher.strength for said in answers])
        loss = (weights_P * (with_data * ce_P + strength_N @ kd_NP)).sum() / total
        context.total = total
        context.dtype = weight_VD.dtype
        context.save_for_backward(by_hidden_PD, by_weight_VD)
        context.mark_non_differentiable(ce_P, kd_NP, entropy_NW, agrees_NW)
        return loss, ce_P, kd_NP, entropy_NW, agrees_NW

    @staticmethod
    def backward(context: Any, *by_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_hidden_PD, by_weight_VD = context.saved_tensors
        scale = by_outputs[0] / context.total
        return by_hidden_PD * scale.to(by_hidden_PD.dtype), (by_weight_VD * scale).to(context.dtype), *(None,) * 6
