"""Answers from a decoder: exactly as many tokens as a picture has, whatever the codes are.

`Decoder` runs the weights of a stock `LlamaForCausalLM` and gives the tokens that transformers' own `generate` gives, with
a fraction of the work. What several answers have in common is computed once and read once for all of them: the examples
that all prompts of a batch begin with, and each prompt under the answers drawn to it. One reading of the prompts serves
the loss of the true answers (`losses`), the likeliest answers (`generate`) and any number of random ones (`draw`).

Keys and values lie in a chain of segments [L, 2, S, G, T, E]: of S sequences, the T tokens that follow the segments before.
The R rows of what comes after share them in S equal blocks, in order. So a batch is a chain of the examples (S = 1), the
rest of the prompts (S = B) and K answers to each (S = B K).

No code is special: there is no end token and no padding. Prompts of one call are of one length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lvm_ray.model.attention import causal_attention
from lvm_ray.model.shape import Shape, of_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers.models.llama.modeling_llama import LlamaForCausalLM

SHORTEST = 32  # tokens of a prefix that is read apart: the calls of a shorter one cost about what they save


class Layer(NamedTuple):
    """One block's weights as (weight, bias) pairs, the matrices that read the same input joined."""

    attention_norm: torch.Tensor
    query_key_value: tuple[torch.Tensor, torch.Tensor | None]
    attention_output: tuple[torch.Tensor, torch.Tensor | None]
    mlp_norm: torch.Tensor
    gate_up: tuple[torch.Tensor, torch.Tensor | None]
    mlp_output: tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Prompt:
    """Prompts that were read: the chain of their keys and values, and the logits [B, V] of their answers' first token."""

    segments: list[torch.Tensor]
    logits_BV: torch.Tensor


