"""Models that others trained, as run folders: `lvm-ray import FOLDER --tokenizer FOLDER --out RUN`.

A folder is one of

    DeLVM's or LVM's Hugging Face folders (`huggingface`); rows beyond the tokenizer's codes, which LVM's have, are cut off
    DeLVM's own checkpoints: model_tp0_pp0.pt and its other stages (`internlm`)

RUN/model becomes a stock `LlamaForCausalLM` in fp32 that gives the same logits, so that RUN can stand in a recipe as
`distill.teacher` or `model.init`; RUN/config.yaml says what it is, so that `predict --examples` can ask it. Importing takes as
much memory as the weights in fp32. `weights` reads the files: nothing is unpickled that is not a tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.model.shape import Shape, of_config, require_shapes
from lvm_ray.section import first_problem
from lvm_ray.storage import is_uri
from lvm_ray.tokenizer import Tokenizer, load_tokenizer, read_config

if TYPE_CHECKING:
    import torch

FILES = re.compile(r".*\.pt|.*\.safetensors|pytorch_model.*\.bin")
UNUSED = 256  # rows that a vocabulary may have beyond the codes: LVM's has 100 that it never uses
NATIVE_EPSILON = 1e-5  # of DeLVM's training; its released folders say 1e-6
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Found(NamedTuple):
    """A model as it was found.

    shape        of the stock LLaMA that it is
    weights      under stock names, in the dtypes of the files
    codebook_VE  that it was trained with, where the checkpoint holds it
    """

    shape: Shape
    weights: dict[str, torch.Tensor]
    codebook_VE: torch.Tensor | None


def is_model(path: str) -> bool:
    """Whether a path that is to be imported is a model's, and not a file of tokens: its folder, or a file of its weights."""
    if is_uri(path):
        return False
    place = Path(path)
    if place.is_file():
        return FILES.fullmatch(place.name) is not None
    return place.is_dir() and ((place / "config.json").is_file() or any(place.glob("model_tp*_pp*.pt")))


