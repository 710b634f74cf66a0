"""Checkpoints of open-muse's `VQGANModel`, the tokenizer of DeLVM and LVM, as diffusers' `VQModel`.

The two are one architecture under two sets of names. A folder holds `config.json` and `pytorch_model.bin`, a pickle that
is read as tensors only, so that one that would run code is refused.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvm_ray.errors import UserError
from lvm_ray.json_file import read_object
from lvm_ray.tokenizer.vqmodel import Network, assemble

CLASS = "VQGANModel"
WEIGHTS = "pytorch_model.bin"
RANGE = (0.0, 1.0)  # pixel values of its training
# {level} counts resolutions from the finest, as the checkpoint does; diffusers counts decoder blocks from the coarsest.
RENAMES = (
    (r"(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"encoder\.down\.(\d+)\.downsample\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.{level}.resnets.\2."),
    (r"decoder\.up\.(\d+)\.upsample\.conv\.", r"decoder.up_blocks.{level}.upsamplers.0.conv."),
)


def convert(folder: Path) -> Network:
    """The folder's network under diffusers' names.

    Raises UserError where the checkpoint is no plain dictionary of tensors, where a weight is missing, left over or of another
    shape, and where the architecture has what `VQModel` has not.
    """
    config = _config(read_object(folder / "config.json", "get the tokenizer again"), folder)
    levels = len(config["block_out_channels"])
    tensors = {_renamed(name, levels): value for name, value in _read(folder / WEIGHTS).items()}
    return assemble(config, tensors, str(folder))


def _config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    wanted = (
        "hidden_channels",
        "channel_mult",
        "num_res_blocks",
        "z_channels",
        "num_embeddings",
        "quantized_embed_dim",
        "attn_resolutions",
        "no_attn_mid_block",
    )
    for key in wanted:
        if key not in config:
            raise UserError(f"{folder}/config.json: {key} is missing, and its default is not that of the published tokenizers")
    if config["attn_resolutions"] or not config["no_attn_mid_block"] or not config.get("resample_with_conv", True):
        raise UserError(f"{folder}/config.json: attention, or resampling without convolutions: only networks without can be read")
    factors, channels = config["channel_mult"], config["hidden_channels"]
    if not isinstance(factors, list) or not factors or not all(type(factor) is int for factor in factors):
        raise UserError(f"{folder}/config.json: channel_mult is {str(factors)[:80]}, expected a list of whole numbers")
    if type(channels) is not int:
        raise UserError(f"{folder}/config.json: hidden_channels is {str(channels)[:80]}, expected a whole number")
    levels = len(factors)
    return {
        "block_out_channels": [channels * factor for factor in factors],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config["num_res_blocks"],
        "latent_channels": config["z_channels"],
        "vq_embed_dim": config["quantized_embed_dim"],
        "num_vq_embeddings": config["num_embeddings"],
        "norm_num_groups": 32,
        "mid_block_add_attention": False,
        "lookup_from_codebook": True,
        "force_upcast": True,
    }


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: a {CLASS} folder holds its weights there") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() if isinstance(error, RuntimeError) else []
        reason = lines[0] if lines else "it holds more than tensors"
        raise UserError(f"{path}: refused: {reason}: get the checkpoint from a place that you trust") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path}: refused: not a dictionary of tensors")
    return tensors


def _renamed(name: str, levels: int) -> str:
    for pattern, replacement in RENAMES:
        match = re.match(pattern, name)
        if match:
            fresh = match.expand(replacement)
            if "{level}" in fresh:
                fresh = fresh.replace("{level}", str(levels - 1 - int(match[1])))
            return (fresh + name[match.end() :]).replace("nin_shortcut", "conv_shortcut")
    return name