class Decoder:
    """The weights of a LLaMA by their stock names, made ready to answer: some joined, nothing else copied.

    With a codebook, greedy answers take the code whose *neighbourhood* is likeliest (`code_similarity`).
    """

    def __init__(self, shape: Shape, weights: Mapping[str, torch.Tensor], codebook_VE: torch.Tensor | None = None) -> None:
        self.heads, self.key_heads, self.head_width = shape.heads, shape.key_heads, shape.head_width
        self.epsilon = shape.norm_epsilon
        self.embedding = weights["model.embed_tokens.weight"]
        self.layers = [_layer(weights, f"model.layers.{number}") for number in range(shape.layers)]
        self.norm = weights["model.norm.weight"]
        self.head = weights["lm_head.weight"]
        self.device = self.embedding.device
        # In fp32 whatever the weights are in, as in training: bf16 would turn distances by up to 0.4 % further.
        exponents = torch.arange(0, shape.head_width, 2, dtype=torch.float32, device=self.device) / shape.head_width
        self.frequencies = 1.0 / shape.rope_base**exponents
        self.similarity_VV = None if codebook_VE is None else code_similarity(codebook_VE.to(self.device))
        # Tokens at once. What lies between a CPU's products is 32 MB then, which its cache and malloc hold on to.
        self.piece = 2**11 if self.device.type == "cpu" else 2**15

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> Decoder:
        """The decoder of a model that is there, as of one that trains."""
        from lvm_ray.model.export import stock_weights

        return cls(of_config(model.config.to_dict(), "model.config"), stock_weights(model))

    @torch.inference_mode()
    def read(self, prompts_BT: NDArray[np.integer] | torch.Tensor) -> Prompt:
        """Read prompts [B, T]; what all begin with is read once."""
        tokens_BT = self._tokens(prompts_BT)
        shared = _shared(tokens_BT)
        parts = [tokens_BT[:1, :shared], tokens_BT[:, shared:]] if shared >= SHORTEST else [tokens_BT]
        segments: list[torch.Tensor] = []
        for part_ST in parts:
            segment = self._segment(*part_ST.shape)
            hidden_STD = self._forward_in_pieces(part_ST, segments, segment)
            segments.append(segment)
        return Prompt(segments, self._logits(hidden_STD[:, -1]))

    @torch.inference_mode()
    def generate(self, prompt: Prompt, tokens: int) -> NDArray[np.uint16]:
        """Answers uint16 [B, tokens]: the likeliest token each time."""
        return self._answers(prompt, tokens, 1, lambda logits_BV, n: self._likeliest(logits_BV))

    @torch.inference_mode()
    def draw(self, prompt: Prompt, tokens: int, draws: int, temperature: float, seeds: Sequence[int]) -> NDArray[np.uint16]:
        """`draws` random answers to each prompt at a temperature: uint16 [B, K, tokens]. A prompt's depend on its seed alone."""
        batch = len(prompt.logits_BV)
        assert len(seeds) == batch, (len(seeds), batch)
        uniform_BKN = torch.from_numpy(np.stack([np.random.default_rng(seed).random((draws, tokens)) for seed in seeds]))
        uniform_RN = uniform_BKN.flatten(0, 1).to(self.device)
        answers_RN = self._answers(prompt, tokens, draws, lambda logits_RV, n: _choose(logits_RV, temperature, uniform_RN[:, n]))
        return answers_RN.reshape(batch, draws, tokens)

    @torch.inference_mode()
    def losses(self, prompt: Prompt, answers_BN: NDArray[np.integer]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Teacher-forced: the negative log-likelihood [B, N] in nats of each token of true answers [B, N], computed in
        fp32, and whether it was the likeliest."""
        target_BN = self._tokens(answers_BN)
        batch, tokens = target_BN.shape
        hidden_BTD = self._forward_in_pieces(target_BN[:, :-1], prompt.segments, self._segment(batch, tokens - 1))
        logits_BNV = torch.cat([prompt.logits_BV[:, None], self._logits(hidden_BTD)], dim=1)
        nll_BN = F.cross_entropy(logits_BNV.float().flatten(0, 1), target_BN.flatten(), reduction="none").view(target_BN.shape)
        return nll_BN.double().cpu().numpy(), (logits_BNV.argmax(-1) == target_BN).cpu().numpy()

    def _answers(
        self, prompt: Prompt, tokens: int, draws: int, choose: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> NDArray[np.uint16]:
        """Answers uint16 [R, tokens], `draws` to each prompt side by side, token n of each as chosen by its logits [R, V]."""
        logits_RV = prompt.logits_BV.repeat_interleave(draws, dim=0)
        own = self._segment(len(logits_RV), tokens)
        answers_RN = torch.empty((len(logits_RV), tokens), dtype=torch.long, device=self.device)
        for n in range(tokens):
            if n:
                logits_RV = self._logits(self._forward(answers_RN[:, n - 1 : n], prompt.segments, own, n - 1)[:, -1])
            answers_RN[:, n] = choose(logits_RV, n)
        return answers_RN.cpu().numpy().astype(np.uint16)

    def _likeliest(self, logits_BV: torch.Tensor) -> torch.Tensor:
        if self.similarity_VV is None:
            return logits_BV.argmax(-1)
        return (logits_BV.float().softmax(-1) @ self.similarity_VV).argmax(-1)

    def _tokens(self, tokens: NDArray[np.integer] | torch.Tensor) -> torch.Tensor:
        if not isinstance(tokens, torch.Tensor):
            tokens = torch.from_numpy(tokens.astype(np.int64))
        return tokens.to(self.device, torch.long)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(_rms_norm(hidden, self.norm, self.epsilon), self.head)

    def _segment(self, sequences: int, tokens: int) -> torch.Tensor:
        """Room for the keys and values of so many tokens of so many sequences."""
        shape = (len(self.layers), 2, sequences, self.key_heads, tokens, self.head_width)
        return torch.empty(shape, dtype=self.embedding.dtype, device=self.device)

    def _forward_in_pieces(self, tokens_BT: torch.Tensor, past: Sequence[torch.Tensor], own: torch.Tensor) -> torch.Tensor:
        """`_forward`, some rows at a time. A segment of `past` is either all rows' or has a sequence for each."""
        rows = max(1, self.piece // tokens_BT.shape[1])
        hidden = []
        for start in range(0, len(tokens_BT), rows):
            part = slice(start, start + rows)
            before = [segment if segment.shape[2] == 1 else segment[:, :, part] for segment in past]
            hidden.append(self._forward(tokens_BT[part], before, own[:, :, part]))
        return torch.cat(hidden)

    def _forward(self, tokens_BT: torch.Tensor, past: Sequence[torch.Tensor], own: torch.Tensor, known: int = 0) -> torch.Tensor:
        """Hidden states [B, T, D] before the last norm of tokens that follow the segments `past` and the first `known` tokens
        of the segment `own`, which gets their keys and values."""
        hidden_BTD = F.embedding(tokens_BT, self.embedding)
        batch, length, _ = hidden_BTD.shape
        end = known + length
        start = sum(segment.shape[4] for segment in past) + known
        cos, sin = self._rotation(start, start + length)
        for number, layer in enumerate(self.layers):
            joined = F.linear(_rms_norm(hidden_BTD, layer.attention_norm, self.epsilon), *layer.query_key_value)
            joined = joined.view(batch, length, self.heads + 2 * self.key_heads, -1).transpose(1, 2)
            rotated = _rotate(joined[:, : self.heads + self.key_heads], cos, sin)
            own[number, 0, :, :, known:end] = rotated[:, self.heads :]
            own[number, 1, :, :, known:end] = joined[:, self.heads + self.key_heads :]
            seen = _attend(rotated[:, : self.heads], [*(one[number] for one in past), own[number, ..., :end, :]])
            seen = seen.transpose(1, 2).reshape(batch, length, -1)
            hidden_BTD = hidden_BTD + F.linear(seen, *layer.attention_output)
            gate, up = F.linear(_rms_norm(hidden_BTD, layer.mlp_norm, self.epsilon), *layer.gate_up).chunk(2, -1)
            hidden_BTD = hidden_BTD + F.linear(F.silu(gate) * up, *layer.mlp_output)
        return hidden_BTD

    def _rotation(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines [T, E] of positions start..end."""
        angles = torch.arange(start, end, device=self.device)[:, None].float() * self.frequencies
        cos, sin = angles.cos().to(self.embedding.dtype), angles.sin().to(self.embedding.dtype)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def code_similarity(codebook_VE: torch.Tensor) -> torch.Tensor:
    """How much one code may stand for another: a Gaussian of their distance, as wide as a code is from its nearest: [V, V].

    A codebook splits what looks alike over many codes. The likeliest single code can then be one that nothing resembles (the
    black of a background) while most of the probability lies on a group of neighbours. The answer with the largest expected
    similarity is the minimum-risk choice; it depends on the codebook alone and has nothing to tune.
    """
    away_VV = torch.cdist(codebook_VE.float(), codebook_VE.float()).square()
    others_VV = away_VV + torch.diag(torch.full((len(away_VV),), torch.inf, device=away_VV.device))
    return torch.exp(-away_VV / (2 * others_VV.min(dim=1).values.mean().clamp(min=1e-12)))


def generate(model: LlamaForCausalLM, prompts_BT: NDArray[np.integer] | torch.Tensor, tokens: int) -> NDArray[np.uint16]:
    """Greedy answers uint16 [B, tokens] to prompts [B, T] of one length."""
    decoder = Decoder.of(model)
    return decoder.generate(decoder.read(prompts_BT), tokens)


@torch.inference_mode()
def _layer(weights: Mapping[str, torch.Tensor], block: str) -> Layer:
    def joined(part: str, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and bias of one linear layer that does the work of several on the same input."""
        places = [f"{block}.{part}.{name}_proj" for name in names]
        biases = [weights[f"{place}.bias"] for place in places if f"{place}.bias" in weights]
        return _cat([weights[f"{place}.weight"] for place in places]), _cat(biases) if biases else None

    return Layer(
        weights[f"{block}.input_layernorm.weight"],
        joined("self_attn", "q", "k", "v"),
        joined("self_attn", "o"),
        weights[f"{block}.post_attention_layernorm.weight"],
        joined("mlp", "gate", "up"),
        joined("mlp", "down"),
    )


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.rms_norm(hidden, weight.shape, weight, epsilon)


def _rotate(heads_BHTE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """Rotary positions: the sine comes with its sign, so that the two halves only change places."""
    low, high = heads_BHTE.chunk(2, -1)
    swapped = torch.cat([high, low], dim=-1)
    return torch.addcmul(heads_BHTE * cos_TE, swapped, sin_TE)


def _shared(tokens_BT: torch.Tensor) -> int:
    """With how many tokens all prompts begin alike: of one prompt none, of others at most all but the last."""
    batch, length = tokens_BT.shape
    return int((tokens_BT == tokens_BT[:1]).all(0)[: length - 1].cumprod(0).sum()) if batch > 1 else 0


def _attend(query_RHTE: torch.Tensor, segments: list[torch.Tensor]) -> torch.Tensor:
    """Attention [R, H, T, E] of the last T tokens of each row to all before them and to themselves. One layer's segments
    [2, S, G, T, E] hold all their keys and values; those of the last T stand at its end."""
    rows, heads, length, _ = query_RHTE.shape
    if length == 1:
        return _attend_by_one(query_RHTE, segments)
    if len(segments) == 1 and not _in_blocks(query_RHTE):
        keys, values = segments[0]
        grouped = keys.shape[1] != heads
        return F.scaled_dot_product_attention(query_RHTE, keys, values, is_causal=True, enable_gqa=grouped)
    # Kernels take keys in one piece. A row at a time is joined, so that no row's copy of what is shared outlives it.
    attended, seen_TP = torch.empty_like(query_RHTE), None
    if not _in_blocks(query_RHTE):
        positions = sum(segment.shape[3] for segment in segments)
        seen_TP = torch.ones(length, positions, dtype=torch.bool, device=query_RHTE.device).tril(positions - length)
    for row in range(rows):
        keys, values = torch.cat([segment[:, row * segment.shape[1] // rows] for segment in segments], dim=2)
        attended[row] = _attend_alone(query_RHTE[row], keys, values, seen_TP)
    return attended


def _in_blocks(query: torch.Tensor) -> bool:
    """Whether blocks of plain products serve these queries better than torch's kernel."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


def _attend_alone(
    query_HTE: torch.Tensor, keys_GPE: torch.Tensor, values_GPE: torch.Tensor, seen_TP: torch.Tensor | None
) -> torch.Tensor:
    """The same of one row [H, T, E], by torch's kernel where it is told which keys are seen."""
    heads, _, width = query_HTE.shape
    groups = len(keys_GPE)
    if seen_TP is None:
        keys, values = (states.repeat_interleave(heads // groups, dim=0) for states in (keys_GPE, values_GPE))
        return causal_attention(query_HTE, keys, values, 1 / math.sqrt(width), keep=False)
    query, keys, values = (states[None] for states in (query_HTE, keys_GPE, values_GPE))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen_TP, enable_gqa=heads != groups)[0]


def _attend_by_one(query_RH1E: torch.Tensor, segments: list[torch.Tensor]) -> torch.Tensor:
    """The same of one token a row. Reading keys and values is what a step waits for: those that rows share, one product reads
    for all of them."""
    rows, heads, _, width = query_RH1E.shape
    groups = segments[0].shape[2]
    query_RGME = query_RH1E.view(rows, groups, heads // groups, width) / math.sqrt(width)
    scores = [_of_rows(_of_sequences(query_RGME, len(keys)) @ keys.transpose(2, 3), rows) for keys, _ in segments]
    weights = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.float32).to(query_RGME.dtype)
    parts = torch.split(weights, [segment.shape[3] for segment in segments], dim=-1)
    seen_RGME = [
        _of_rows(_of_sequences(part, len(values)) @ values, rows) for part, (_, values) in zip(parts, segments, strict=True)
    ]
    return reduce(torch.add, seen_RGME).reshape(query_RH1E.shape)


def _of_sequences(values_RGMX: torch.Tensor, sequences: int) -> torch.Tensor:
    """What rows have, beside each other where they share a sequence: [R, G, M, X] -> [S, G, R / S M, X]."""
    rows, groups, heads, width = values_RGMX.shape
    if sequences == rows:
        return values_RGMX
    apart = values_RGMX.reshape(sequences, rows // sequences, groups, heads, width)
    return apart.transpose(1, 2).flatten(2, 3)


def _of_rows(values_SGNX: torch.Tensor, rows: int) -> torch.Tensor:
    """Back: [S, G, R / S M, X] -> [R, G, M, X]."""
    sequences, groups, _, width = values_SGNX.shape
    if sequences == rows:
        return values_SGNX
    apart = values_SGNX.view(sequences, groups, rows // sequences, -1, width)
    return apart.transpose(1, 2).flatten(0, 1)


def _choose(logits_BV: torch.Tensor, temperature: float, uniform_B: torch.Tensor) -> torch.Tensor:
    """One token per row at a temperature, by the inverse of the cumulative distribution at uniform draws in [0, 1)."""
    cumulative_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    point_B1 = uniform_B.to(cumulative_BV.device)[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[1] - 1)
