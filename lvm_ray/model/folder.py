"""Models out of folders: a stock LLaMA (config.json, model.safetensors) plus `image_tokenizer.json`, as `export` writes them.

`image_tokenizer.json` says what the tokens mean:

    {"kind": "patch", "hash": codebook hash, "codes": V, "patch": 8, "size": 64, "image_tokens": N,
     "folder": tokenizer's folder, relative to this one}

(The name `tokenizer.json` is reserved by transformers.) What answers needs shape and weights (`read_model`), what trains or
teaches the model of transformers (`load_model`), which takes seconds to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lvm_ray.errors import UserError
from lvm_ray.json_file import read_object
from lvm_ray.model.shape import Shape, Tensors, of_config, require_shapes

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "image_tokenizer.json"
TOKENIZER_KEYS = ("kind", "hash", "codes", "patch", "size", "image_tokens", "folder")


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, codebook: str | None = None
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A model folder as (model in eval mode, content of `image_tokenizer.json`). Raises UserError as `read_model` does."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

    shape, weights, tokenizer = read_model(folder, dtype, codebook)
    config = shape.config()
    config._attn_implementation = "sdpa"
    # Built without storage: drawing random weights only to overwrite them takes seconds for a large model.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Its frequencies stay in fp32, as DeepSpeed leaves them in training.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.train(False)
    return model, tokenizer


def read_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, codebook: str | None = None
) -> tuple[Shape, Tensors, dict[str, Any]]:
    """A model folder as (its shape, its weights by name on the CPU, content of `image_tokenizer.json`).

    Raises UserError where a file is missing or damaged, where weights are missing, left over or of another shape than
    config.json says, and where `codebook` is given and the model's tokens are of another.
    """
    folder = Path(folder)
    tokenizer = read_tokenizer(folder)
    if codebook is not None and tokenizer["hash"] != codebook:
        raise UserError(
            f"{folder / TOKENIZER_FILE}: the model was trained on codebook {tokenizer['hash']}, not on {codebook}: "
            "use a model and shards of one tokenizer"
        )
    shape = read_shape(folder, tokenizer)
    weights = _read_weights(folder / WEIGHTS_FILE)
    if shape.layers > len(weights):  # before they are all named
        raise UserError(f"{folder / CONFIG_FILE}: num_hidden_layers is {shape.layers}, more than the folder has weights")
    require_shapes(weights, shape.weights(), folder / WEIGHTS_FILE)
    return shape, {name: tensor.to(dtype) for name, tensor in weights.items()}, tokenizer


def read_tokenizer(folder: str | Path) -> dict[str, Any]:
    """The content of a model folder's `image_tokenizer.json`. Raises UserError where there is no such model."""
    path = Path(folder) / TOKENIZER_FILE
    content = _read_json(path)
    missing = [key for key in TOKENIZER_KEYS if key not in content]
    if missing:
        raise UserError(f"{path}: lacks {missing[0]!r}: export the model again")
    return content


def read_shape(folder: Path, tokenizer: dict[str, Any]) -> Shape:
    """What a model folder's config.json says. Raises UserError where it is not one of our LLaMAs."""
    path = folder / CONFIG_FILE
    content = _read_json(path)
    if content.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {content.get('model_type')!r}; only llama is known")
    shape = of_config(content, path)
    if shape.codes != tokenizer["codes"]:
        raise UserError(f"{folder}: {CONFIG_FILE} has {shape.codes} codes, {TOKENIZER_FILE} {tokenizer['codes']}")
    return shape


def _read_weights(path: Path) -> Tensors:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: this is not a finished model") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}): export or copy the model again") from None


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, "export the model again", f"{path.parent} is not a finished model")
