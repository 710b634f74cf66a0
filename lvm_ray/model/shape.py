"""The shape of a LLaMA: what a stock config.json says, and the weights that a model of it has.

Read without transformers, whose import takes longer than a small model's answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvm_ray.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers.models.llama.configuration_llama import LlamaConfig

Tensors = dict[str, "torch.Tensor"]
Shapes = dict[str, tuple[int, ...]]

COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MOST = 2**20  # of anything that a config.json counts
LARGEST = 1e30  # of its other numbers
TOKENS, ROPE_BASE, NORM_EPSILON = 2048, 10000.0, 1e-6  # where a config.json does not say: LLaMA's


@dataclass(frozen=True)
class Shape:
    """A stock LLaMA without ties between its weights, with the default rotary positions. `tokens`: of its longest input."""

    codes: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    mlp: int
    tokens: int
    norm_epsilon: float
    rope_base: float
    attention_bias: bool
    mlp_bias: bool

    def config(self) -> LlamaConfig:
        """The stock configuration: what `config.json` of an exported model says. No token is special."""
        from transformers.models.llama.configuration_llama import LlamaConfig

        return LlamaConfig(
            vocab_size=self.codes,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_width,
            max_position_embeddings=self.tokens,
            rms_norm_eps=self.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_base},
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            use_cache=True,
        )

    def weights(self) -> Shapes:
        """Every weight by its stock name, and its shape."""
        queries, keys = self.heads * self.head_width, self.key_heads * self.head_width
        attention = {"q": (queries, self.width), "k": (keys, self.width), "v": (keys, self.width), "o": (self.width, queries)}
        mlp = {"gate": (self.mlp, self.width), "up": (self.mlp, self.width), "down": (self.width, self.mlp)}
        shapes: Shapes = {"model.embed_tokens.weight": (self.codes, self.width)}
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            for part, matrices, bias in (("self_attn", attention, self.attention_bias), ("mlp", mlp, self.mlp_bias)):
                for name, shape in matrices.items():
                    shapes[f"{block}.{part}.{name}_proj.weight"] = shape
                    if bias:
                        shapes[f"{block}.{part}.{name}_proj.bias"] = shape[:1]
            shapes[f"{block}.input_layernorm.weight"] = shapes[f"{block}.post_attention_layernorm.weight"] = (self.width,)
        return shapes | {"model.norm.weight": (self.width,), "lm_head.weight": (self.codes, self.width)}


def of_config(content: Mapping[str, Any], place: Path | str) -> Shape:
    """The shape that the content of a config.json describes.

    Raises UserError, beginning with `place` and naming the field, where a value is none and where the model is no plain LLaMA.
    """
    require_counts(content, COUNTS, place)
    width, heads = content["hidden_size"], content["num_attention_heads"]
    for key, known in (("hidden_act", "silu"), ("rope_scaling", None), ("tie_word_embeddings", False)):
        if content.get(key) not in (known, None):
            raise UserError(f"{place}: {key} is {json.dumps(content[key])}, only {json.dumps(known)} is known")
    if width % heads or (width // heads) % 2:
        raise UserError(f"{place}: {heads} heads do not share out a width of {width} in even parts")
    numbers = {"num_key_value_heads": heads, "head_dim": width // heads, "max_position_embeddings": TOKENS}
    numbers |= {key: content[key] for key in numbers if content.get(key) is not None}
    require_counts(numbers, tuple(numbers), place)
    if heads % numbers["num_key_value_heads"]:
        raise UserError(f"{place}: {heads} heads do not share num_key_value_heads {numbers['num_key_value_heads']} evenly")
    if numbers["head_dim"] % 2:
        raise UserError(f"{place}: head_dim is {numbers['head_dim']}: rotary positions want an even number")
    return Shape(
        codes=content["vocab_size"],
        width=width,
        layers=content["num_hidden_layers"],
        heads=heads,
        key_heads=numbers["num_key_value_heads"],
        head_width=numbers["head_dim"],
        mlp=content["intermediate_size"],
        tokens=numbers["max_position_embeddings"],
        norm_epsilon=_positive("rms_norm_eps", content.get("rms_norm_eps"), NORM_EPSILON, place),
        rope_base=_rope_base(content, place),
        attention_bias=truth("attention_bias", content, place),
        mlp_bias=truth("mlp_bias", content, place),
    )


def _rope_base(content: Mapping[str, Any], place: Path | str) -> float:
    rope = content.get("rope_parameters")
    if rope is None:
        return _positive("rope_theta", content.get("rope_theta"), ROPE_BASE, place)
    # Every other key scales positions in some way, and so does another type under either of its two names.
    kinds = ("rope_type", "type")
    plain = (
        isinstance(rope, dict)
        and rope.keys() <= {*kinds, "rope_theta"}
        and all(rope.get(kind, "default") == "default" for kind in kinds)
    )
    if not plain:
        raise UserError(f"{place}: rope_parameters is {json.dumps(rope)}, only the default rotary positions are known")
    return _positive("rope_theta", rope.get("rope_theta", content.get("rope_theta")), ROPE_BASE, place)


def require_counts(content: Mapping[str, Any], keys: tuple[str, ...], place: Path | str) -> None:
    """Raises UserError where one of these numbers of a config.json is no count."""
    for key in keys:
        if type(content.get(key)) is not int or not 1 <= content[key] <= MOST:
            raise UserError(f"{place}: {key} is {json.dumps(content.get(key))}, expected a whole number from 1 to {MOST:,}")


def _positive(key: str, value: Any, default: float, place: Path | str) -> float:
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value < LARGEST:
        raise UserError(f"{place}: {key} is {json.dumps(value)}, expected a number above 0")
    return float(value)


def truth(key: str, content: Mapping[str, Any], place: Path | str) -> bool:
    """What a config.json says of this, no where it says nothing. Raises UserError where that is neither true nor false."""
    value = content.get(key)
    if value is not None and type(value) is not bool:
        raise UserError(f"{place}: {key} is {json.dumps(value)}, expected true or false")
    return bool(value)


def require_names(found: Mapping[str, object], wanted: Mapping[str, object], place: Path) -> None:
    """Raises UserError, with the name, where a weight is lacking or left over."""
    for names, what in ((wanted.keys() - found.keys(), "lacks the"), (found.keys() - wanted.keys(), "has an unknown")):
        if names:
            raise UserError(
                f"{place}: {what} weight {min(names)} ({len(names)} such): this is not a model of its kind, or not whole"
            )


def require_shapes(found: Tensors, wanted: Shapes, place: Path) -> None:
    """Raises UserError, with the name, where a weight is lacking, left over, of another shape or of whole numbers."""
    require_names(found, wanted, place)
    for name, shape in wanted.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{place}: {name} has shape {list(tensor.shape)}, expected {list(shape)}: this is not a whole model")
        if not tensor.is_floating_point():
            raise UserError(f"{place}: {name} holds numbers of {tensor.dtype}, expected floating ones: this is not a plain model")
