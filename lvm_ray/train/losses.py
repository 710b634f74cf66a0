"""What training minimises: cross-entropy, and distillation from a teacher (paper section 4).

    loss = sum over tokens of weight x (CE + strength x T^2 x KL(teacher || student)) / sum of weights

A label picture's token weighs 1, an image's `image_weight`; the sentence's first token is predicted from nothing and does
not count. All sentences have one shape, so the sum of weights over a global batch is a constant of the recipe: every
micro batch of every worker is normalised by its equal part of it, and the mean over them is exact. Where tasks have weights of
their own (`balance.weights`), a sentence's weight multiplies its tokens'; those weights are 1 in the mean of the plan's rows,
so the sum stays the recipe's constant in expectation, for both terms alike.

`TrainingModule` is the one module that DeepSpeed wraps: ZeRO-3 gathers weights only inside the wrapped module's forward, so
decoder, head and loss all run there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaForCausalLM

# Logits held at once, student's and teacher's each. Beyond it they are computed in chunks and again for the gradient.
LOGITS_AT_ONCE = 2**25


class Losses(NamedTuple):
    """What one micro batch gives.

    loss       scalar, what is differentiated
    ce, kd     scalars: the weighted means of its two terms (kd 0 without a teacher)
    target_B   mean cross-entropy of each sentence's label tokens
    """

    loss: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor
    target_B: torch.Tensor


def token_weights(tokens: int, image_tokens: int, image_weight: float) -> torch.Tensor:
    """Weight of predicting tokens 1..T-1 of a sentence image, label, image, label, ...: float32 [T - 1]."""
    assert tokens % (2 * image_tokens) == 0, (tokens, image_tokens)
    label_T = torch.arange(tokens) // image_tokens % 2 == 1
    return torch.where(label_T, 1.0, image_weight)[1:]


def cross_entropy(logits_PV: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats: [P], at least in float32."""
    return F.cross_entropy(_precise(logits_PV), targets_P, reduction="none")


def distillation(student_PV: torch.Tensor, teacher_PV: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of the distributions at temperature T, per position: [P]. The teacher gets no gradient."""
    student_log = F.log_softmax(_precise(student_PV) / temperature, dim=-1)
    teacher_log = F.log_softmax(_precise(teacher_PV.detach()) / temperature, dim=-1)
    return temperature**2 * (teacher_log.exp() * (teacher_log - student_log)).sum(dim=-1)


class TrainingModule(nn.Module):
    """A student with its loss. forward(tokens int64 [B, T], weights float [B], even bool [B]) -> Losses of one micro batch.

    weights_B are those of the sentences in the loss, 1 each where there are none; `target_B` is never weighted. even_B says
    which sentences are no pairs (unlabelled images, video), where there are any (`even`): all of their tokens weigh the same, a
    sentence as much as one of pairs, and all of them are its targets.
    The teacher is one more model, already frozen: it is not registered, so that nothing moves, shards, optimises or saves it. In
    eval mode it is not asked.
    """

    def __init__(
        self,
        student: LlamaForCausalLM,
        tokens: int,
        image_tokens: int,
        image_weight: float,
        teacher: LlamaForCausalLM | None = None,
        temperature: float = 1.0,
        strength: float = 0.0,
        even: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self.tokens = tokens
        self.temperature = temperature
        self.strength = strength
        weights = token_weights(tokens, image_tokens, image_weight)
        # Only positions that count get logits: without image tokens that halves the head's work.
        places = torch.arange(len(weights)) if even else weights.nonzero().flatten()
        self.total = weights.double().sum().item()
        # Plain attributes: as buffers they would be rounded to bf16 with the module.
        self._places_S = places
        self._weights_S = weights[places]
        self._label_S = (places + 1) // image_tokens % 2 == 1

    def forward(
        self, tokens_BT: torch.Tensor, weights_B: torch.Tensor | None = None, even_B: torch.Tensor | None = None
    ) -> Losses:
        batch, tokens = tokens_BT.shape
        assert tokens == self.tokens, f"a sentence of {tokens} tokens, {self.tokens} wanted: the sum of weights would differ"
        targets_P = tokens_BT[:, self._places_S + 1].flatten()
        student_PD = self._hidden(self.student, tokens_BT)
        teacher, teacher_PD = self.teacher, None
        if teacher is not None and self.training:
            with torch.no_grad():
                teacher_PD = self._hidden(teacher, tokens_BT)
        ce_P, kd_P = self._token_losses(student_PD, teacher_PD, targets_P)
        weights_P, label_P = self._weights_S.repeat(batch), self._label_S.repeat(batch)
        if even_B is not None:
            even_P = even_B.repeat_interleave(len(self._weights_S))
            weights_P = torch.where(even_P, self.total / len(self._weights_S), weights_P)
            label_P = label_P | even_P
        if weights_B is not None:
            weights_P = weights_P * weights_B.repeat_interleave(len(self._weights_S))
        total = batch * self.total
        ce, kd = (weights_P * ce_P).sum() / total, (weights_P * kd_P).sum() / total
        label_BS = label_P.view(batch, -1)
        target_B = (ce_P.detach().view(batch, -1) * label_BS).sum(dim=1) / label_BS.sum(dim=1)
        return Losses(ce + self.strength * kd, ce.detach(), kd.detach(), target_B)

    @property
    def teacher(self) -> LlamaForCausalLM | None:
        return self._teacher[0]

    def _hidden(self, model: LlamaForCausalLM, tokens_BT: torch.Tensor) -> torch.Tensor:
        """The last hidden states at the positions that count: [B x S, D]."""
        hidden_BTD: torch.Tensor = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        return hidden_BTD[:, self._places_S].flatten(0, 1)

    def _token_losses(
        self, student_PD: torch.Tensor, teacher_PD: torch.Tensor | None, targets_P: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and distillation per position, in chunks of at most `LOGITS_AT_ONCE` logits."""
        chunk = max(1, LOGITS_AT_ONCE // self.student.config.vocab_size)
        if len(targets_P) <= chunk:
            return self._chunk_losses(student_PD, teacher_PD, targets_P)
        parts = []
        for start in range(0, len(targets_P), chunk):
            place = slice(start, start + chunk)
            arguments = (student_PD[place], None if teacher_PD is None else teacher_PD[place], targets_P[place])
            parts.append(checkpoint(self._chunk_losses, *arguments, use_reentrant=False, preserve_rng_state=False))
        ce, kd = zip(*parts, strict=True)
        return torch.cat(ce), torch.cat(kd)

    def _chunk_losses(
        self, student_PD: torch.Tensor, teacher_PD: torch.Tensor | None, targets_P: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        student_PV = self.student.lm_head(student_PD)
        ce_P = cross_entropy(student_PV, targets_P)
        teacher = self.teacher
        if teacher is None or teacher_PD is None:
            return ce_P, torch.zeros_like(ce_P)
        with torch.no_grad():
            teacher_PV = teacher.lm_head(teacher_PD)
        return ce_P, distillation(student_PV, teacher_PV, self.temperature)


def _precise(logits_PV: torch.Tensor) -> torch.Tensor:
    """bf16 logits as fp32: sums over a vocabulary need the bits."""
    return logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
