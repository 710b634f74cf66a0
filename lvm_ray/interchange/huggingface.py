"""The published Hugging Face folders of DeLVM and LVM: their settings and their weights.

DeLVM's config.json has a model_type of its own, internlm, which is a LLaMA with biases in its attention, and names a module
to run, which is not run. LVM's is a LLaMA without biases. Rotary frequencies that stand among the weights are dropped: they
follow from the settings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lvm_ray.errors import UserError
from lvm_ray.interchange.weights import read_folder
from lvm_ray.json_file import read_object
from lvm_ray.model.shape import Shape, Tensors, of_config, truth

KINDS = {"internlm": True, "llama": False}  # model_type, and whether its attention has biases where its config does not say
INVERSE_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read(folder: Path, heads: int | None) -> tuple[Shape, Tensors]:
    """A folder's shape, and its weights under stock names.

    Raises UserError where it is of another architecture, where a file is missing or damaged, and where `heads` is given and
    not what the folder says.
    """
    path = folder / "config.json"
    shape = _shape(read_object(path, "get the model again"), path)
    if heads not in (None, shape.heads):
        raise UserError(f"--heads {heads}: {path} says {shape.heads}: leave --heads out")
    found = read_folder(folder)
    if shape.layers > len(found):  # before anything is built that large
        raise UserError(f"{path}: num_hidden_layers is {shape.layers}, more than the folder has weights")
    weights = {name: value for name, value in found.items() if not INVERSE_FREQUENCIES.fullmatch(name)}
    return shape, weights


def _shape(content: dict[str, Any], path: Path) -> Shape:
    """What a config.json says. Raises UserError where it is of another architecture."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{path}: model_type is {kind!r}: models of {' and '.join(KINDS)} can be imported")
    key = "bias" if kind == "internlm" else "attention_bias"
    biases = KINDS[kind] if content.get(key) is None else truth(key, content, path)
    shape = of_config(content | {"attention_bias": biases}, path)
    if shape.key_heads != shape.heads:
        raise UserError(f"{path}: num_key_value_heads is {shape.key_heads}, only {shape.heads} can be imported")
    if shape.head_width * shape.heads != shape.width or shape.mlp_bias:
        what = "mlp_bias is true" if shape.mlp_bias else f"head_dim is {shape.head_width}"
        raise UserError(f"{path}: {what}: a recipe's model has no such thing, so it cannot be imported")
    return shape
