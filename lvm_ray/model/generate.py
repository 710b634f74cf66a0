"""Answers from a decoder: exactly as many tokens as a picture has, whatever the codes are.

`Decoder` runs the weights of a stock `LlamaForCausalLM` over a preallocated cache of keys and values. It gives the
tokens that transformers' own `generate` gives, with a fraction of the calls: a tiny model on a CPU spends most of its
time between the operations, not in them. One reading of the prompt serves the loss of the true answer (`losses`),
the likeliest answer (`generate`) and any number of random ones (`draw`).

No code is special: there is no end token, no padding and no mask. Prompts of one call are of one length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM


class Layer(NamedTuple):
    """One block's weights as (weight, bias) pairs, the matrices that read the same input joined."""

    attention_norm: torch.Tensor
    query_key_value: tuple[torch.Tensor, torch.Tensor | None]
    attention_output: tuple[torch.Tensor, torch.Tensor | None]
    mlp_norm: torch.Tensor
    gate_up: tuple[torch.Tensor, torch.Tensor | None]
    mlp_output: tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class Prompt:
    """A prompt that was read: its keys and values, with room for an answer, and the logits of the answer's first token."""

    keys: list[torch.Tensor]  # one [B, H, T, E] a layer
    values: list[torch.Tensor]
    length: int
    logits_BV: torch.Tensor


