"""DeLVM's own checkpoints, as its InternLM writes them while it trains, under the stock names of a LLaMA.

    model_tp0_pp0.pt, model_tp0_pp1.pt, ...    a file a pipeline stage; each counts its layers from 0

    model.embedding.vq_model.*                  the whole tokenizer; its codebook C [V, E] is `...quantize.embedding.weight`
    model.embedding.embed_proj.weight           P [D, E]: a code's vector is its row of C P^T
    model.blocks.N.mixer.Wqkv.{weight,bias}     queries, keys and values, one beneath the other: [3 D, D]
    model.blocks.N.mixer.out_proj.{weight,bias}
    model.blocks.N.mlp.w{1,2,3}.weight          gate, up, down
    model.blocks.N.norm{1,2}.weight
    model.norm.weight, model.head.weight

The first stage holds the embedding, the last the norm and the head. Of all else in the folder nothing is read; above all not
model_config.pt, a pickle of an object. So the number of heads, which no weight tells, has to come from elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from lvm_ray.errors import UserError
from lvm_ray.interchange.weights import read_tensors
from lvm_ray.model.shape import Shapes, Tensors, require_names, require_shapes
from lvm_ray.model.sizes import SIZES

FILE = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")
BLOCK = re.compile(r"model\.blocks\.(\d+)\.")
TOKENIZER = "model.embedding.vq_model."
CODEBOOK = "quantize.embedding.weight"
PROJECTION = "model.embedding.embed_proj.weight"
NORM, HEAD = "model.norm.weight", "model.head.weight"
# Of a block, besides Wqkv: what stands in the file, and the stock name.
RENAMES = {
    "mixer.out_proj.weight": "self_attn.o_proj.weight",
    "mixer.out_proj.bias": "self_attn.o_proj.bias",
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w2.weight": "mlp.up_proj.weight",
    "mlp.w3.weight": "mlp.down_proj.weight",
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
}
JOINED = ("mixer.Wqkv.weight", "mixer.Wqkv.bias")


class Native(NamedTuple):
    """A checkpoint under stock names.

    weights      the embedding folded into a table, in float32; all else as it lies in the files
    codebook_VE  that the model was trained with, in the checkpoint's dtype
    """

    weights: Tensors
    codebook_VE: torch.Tensor
    width: int
    layers: int
    mlp: int


def is_native(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return any(FILE.fullmatch(path.name) for path in folder.iterdir())


def read(folder: Path) -> Native:
    """Read a checkpoint.

    Raises UserError where its layers are cut over several files (tensor parallel), where a stage's file is missing or is no
    dictionary of tensors, and where a weight is lacking, left over or of another shape.
    """
    weights: Tensors = {}
    codebook_VE: torch.Tensor | None = None
    width = mlp = layers = 0
    stages = _stages(folder)
    for number, path in enumerate(stages):
        tensors = read_tensors(path)
        first, last = number == 0, number == len(stages) - 1
        if first:
            codebook_VE = _take_tokenizer(tensors, path)
        blocks = 1 + max((int(match[1]) for name in tensors if (match := BLOCK.match(name))), default=-1)
        if not blocks:
            raise UserError(f"{path}: lacks the weight model.blocks.0.{JOINED[0]}: this is not a model of its kind, or not whole")
        require_names(tensors, dict.fromkeys(_names(blocks, first, last)), path)
        if first:
            width, mlp = len(tensors[PROJECTION]), len(tensors["model.blocks.0.mlp.w1.weight"])
        assert codebook_VE is not None
        require_shapes(tensors, _shapes(blocks, first, last, width, mlp, codebook_VE), path)
        weights |= _stock(tensors, blocks, layers)
        if first:
            weights["model.embed_tokens.weight"] = codebook_VE.float() @ tensors[PROJECTION].float().T
        if last:
            weights |= {"model.norm.weight": tensors[NORM], "lm_head.weight": tensors[HEAD]}
        layers += blocks
    assert codebook_VE is not None
    return Native(weights, codebook_VE, width, layers, mlp)


def heads_of(native: Native, heads: int | None, folder: Path) -> int:
    """The number of heads: what the user says, or that of the named size with this width and these layers.

    Raises UserError where neither says it.
    """
    if heads is not None:
        return heads
    for size in SIZES.values():
        if (size["width"], size["layers"]) == (native.width, native.layers):
            return size["heads"]
    raise UserError(
        f"{folder}: {native.layers} layers of width {native.width} are no named size, and the checkpoint does not tell how many "
        "heads a layer has: say it with --heads"
    )


def _stages(folder: Path) -> list[Path]:
    found = {(int(match[1]), int(match[2])): path for path in folder.iterdir() if (match := FILE.fullmatch(path.name))}
    cut = [path for (tensor, _), path in sorted(found.items()) if tensor]
    if cut:
        raise UserError(
            f"{cut[0]}: a model whose layers are cut over several files (tensor parallel), which cannot be imported: "
            "save it with tensor parallel size 1"
        )
    for stage in range(len(found)):
        if (0, stage) not in found:
            raise UserError(f"{folder}: lacks model_tp0_pp{stage}.pt: copy every file of the model")
    return [found[0, stage] for stage in range(len(found))]


def _take_tokenizer(tensors: Tensors, path: Path) -> torch.Tensor:
    """Take the tokenizer's weights out of the first stage's; its codebook [V, E]."""
    named = [name for name in tensors if name.startswith(TOKENIZER)]
    codebooks = [tensors[name] for name in named if name.endswith(CODEBOOK)]
    if len(codebooks) != 1 or codebooks[0].ndim != 2:
        raise UserError(f"{path}: lacks the weight {TOKENIZER}{CODEBOOK}: without its codebook the embedding means nothing")
    for name in named:
        del tensors[name]
    return codebooks[0]


def _names(blocks: int, first: bool, last: bool) -> list[str]:
    names = [f"model.blocks.{block}.{part}" for block in range(blocks) for part in (*JOINED, *RENAMES)]
    return [PROJECTION] * first + names + [NORM, HEAD] * last


def _shapes(blocks: int, first: bool, last: bool, width: int, mlp: int, codebook_VE: torch.Tensor) -> Shapes:
    codes, channels = codebook_VE.shape
    parts: Shapes = {
        "mixer.Wqkv.weight": (3 * width, width),
        "mixer.Wqkv.bias": (3 * width,),
        "mixer.out_proj.weight": (width, width),
        "mixer.out_proj.bias": (width,),
        "mlp.w1.weight": (mlp, width),
        "mlp.w2.weight": (mlp, width),
        "mlp.w3.weight": (width, mlp),
        "norm1.weight": (width,),
        "norm2.weight": (width,),
    }
    shapes = {f"model.blocks.{block}.{part}": shape for block in range(blocks) for part, shape in parts.items()}
    if first:
        shapes[PROJECTION] = (width, channels)
    if last:
        shapes |= {NORM: (width,), HEAD: (codes, width)}
    return shapes


def _stock(tensors: Tensors, blocks: int, before: int) -> Tensors:
    """The blocks of a stage under stock names, `before` layers after the first."""
    weights: Tensors = {}
    for block in range(blocks):
        own, stock = f"model.blocks.{block}.", f"model.layers.{before + block}."
        weights |= {stock + name: tensors[own + part] for part, name in RENAMES.items()}
        for part in JOINED:
            kind = part.rpartition(".")[2]
            for name, tensor in zip("qkv", tensors[own + part].chunk(3), strict=True):
                weights[f"{stock}self_attn.{name}_proj.{kind}"] = tensor
    return weights
