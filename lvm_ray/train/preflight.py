"""Whether a teacher and its student fit together, asked before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lvm_ray.config import ModelSection, Recipe
from lvm_ray.errors import UserError

if TYPE_CHECKING:
    from transformers.models.llama.configuration_llama import LlamaConfig


def check_teacher(recipe: Recipe, codebook: str) -> None:
    """Raises UserError where the teacher's model is missing or of another codebook, before anything is started."""
    if recipe.distill is None:
        return
    if recipe.distill.teacher is None:
        raise UserError("distill.teacher: missing: name a finished teacher's run folder, or give the recipe a teacher section")
    from lvm_ray.model.export import TOKENIZER_FILE, read_config, read_tokenizer

    folder = Path(recipe.distill.teacher) / "model"
    found = read_tokenizer(folder)
    if found["hash"] != codebook:
        raise UserError(
            f"{folder / TOKENIZER_FILE}: the teacher was trained on codebook {found['hash']}, the shards are of codebook "
            f"{codebook}: distil from a teacher of the same tokenizer"
        )
    if found["image_tokens"] != recipe.image_tokens:
        raise UserError(
            f"{folder}: the teacher's pictures have {found['image_tokens']} tokens, the recipe's {recipe.image_tokens}"
        )
    if recipe.distill.layers is not None:
        _check_layers(recipe.distill.layers, recipe.model, read_config(folder, found))


def _check_layers(layers: list[int], section: ModelSection, teacher: LlamaConfig) -> None:
    """Raises UserError where a student cannot start from these layers of the teacher."""
    for field, wanted, found in (
        ("width", section.width, teacher.hidden_size),
        ("heads", section.heads, teacher.num_attention_heads),
        ("mlp", section.mlp, teacher.intermediate_size),
    ):
        if wanted != found:
            raise UserError(
                f"distill.layers: the student's model.{field} is {wanted}, the teacher's {found}: "
                "a student takes over layers of its own shape only"
            )
    for layer in layers:
        if not 0 <= layer < teacher.num_hidden_layers:
            raise UserError(f"distill.layers: no layer {layer}: the teacher has layers 0 to {teacher.num_hidden_layers - 1}")
