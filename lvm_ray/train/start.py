"""Whether a training can start from the model that its recipe names (`model.init`), asked before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lvm_ray.config import Recipe
from lvm_ray.errors import UserError

if TYPE_CHECKING:
    import torch

    from lvm_ray.tokenizer import Tokenizer

LARGEST_REST = 0.01  # of an embedding, beside what a codebook can give: fp16 leaves about 0.0003


def model_folder(init: str) -> Path:
    """The model's folder of a run folder, or the folder itself."""
    inner = Path(init) / "model"
    return inner if inner.is_dir() else Path(init)


def check_start(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raises UserError where `model.init` names no model, one of another shape or codebook, or one whose embedding is no
    projection of the codebook though the recipe's is to be one."""
    if recipe.model.init is None:
        return
    from lvm_ray.model.folder import TOKENIZER_FILE, read_shape, read_tokenizer

    folder = model_folder(recipe.model.init)
    described = read_tokenizer(folder)
    if described["hash"] != tokenizer.hash:
        raise UserError(
            f"model.init: {folder / TOKENIZER_FILE}: the model was trained on codebook {described['hash']}, the shards are of "
            f"codebook {tokenizer.hash}: start from a model of the same tokenizer"
        )
    found, section = read_shape(folder, described), recipe.model
    for field, wanted, has in (
        ("width", section.width, found.width),
        ("layers", section.layers, found.layers),
        ("heads", section.heads, found.heads),
        ("mlp", section.mlp, found.mlp),
        ("rope_base", section.rope_base, found.rope_base),
        ("norm_epsilon", section.norm_epsilon, found.norm_epsilon),
    ):
        if wanted != has:
            raise UserError(f"model.init: {folder} has {field} {has}, the recipe's model.{field} is {wanted}: set it to {has}")
    if section.embedding == "codebook":
        _require_projection(folder, tokenizer)


def _require_projection(folder: Path, tokenizer: Tokenizer) -> None:
    import numpy as np
    import torch
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors"
    try:
        with safe_open(path, "pt") as weights:
            table_VD = weights.get_tensor("model.embed_tokens.weight")
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.init: {path}: cannot be read ({error}): copy the model again") from None
    rest = rest_of(torch.from_numpy(np.asarray(tokenizer.codebook, np.float32)), table_VD)
    if rest > LARGEST_REST:
        raise UserError(
            f"model.init: {folder}: its embedding is a free table, of which a layer on the codebook can give all but {rest:.0%}: "
            "set model.embedding to table"
        )


def rest_of(codebook_VE: torch.Tensor, table_VD: torch.Tensor) -> float:
    """The part of a table's length that no projection of the codebook gives, from 0 to 1."""
    from lvm_ray.model.llama import projection_of

    given_VD = codebook_VE.float() @ projection_of(codebook_VE, table_VD).T
    return float((table_VD - given_VD).norm() / table_VD.norm().clamp(min=1e-12))
