"""What training minimises: cross-entropy, and distillation from teachers (paper section 4).

    loss = sum over tokens of weight x (CE + sum over teachers of strength x T^2 x divergence(teacher, student)) / sum of weights
         + weight x mean over images of 1 - alignment(vision network, student), where there is such a network (`features.py`)

A label picture's token weighs 1, an image's `image_weight`; the sentence's first token is predicted from nothing and does
not count. All sentences have one shape, so the sum of weights over a global batch is a constant of the recipe: every
micro batch of every worker is normalised by its equal part of it, and the mean over them is exact. Where tasks have weights of
their own (`balance.weights`), a sentence's weight multiplies its tokens'; those weights are 1 in the mean of the plan's rows,
so the sum stays the recipe's constant in expectation, for all terms alike.

`TrainingModule` is the one module that DeepSpeed wraps: ZeRO-3 gathers weights only inside the wrapped module's forward, so
decoder, head and loss all run there. What happens between the last hidden states and the losses is `head.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from lvm_ray.train.features import Features, alignment
from lvm_ray.train.head import WATCHED, Answers, Head, HeadLosses, Teacher


class Losses(NamedTuple):
    """What one micro batch gives.

    loss         scalar, what is differentiated
    ce           scalar: the weighted mean of its cross-entropy
    kd           scalar: that of its distillation, a mean over the teachers by their strengths; 0 without one
    target_B     mean cross-entropy of each sentence's label tokens
    kd_NB        mean distillation from each teacher over them, by its weight of the sentence's task
    entropy_N    mean entropy of each teacher's distributions at its temperature, in nats, over some of the label tokens
    agreement_N  share of these at which the student finds no token likelier than the teacher's likeliest; nan, as is the entropy,
                 where a teacher was asked about nothing
    features     scalar: 1 - alignment with the vision network, the mean over images; 0 without one
    """

    loss: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor
    target_B: torch.Tensor
    kd_NB: torch.Tensor
    entropy_N: torch.Tensor
    agreement_N: torch.Tensor
    features: torch.Tensor


def token_weights(tokens: int, image_tokens: int, image_weight: float) -> torch.Tensor:
    """Weight of predicting tokens 1..T-1 of a sentence image, label, image, label, ...: float32 [T - 1]."""
    assert tokens % (2 * image_tokens) == 0, (tokens, image_tokens)
    label_T = torch.arange(tokens) // image_tokens % 2 == 1
    return torch.where(label_T, 1.0, image_weight)[1:]


class TrainingModule(nn.Module):
    """A student with its loss. forward(tokens int64 [B, T], weights float [B], even bool [B], ...) -> Losses of one micro batch.

    weights_B are those of the sentences in the loss, 1 each where there are none; `target_B` is never weighted. even_B says
    which sentences are no pairs (unlabelled images, video), where there are any (`even`): all of their tokens weigh the same, a
    sentence as much as one of pairs, and all of them are its targets. taught_BN are the teachers' weights of the sentences'
    tasks; a teacher is not asked about a sentence where its weight is 0. `image_weight` and strengths_N are this step's, where
    they change: the image weight that the module is made with then only says whether images' places are looked at.
    With `own_answers` the last picture is the student's own: there is no cross-entropy (nan), and nothing else counts.
    Teachers and a vision network are further models, already frozen: they are not registered, so that nothing moves, shards,
    optimises or saves them.
    In eval mode they are not asked. What teacher N without a model would say comes as `states_N` uint16 [B, S x D],
    the bits of bf16 numbers, or as sparse answers.
    """

    def __init__(
        self,
        student: LlamaForCausalLM,
        tokens: int,
        image_tokens: int,
        image_weight: float,
        teachers: Sequence[Teacher] = (),
        even: bool = False,
        features: Features | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student.lm_head, Head):
            student.lm_head = Head(student.lm_head.weight)
        self.student = student
        self.teachers = tuple(teachers)
        self.features = features
        self._layer_states: torch.Tensor | None = None  # of the layer that is compared with the vision network, in a forward
        if features is not None:
            student.model.layers[features.layer].register_forward_hook(self._keep_states)
        self.tokens = tokens
        self._image_weight, self._image_tokens = image_weight, image_tokens
        label_S = token_weights(tokens, image_tokens, 0.0) == 1
        self._labels, self._images = int(label_S.sum()), int((~label_S).sum())
        # Only positions that count get logits: without image tokens that halves the head's work.
        self._places_S = torch.arange(len(label_S)) if even or image_weight else label_S.nonzero().flatten()
        # Plain attributes: buffers would move, and round, with the module.
        self._label_S = label_S[self._places_S]
        self._last_S = self._places_S >= len(label_S) - image_tokens

    def forward(
        self,
        tokens_BT: torch.Tensor,
        weights_B: torch.Tensor | None = None,
        even_B: torch.Tensor | None = None,
        image_weight: torch.Tensor | None = None,
        strengths_N: torch.Tensor | None = None,
        taught_BN: torch.Tensor | None = None,
        own_answers: torch.Tensor | None = None,
        **states: torch.Tensor,
    ) -> Losses:
        batch, tokens = tokens_BT.shape
        assert tokens == self.tokens, f"a sentence of {tokens} tokens, {self.tokens} wanted: the sum of weights would differ"
        targets_P = tokens_BT[:, self._places_S + 1].flatten()
        places = len(self._places_S)
        of_images = self._image_weight if image_weight is None else float(image_weight)
        total = self._labels + of_images * self._images  # of one sentence
        label_P = self._label_S.to(tokens_BT.device).repeat(batch)
        weights_P = torch.where(label_P, 1.0, of_images)
        if even_B is not None:
            even_P = even_B.repeat_interleave(places)
            weights_P = torch.where(even_P, total / places, weights_P)
            label_P = label_P | even_P
        if own_answers is not None:
            total, label_P = self._image_tokens, self._last_S.to(tokens_BT.device).repeat(batch)
            weights_P = label_P.float()
        if weights_B is not None:
            weights_P = weights_P * weights_B.repeat_interleave(places)
        total = batch * total
        student_PD = self._states(self.student, tokens_BT)
        asked, answers = self.teachers if self.training else (), []
        if strengths_N is not None:
            asked = tuple(one._replace(strength=float(now)) for one, now in zip(asked, strengths_N, strict=bool(asked)))
        for number, teacher in enumerate(asked):
            taught_B = None if taught_BN is None else taught_BN[:, number]
            with torch.no_grad():
                if teacher.model is None:
                    bits_PW = states[f"states_{number}"].view(len(student_PD), -1)
                    said = bits_PW if teacher.sparse else bits_PW.view(torch.bfloat16)
                else:
                    said = self._asked_states(teacher.model, tokens_BT, taught_B)
            factor_P = None if taught_B is None else taught_B.repeat_interleave(places)
            answers.append(Answers(said if teacher.sparse else said.to(teacher.head.dtype), teacher, factor_P))
        arguments = (targets_P, weights_P, total, answers, own_answers is None, torch.is_grad_enabled())
        loss, ce_P, kd_NP, entropy_NW, agrees_NW = self.student.lm_head(student_PD, HeadLosses.apply, *arguments)
        features = self._features(tokens_BT) if self.features is not None and self.training else torch.zeros_like(loss)
        if self.features is not None:
            loss = loss + self.features.weight * features
        share_N = kd_NP.new_tensor([max(one.strength, 1e-12) for one in asked])
        kd_P = share_N @ kd_NP / share_N.sum() if asked else torch.zeros_like(ce_P)
        label_BS, watched_W = label_P.view(batch, -1), label_P[::WATCHED]
        labels_B = label_BS.sum(dim=1)
        watched_NW = watched_W.expand(len(asked), -1)
        if taught_BN is not None and asked:
            watched_NW = watched_NW & (taught_BN.T.repeat_interleave(places, dim=1)[:, ::WATCHED] > 0)
        watched_N = watched_NW.sum(dim=-1)  # 0 where a teacher was asked about nothing: what it would be is no number
        if own_answers is not None:
            ce_P = torch.full_like(ce_P, torch.nan)
        return Losses(
            loss,
            (weights_P * ce_P).sum() / total,
            (weights_P * kd_P).sum() / total,
            (ce_P.view(batch, -1) * label_BS).sum(dim=-1) / labels_B,
            (kd_NP.view(len(asked), *label_BS.shape) * label_BS).sum(dim=-1) / labels_B,
            (entropy_NW * watched_NW).sum(dim=-1) / watched_N,
            (agrees_NW * watched_NW).sum(dim=-1) / watched_N,
            features,
        )

    def _features(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """1 - alignment of the vision network's features of the images with the student's states there, the mean: a scalar."""
        assert self.features is not None and self._layer_states is not None
        tokens_PN = self._images_of(tokens_BT)
        states_PND = self._images_of(self._layer_states)
        self._layer_states = None
        return 1 - alignment(states_PND, self.features.see(tokens_PN)).mean()

    def _images_of(self, values_BT: torch.Tensor) -> torch.Tensor:
        """What belongs to the tokens of images, [B, T, ...] -> [B x pairs, image tokens, ...]."""
        batch, tokens, *rest = values_BT.shape
        images = values_BT.view(batch, tokens // self._image_tokens, self._image_tokens, *rest)[:, ::2]
        return images.flatten(0, 1)

    def _keep_states(self, layer: nn.Module, inputs: Any, states_BTD: torch.Tensor) -> None:
        self._layer_states = states_BTD

    def states(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """The student's last hidden states at the positions that count, which its head makes logits of: [B x S, D]."""
        return self._states(self.student, tokens_BT)

    def _asked_states(self, model: LlamaForCausalLM, tokens_BT: torch.Tensor, taught_B: torch.Tensor | None) -> torch.Tensor:
        """A teacher's states [B x S, D]; zeros for sentences that it is not asked about."""
        if taught_B is None or bool((taught_B > 0).all()):
            return self._states(model, tokens_BT)
        asked_A = (taught_B > 0).nonzero().flatten()
        width = int(model.config.hidden_size)
        states_BSD = model.lm_head.weight.new_zeros(len(tokens_BT), len(self._places_S), width)
        if len(asked_A):
            states_BSD[asked_A] = self._states(model, tokens_BT[asked_A]).view(len(asked_A), -1, width)
        states_PD: torch.Tensor = states_BSD.flatten(0, 1)
        return states_PD

    def _states(self, model: LlamaForCausalLM, tokens_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD: torch.Tensor = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        return hidden_BTD[:, self._places_S].flatten(0, 1)