def import_model(
    path: str,
    tokenizer_folder: str,
    out: str,
    *,
    size: int = 256,
    heads: int | None = None,
    norm_epsilon: float | None = None,
    load: Callable[[str], Tokenizer] = load_tokenizer,
) -> list[str]:
    """Import a model's folder, or the folder of a file of its weights, as the run folder `out`; remarks for the user.

    size          side of the pictures in pixels
    heads         of a layer, where the checkpoint does not tell
    norm_epsilon  instead of what the model's config says

    Raises UserError where the folder is no such model or not whole, with the name of a weight that is lacking, left over or of
    another shape; where its codebook, or how many codes it has, is not the tokenizer's; and where `out` holds a model already.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    target = Path(out) / "model"
    if is_uri(out):
        raise UserError(f"--out {out}: models are imported into a folder of this machine")
    for place in (target, Path(out) / "config.yaml"):
        if place.exists():
            raise UserError(f"{place}: there is a run already: import into another --out, or remove it")
    if norm_epsilon is not None and not 0 < norm_epsilon < 1:
        raise UserError(f"--norm-epsilon {norm_epsilon:g}: a small number above 0, as 1e-5")
    tokenizer = load(tokenizer_folder)
    if size % tokenizer.patch:
        raise UserError(f"--size {size}: not a multiple of {tokenizer.patch}, the side of a token of {tokenizer_folder}")

    from lvm_ray.interchange import huggingface, internlm  # torch, only now that the cheap checks are over

    native = internlm.is_native(folder)
    found = _native(folder, heads) if native else Found(*huggingface.read(folder, heads), None)
    if found.codebook_VE is not None:
        _require_codebook(found.codebook_VE, tokenizer, folder, tokenizer_folder)
    found, remarks = _of_codes(found, tokenizer.codes, folder, tokenizer_folder)
    if norm_epsilon is not None:
        found = found._replace(shape=replace(found.shape, norm_epsilon=norm_epsilon))
    description = _description(tokenizer, tokenizer_folder, size, target)
    recipe = _recipe(found, description, tokenizer_folder, out)
    _write(found, target, description)
    (Path(out) / "config.yaml").write_text(config.dump(recipe), encoding="utf-8")
    shape, biases = found.shape, "with" if found.shape.attention_bias else "without"
    said = f"width {shape.width}, {shape.layers} layers, {shape.heads} heads, mlp {shape.mlp}"
    return [*remarks, f"{target}: {said}, norm epsilon {shape.norm_epsilon:g}, attention {biases} biases"]


def _native(folder: Path, heads: int | None) -> Found:
    from lvm_ray.interchange import internlm

    native = internlm.read(folder)
    config = {
        "vocab_size": len(native.codebook_VE),
        "hidden_size": native.width,
        "intermediate_size": native.mlp,
        "num_hidden_layers": native.layers,
        "num_attention_heads": internlm.heads_of(native, heads, folder),
        "rms_norm_eps": NATIVE_EPSILON,
        "attention_bias": True,
    }
    return Found(of_config(config, folder), native.weights, native.codebook_VE)


def _require_codebook(codebook_VE: torch.Tensor, tokenizer: Tokenizer, folder: Path, tokenizer_folder: str) -> None:
    """Raises UserError where the codebook that a checkpoint holds is not the tokenizer's, in the checkpoint's precision."""
    import torch

    own_VE = torch.from_numpy(np.asarray(tokenizer.codebook, np.float32)).to(codebook_VE.dtype)
    if own_VE.shape != codebook_VE.shape or not torch.equal(own_VE, codebook_VE):
        raise UserError(
            f"{folder}: the codebook that it was trained with {list(codebook_VE.shape)} is not that of --tokenizer "
            f"{tokenizer_folder} {list(own_VE.shape)}: name the tokenizer that its tokens were made with"
        )


def _of_codes(found: Found, codes: int, folder: Path, tokenizer_folder: str) -> tuple[Found, list[str]]:
    """The model with as many rows in embedding and head as there are codes, and remarks.

    Raises UserError where it has fewer or far more, and where the weights are not those of its shape.
    """
    rows = found.shape.codes
    if not codes <= rows <= codes + UNUSED:
        raise UserError(
            f"{folder}: a vocabulary of {rows}, but --tokenizer {tokenizer_folder} has {codes} codes: "
            "name the tokenizer that its tokens were made with"
        )
    require_shapes(found.weights, found.shape.weights(), folder)
    if rows == codes:
        return found, []
    cut = {name: found.weights[name][:codes] for name in (EMBEDDING, HEAD)}
    remark = f"{folder}: of {rows} rows of its vocabulary the last {rows - codes} are no codes of the tokenizer, and were cut off"
    return Found(replace(found.shape, codes=codes), found.weights | cut, found.codebook_VE), [remark]


def _write(found: Found, target: Path, description: dict[str, Any]) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    from lvm_ray.model.export import export
    from lvm_ray.storage import changing

    with torch.device("meta"):
        model = LlamaForCausalLM(found.shape.config())
    model.load_state_dict(found.weights, strict=True, assign=True)
    with changing(str(target)):
        export(model, target, description)


def _description(tokenizer: Tokenizer, folder: str, size: int, target: Path) -> dict[str, Any]:
    """What `image_tokenizer.json` says."""
    return {
        "kind": read_config(folder)["kind"],
        "hash": tokenizer.hash,
        "codes": tokenizer.codes,
        "patch": tokenizer.patch,
        "size": size,
        "image_tokens": (size // tokenizer.patch) ** 2,
        "folder": os.path.relpath(folder, target),
    }


def _recipe(found: Found, description: dict[str, Any], tokenizer_folder: str, out: str) -> Recipe:
    """What stands in the run's config.yaml: the model and its pictures. Of how it was trained nothing is known."""
    shape, kind = found.shape, description["kind"]
    tokenizer = {"kind": kind, "patch": description["patch"], "codes": description["codes"]}
    if kind == "published":
        tokenizer["source"] = tokenizer_folder
    if kind == "fsq":
        tokenizer["levels"] = read_config(tokenizer_folder).get("levels")
    model = {
        "width": shape.width,
        "layers": shape.layers,
        "heads": shape.heads,
        "mlp": shape.mlp,
        "rope_base": shape.rope_base,
        "norm_epsilon": shape.norm_epsilon,
        "embedding": "table",
    }
    values = {"run": out, "size": description["size"], "tasks": {"images": {}}, "tokenizer": tokenizer, "model": model}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{out}: {first_problem(error, Recipe)}") from None
