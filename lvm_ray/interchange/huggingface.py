"""The published Hugging Face folders of DeLVM and LVM: their settings and their weights.

DeLVM's config.json has a model_type of its own, internlm, which is a LLaMA with biases in its attention, and names a module
to run, which is not run. LVM's is a LLaMA without biases. Rotary frequencies that stand among the weights are dropped: they
follow from the settings.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lvm_ray.errors import UserError
from lvm_ray.interchange.weights import read_folder, read_json
from lvm_ray.model.shape import COUNTS, Tensors, require_counts

KINDS = {"internlm": True, "llama": False}  # model_type, and whether its attention has biases where its config does not say
TOKENS = 2048  # of DeLVM's sentences
INVERSE_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read(folder: Path, heads: int | None) -> tuple[dict[str, Any], Tensors]:
    """The settings of a folder's `LlamaConfig`, and its weights under stock names.

    Raises UserError where it is of another architecture, where a file is missing or damaged, and where `heads` is given and
    not what the folder says.
    """
    path = folder / "config.json"
    settings = _settings(read_json(path), path)
    if heads not in (None, settings["num_attention_heads"]):
        raise UserError(f"--heads {heads}: {path} says {settings['num_attention_heads']}: leave --heads out")
    found = read_folder(folder)
    if settings["num_hidden_layers"] > len(found):  # before anything is built that large
        raise UserError(f"{path}: num_hidden_layers is {settings['num_hidden_layers']}, more than the folder has weights")
    weights = {name: value for name, value in found.items() if not INVERSE_FREQUENCIES.fullmatch(name)}
    return settings, weights


def _settings(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a `LlamaConfig` out of a config.json. Raises UserError where it is of another architecture."""
    kind = content.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{path}: model_type is {kind!r}: models of {' and '.join(KINDS)} can be imported")
    require_counts(content, COUNTS, path)
    rope = content.get("rope_parameters") or {}
    same = {
        "hidden_act": ("silu",),
        "num_key_value_heads": (None, content["num_attention_heads"]),
        "head_dim": (None, content["hidden_size"] // content["num_attention_heads"]),
        "tie_word_embeddings": (None, False),
        "mlp_bias": (None, False),
        "rope_scaling": (None,),
    }
    for key, known in same.items():
        if content.get(key) not in known:
            raise UserError(f"{path}: {key} is {json.dumps(content.get(key))}, only {json.dumps(known[-1])} can be imported")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rope_parameters are of the type {rope['rope_type']!r}: only the default can be imported")
    settings = {key: content[key] for key in COUNTS} | {
        "max_position_embeddings": content.get("max_position_embeddings", TOKENS),
        "rms_norm_eps": content.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", content.get("rope_theta", 10000.0)),
        "attention_bias": content.get("bias" if kind == "internlm" else "attention_bias", KINDS[kind]),
    }
    for key in ("max_position_embeddings", "rms_norm_eps", "rope_theta"):
        if type(settings[key]) not in (int, float) or not 0 < settings[key] < float("inf"):
            raise UserError(f"{path}: {key} is {settings[key]!r}, expected a number above 0")
    if type(settings["attention_bias"]) is not bool:
        raise UserError(f"{path}: bias is {settings['attention_bias']!r}, expected true or false")
    require_heads(settings, path)
    return settings


def require_heads(settings: dict[str, Any], path: Path) -> None:
    """Raises UserError where the heads do not share out the width in even parts."""
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    if width % heads or (width // heads) % 2:
        raise UserError(f"{path}: {heads} heads do not share out a width of {width} in even parts")