# One layer's attention: (layer, queries [B, H, T, E], keys and values [B, G, T, E] of the same tokens) -> [B, H, T, E].
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Decoder:
    """A `LlamaForCausalLM` made ready to answer: weights joined, nothing copied that need not be.

    With a codebook, greedy answers take the code whose *neighbourhood* is likeliest (`code_similarity`).
    """

    def __init__(self, model: LlamaForCausalLM, codebook_VE: torch.Tensor | None = None) -> None:
        config: Any = model.config
        assert config.hidden_act == "silu", config.hidden_act
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_width: int = config.head_dim or config.hidden_size // self.heads
        self.epsilon: float = config.rms_norm_eps
        embedding: Any = model.model.embed_tokens  # a plain table, or that of a model that trains
        self.embedding: torch.Tensor = embedding.weight if hasattr(embedding, "weight") else embedding.table().detach()
        self.rotary = model.model.rotary_emb
        self.layers = [_layer(block) for block in model.model.layers]
        self.norm: torch.Tensor = model.model.norm.weight
        self.head: torch.Tensor = model.lm_head.weight
        self.device = self.embedding.device
        self.similarity_VV = None if codebook_VE is None else code_similarity(codebook_VE.to(self.device))
        # Attention over a bf16 cache takes three to six times as long as over fp32 on a CPU, one query at a time.
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else self.embedding.dtype

    @torch.inference_mode()
    def read(self, prompts_BT: NDArray[np.integer] | torch.Tensor, room: int) -> Prompt:
        """Read prompts [B, T] and leave room for answers of `room` tokens."""
        tokens_BT = self._tokens(prompts_BT)
        batch, length = tokens_BT.shape
        shape = (batch, self.key_heads, length + room, self.head_width)
        empty = [torch.empty(shape, dtype=self.cache_dtype, device=self.device) for _ in range(2 * len(self.layers))]
        prompt = Prompt(empty[0::2], empty[1::2], 0, torch.empty(0))
        hidden_BTD = self._forward(tokens_BT, 0, _after(prompt, 0))
        prompt.length = length
        prompt.logits_BV = self._logits(hidden_BTD[:, -1])
        return prompt

    @torch.inference_mode()
    def generate(self, prompt: Prompt, tokens: int) -> NDArray[np.uint16]:
        """Answers uint16 [B, tokens]: the likeliest token each time."""
        answers_BN = torch.empty((len(prompt.logits_BV), tokens), dtype=torch.long, device=self.device)
        logits_BV = prompt.logits_BV
        for n in range(tokens):
            if n:
                start = prompt.length + n - 1
                logits_BV = self._logits(self._forward(answers_BN[:, n - 1 : n], start, _after(prompt, start))[:, -1])
            answers_BN[:, n] = self._likeliest(logits_BV)
        return answers_BN.cpu().numpy().astype(np.uint16)

    @torch.inference_mode()
    def draw(self, prompt: Prompt, tokens: int, draws: int, temperature: float, seeds: Sequence[int]) -> NDArray[np.uint16]:
        """`draws` random answers to each prompt at a temperature: uint16 [B, K, tokens]. A prompt's depend on its seed alone.

        All answers to a prompt share its keys and values, which are read once for all of them.
        """
        batch = len(prompt.logits_BV)
        assert len(seeds) == batch, (len(seeds), batch)
        uniform_BKN = torch.from_numpy(np.stack([np.random.default_rng(seed).random((draws, tokens)) for seed in seeds]))
        uniform_RN = uniform_BKN.flatten(0, 1).to(self.device)
        shape = (batch, self.key_heads, draws, tokens, self.head_width)
        own = [torch.empty(shape, dtype=self.cache_dtype, device=self.device) for _ in range(2 * len(self.layers))]
        answers_RN = torch.empty((batch * draws, tokens), dtype=torch.long, device=self.device)
        logits_RV = prompt.logits_BV.repeat_interleave(draws, dim=0)
        for n in range(tokens):
            if n:
                attend = _branched(prompt, own[0::2], own[1::2], n - 1)
                logits_RV = self._logits(self._forward(answers_RN[:, n - 1 : n], prompt.length + n - 1, attend)[:, -1])
            answers_RN[:, n] = _choose(logits_RV, temperature, uniform_RN[:, n])
        return answers_RN.view(batch, draws, tokens).cpu().numpy().astype(np.uint16)

    @torch.inference_mode()
    def losses(self, prompt: Prompt, answers_BN: NDArray[np.integer]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Teacher-forced: the negative log-likelihood [B, N] in nats of each token of true answers [B, N], computed in
        fp32, and whether it was the likeliest."""
        target_BN = self._tokens(answers_BN)
        hidden_BTD = self._forward(target_BN[:, :-1], prompt.length, _after(prompt, prompt.length))
        logits_BNV = torch.cat([prompt.logits_BV[:, None], self._logits(hidden_BTD)], dim=1)
        nll_BN = F.cross_entropy(logits_BNV.float().flatten(0, 1), target_BN.flatten(), reduction="none").view(target_BN.shape)
        return nll_BN.double().cpu().numpy(), (logits_BNV.argmax(-1) == target_BN).cpu().numpy()

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

    def _forward(self, tokens_BT: torch.Tensor, start: int, attend: Attend) -> torch.Tensor:
        """Hidden states [B, T, D] before the last norm of tokens at positions start.. ."""
        hidden_BTD = F.embedding(tokens_BT, self.embedding)
        batch, length, _ = hidden_BTD.shape
        cos, sin = self._rotation(start, start + length)
        for number, layer in enumerate(self.layers):
            joined = F.linear(_rms_norm(hidden_BTD, layer.attention_norm, self.epsilon), *layer.query_key_value)
            joined = joined.view(batch, length, self.heads + 2 * self.key_heads, -1).transpose(1, 2)
            rotated = _rotate(joined[:, : self.heads + self.key_heads].to(self.cache_dtype), cos, sin)
            value = joined[:, self.heads + self.key_heads :].to(self.cache_dtype)
            seen = attend(number, rotated[:, : self.heads], rotated[:, self.heads :], value)
            seen = seen.to(hidden_BTD.dtype).transpose(1, 2).reshape(batch, length, -1)
            hidden_BTD = hidden_BTD + F.linear(seen, *layer.attention_output)
            gate, up = F.linear(_rms_norm(hidden_BTD, layer.mlp_norm, self.epsilon), *layer.gate_up).chunk(2, -1)
            hidden_BTD = hidden_BTD + F.linear(F.silu(gate) * up, *layer.mlp_output)
        return hidden_BTD

    def _rotation(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines [T, E] of positions start..end."""
        positions = torch.arange(start, end, device=self.device)[None]
        cos, sin = self.rotary(torch.empty(0, dtype=self.cache_dtype, device=self.device), positions)
        half = sin.shape[-1] // 2
        return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)


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
    decoder = Decoder(model)
    return decoder.generate(decoder.read(prompts_BT, tokens), tokens)


