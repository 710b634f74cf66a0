"""Models into folders: stock `LlamaForCausalLM` (safetensors, fp32) plus `image_tokenizer.json`, as `folder` reads them.

Any program that loads LLaMA loads the folder.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from lvm_ray.model.folder import TOKENIZER_FILE, TOKENIZER_KEYS, WEIGHTS_FILE
from lvm_ray.storage import saving

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

PROJECTION = "model.embed_tokens.embed_projection.weight"  # of a codebook embedding


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
    weights = {name: tensor.float().contiguous() for name, tensor in stock_weights(model).items()}
    try:
        with saving(f"{target}: cannot write the model"):
            temporary.mkdir(parents=True)
            config.save_pretrained(temporary)
            save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            (temporary / TOKENIZER_FILE).write_text(json.dumps(tokenizer, indent=2) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stock_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights under stock names, in the model's precision, with codebook and projection folded into the embedding."""
    weights: dict[str, torch.Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if PROJECTION in weights:
        del weights[PROJECTION]
        embedding: Any = model.model.embed_tokens
        with torch.no_grad():
            weights["model.embed_tokens.weight"] = embedding.table()
    return weights
