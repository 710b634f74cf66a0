"""Models in folders: stock `LlamaForCausalLM` (safetensors, fp32) plus `image_tokenizer.json`.

Any program that loads LLaMA loads the folder. `image_tokenizer.json` says what the tokens mean:

    {"kind": "patch", "hash": codebook hash, "codes": V, "patch": 8, "size": 64, "image_tokens": N,
     "folder": tokenizer's folder, relative to this one}

(The name `tokenizer.json` is reserved by transformers.)
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lvm_ray.errors import UserError
from lvm_ray.storage import saving

if TYPE_CHECKING:  # transformers takes seconds to import, and reading a model's tokenizer needs none of it
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

TOKENIZER_FILE = "image_tokenizer.json"
TOKENIZER_KEYS = ("kind", "hash", "codes", "patch", "size", "image_tokens", "folder")


def export(model: LlamaForCausalLM, folder: str | Path, tokenizer: dict[str, Any]) -> None:
    """Write a model as a stock folder, atomically. `tokenizer` is the content of `image_tokenizer.json`.

    Raises UserError where the disk is full or cannot be written; nothing half-written stays.
    """
    assert set(tokenizer) == set(TOKENIZER_KEYS), sorted(tokenizer)
    target = Path(folder)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    config = copy.deepcopy(model.config)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float32
    try:
        with saving(f"{target}: cannot write the model"):
            temporary.mkdir(parents=True)
            config.save_pretrained(temporary)
            save_file(stock_weights(model), temporary / "model.safetensors", metadata={"format": "pt"})
            (temporary / TOKENIZER_FILE).write_text(json.dumps(tokenizer, indent=2) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stock_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The fp32 weights under stock names, with codebook and projection folded into the embedding."""
    from lvm_ray.model.llama import CodebookEmbedding

    embedding = model.model.embed_tokens
    weights = {name: tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}
    if isinstance(embedding, CodebookEmbedding):
        del weights["model.embed_tokens.embed_projection.weight"]
        with torch.no_grad():
            weights["model.embed_tokens.weight"] = embedding.table().float().contiguous()
    return weights


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, codebook: str | None = None
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A model folder as (model in eval mode, content of `image_tokenizer.json`).

    Raises UserError where a file is missing or damaged, where weights are missing or left over, and where `codebook` is
    given and the model's tokens are of another.
    """
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

    folder = Path(folder)
    tokenizer = read_tokenizer(folder)
    if codebook is not None and tokenizer["hash"] != codebook:
        raise UserError(
            f"{folder / TOKENIZER_FILE}: the model was trained on codebook {tokenizer['hash']}, not on {codebook}: "
            "use a model and shards of one tokenizer"
        )
    config = read_config(folder, tokenizer)
    weights = _read_weights(folder)
    # Built without storage: drawing random weights only to overwrite them takes seconds for a large model.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    wanted = model.state_dict()
    for names, what in ((wanted.keys() - weights.keys(), "lacks"), (weights.keys() - wanted.keys(), "has an unknown")):
        if names:
            raise UserError(
                f"{folder / 'model.safetensors'}: {what} weight {min(names)} ({len(names)} such): export the model again"
            )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{folder / 'model.safetensors'}: {name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(wanted[name].shape)}: export the model again"
            )
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(dtype).eval(), tokenizer  # type: ignore[arg-type]


def read_tokenizer(folder: str | Path) -> dict[str, Any]:
    """The content of a model folder's `image_tokenizer.json`. Raises UserError where there is no such model."""
    path = Path(folder) / TOKENIZER_FILE
    content = _read_json(path)
    missing = [key for key in TOKENIZER_KEYS if key not in content]
    if missing:
        raise UserError(f"{path}: lacks {missing[0]!r}: export the model again")
    return content


def read_config(folder: Path, tokenizer: dict[str, Any]) -> LlamaConfig:
    """The stock configuration of a model folder. Raises UserError where it is not one of our LLaMAs."""
    content = _read_json(folder / "config.json")
    if content.get("model_type") != "llama":
        raise UserError(f"{folder / 'config.json'}: model_type is {content.get('model_type')!r}; only llama is known")
    if content.get("vocab_size") != tokenizer["codes"]:
        raise UserError(f"{folder}: config.json has {content.get('vocab_size')} codes, {TOKENIZER_FILE} {tokenizer['codes']}")
    from transformers.models.llama.configuration_llama import LlamaConfig

    config = LlamaConfig(**content)
    config._attn_implementation = "sdpa"
    return config


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: this is not a finished model") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}): export or copy the model again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: no such file: {path.parent} is not a finished model") from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON: export the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of an object: export the model again")
    return content