def _layer(block: Any) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        block.input_layernorm.weight,
        _join(attention.q_proj, attention.k_proj, attention.v_proj),
        _join(attention.o_proj),
        block.post_attention_layernorm.weight,
        _join(mlp.gate_proj, mlp.up_proj),
        _join(mlp.down_proj),
    )


@torch.inference_mode()
def _join(*linears: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias of one linear layer that does the work of several on the same input."""
    if len(linears) == 1:
        return linears[0].weight, linears[0].bias
    biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat([linear.weight for linear in linears]), torch.cat(biases) if biases else None


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.rms_norm(hidden, weight.shape, weight, epsilon)


def _rotate(heads_BHTE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """Rotary positions: the sine comes with its sign, so that the two halves only change places."""
    low, high = heads_BHTE.chunk(2, -1)
    swapped = torch.cat([high, low], dim=-1)
    return torch.addcmul(heads_BHTE * cos_TE, swapped, sin_TE)


def _after(prompt: Prompt, start: int) -> Attend:
    """Attention of tokens at positions start.. to all before and to each other; keys and values stay in the prompt's cache."""

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        length = query.shape[2]
        end = start + length
        keys, values = prompt.keys[layer], prompt.values[layer]
        keys[:, :, start:end], values[:, :, start:end] = key, value
        return F.scaled_dot_product_attention(
            query,
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=_later_hidden(start, length, query.device) if start and length > 1 else None,
            is_causal=not start,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    return attend


def _branched(prompt: Prompt, keys_own: list[torch.Tensor], values_own: list[torch.Tensor], n: int) -> Attend:
    """Attention of token n of K answers to each prompt: to the prompt, and each to its own tokens [B, G, K, N, E].

    One product reads the prompt's keys for all answers: they are most of what a step touches.
    """

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, values = prompt.keys[layer][:, :, : prompt.length], prompt.values[layer][:, :, : prompt.length]
        batch, groups, _, width = keys.shape
        own_keys, own_values = keys_own[layer], values_own[layer]
        answers = own_keys.shape[2]
        # Answers of one prompt that share key heads stand side by side: [B, G, K, H / G, E].
        query = query.view(batch, answers, groups, -1, width).transpose(1, 2) / math.sqrt(width)
        own_keys[:, :, :, n] = key.view(batch, answers, groups, width).transpose(1, 2)
        own_values[:, :, :, n] = value.view(batch, answers, groups, width).transpose(1, 2)
        to_prompt = (query.flatten(2, 3) @ keys.transpose(2, 3)).view(*query.shape[:4], -1)
        to_own = query @ own_keys[:, :, :, : n + 1].transpose(3, 4)
        weight = torch.cat([to_prompt, to_own], dim=-1).softmax(-1)
        seen = (weight[..., : prompt.length].flatten(2, 3) @ values).view(query.shape)
        seen = seen + weight[..., prompt.length :] @ own_values[:, :, :, : n + 1]
        return seen.transpose(1, 2).reshape(batch * answers, -1, 1, width)

    return attend


def _later_hidden(start: int, length: int, device: torch.device) -> torch.Tensor:
    """Which of start + length positions [T, S] each of the last `length` tokens sees: itself and those before it."""
    return torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)


def _choose(logits_BV: torch.Tensor, temperature: float, uniform_B: torch.Tensor) -> torch.Tensor:
    """One token per row at a temperature, by the inverse of the cumulative distribution at uniform draws in [0, 1)."""
    cumulative_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    point_B1 = uniform_B.to(cumulative_BV.device)[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[1] - 1)
