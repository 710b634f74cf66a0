"""Tokenizers whose network is diffusers' `VQModel`: published ones, and our own of the kinds `vq` and `fsq`.

    FOLDER/config.json   kind, patch, codes, range (the pixel values that the network expects), levels (fsq), hash, and what else
                         its maker found worth keeping: source, use and perplexity of the codes
    FOLDER/network/      a stock diffusers folder: config.json and diffusion_pytorch_model.safetensors, fp32

A network of 3 x k^2 input channels sees squares of k x k pixels folded into channels, which on a CPU saves most of the work;
a published one has k = 1. Tokens are in raster order, computed in fp32.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import VQModel
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lvm_ray.errors import UserError
from lvm_ray.json_file import read_object
from lvm_ray.tokenizer import finite
from lvm_ray.tokenizer.patch import nearest

Network: TypeAlias = Any  # a VQModel: diffusers' base classes hide its attributes from the type checker

NETWORK = "network"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PIXELS_AT_ONCE = 32 * 64 * 64  # of a picture batch in the network, so that large pictures fit in memory
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names of diffusers before 0.15


class VQTokenizer:
    """Pictures to tokens and back through a `VQModel`.

    levels  of a finite scalar grid, or None for a learnt codebook
    span    pixel values that the network sees for black and white
    """

    def __init__(self, network: Network, span: tuple[float, float], levels: Sequence[int] | None = None) -> None:
        self.network = network.float().eval().requires_grad_(False)
        self.span, self.levels = span, tuple(levels) if levels else None
        self.fold = _fold(network)
        self.patch = downsampling(network)
        self.codes: int = network.config.num_vq_embeddings
        self.hash = _digest(network, span, self.levels)

    @property
    def codebook(self) -> Tensor:
        """Float32 [V, D]: the learnt vectors, or the grid."""
        return cast(Tensor, self.network.quantize.embedding.weight).detach()

    def to(self, device: str) -> VQTokenizer:
        """Itself, with its network on another device."""
        self.network.to(device)
        return self

    @torch.inference_mode()
    def encode(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """Pictures [B, S, S, 3] in 0..255 to tokens [B, N]; S is a multiple of the patch."""
        return np.concatenate([self._encode(piece) for piece in _pieces(pictures, pictures.shape[1])])

    @torch.inference_mode()
    def decode(self, tokens: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Tokens [B, N] to pictures [B, S, S, 3]; N is a square number."""
        return np.concatenate([self._decode(piece) for piece in _pieces(tokens, round(tokens.shape[1] ** 0.5) * self.patch)])

    def _encode(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint16]:
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.network.device).permute(0, 3, 1, 2).float() / 255
        latents_PD, _ = latents_of(self.network, pixels, self.span, self.fold)
        if self.levels:
            tokens = finite.codes_of(finite.bound(latents_PD, self.levels), self.levels)
        else:
            tokens = nearest(latents_PD, self.codebook)
        return tokens.reshape(len(pictures), -1).cpu().numpy().astype(np.uint16)

    def _decode(self, tokens: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        points_PD = self.codebook[torch.from_numpy(tokens.astype(np.int64)).flatten().to(self.network.device)]
        pixels = pixels_of(self.network, points_PD, len(tokens), self.span, self.fold)
        return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def latents_of(network: Network, pixels_BCSS: Tensor, span: tuple[float, float], fold: int) -> tuple[Tensor, int]:
    """Pixels in 0..1 to latents [P, D] in fp32, P all places in raster order, and the side of one picture's grid."""
    low, high = span
    latents_BDGG = network.encode(F.pixel_unshuffle(pixels_BCSS * (high - low) + low, fold)).latents
    return latents_BDGG.float().permute(0, 2, 3, 1).flatten(0, 2), latents_BDGG.shape[-1]


def pixels_of(network: Network, points_PD: Tensor, batch: int, span: tuple[float, float], fold: int) -> Tensor:
    """Codebook vectors [P, D] of a batch of square grids to pixels [B, 3, S, S], about 0..1."""
    low, high = span
    side = round((len(points_PD) / batch) ** 0.5)
    points_BDGG = points_PD.reshape(batch, side, side, -1).permute(0, 3, 1, 2).contiguous()
    spatial = points_BDGG if network.config.norm_type == "spatial" else None
    decoded = network.decoder(network.post_quant_conv(points_BDGG), spatial)
    return (F.pixel_shuffle(decoded.float(), fold) - low) / (high - low)


def downsampling(network: Network) -> int:
    """The side of the square that one token stands for: every block but the last halves the picture."""
    return _fold(network) * int(2 ** (len(network.config.down_block_types) - 1))


def assemble(config: dict[str, Any], tensors: dict[str, Tensor] | None, place: str) -> Network:
    """A network of a diffusers config with these weights, or with fresh ones.

    Raises UserError naming the first weight that is missing, left over or of another shape, and where the config describes no
    network of pictures.
    """
    known = inspect.signature(VQModel.__init__).parameters
    try:
        network = cast(Any, VQModel)(**{key: value for key, value in config.items() if key in known and key != "self"})
    except Exception as error:
        raise UserError(f"{place}: config.json describes no VQModel: {' '.join(str(error).split())}") from None
    for channels in (network.config.in_channels, network.config.out_channels):
        if channels != 3 * _fold(network) ** 2:
            raise UserError(f"{place}: config.json: a network of {channels} channels, but pictures have 3: use another source")
    if tensors is not None:
        _require_same(tensors, network.state_dict(), place)
        network.load_state_dict(tensors)
    return network


def _require_same(tensors: dict[str, Tensor], wanted: dict[str, Tensor], place: str) -> None:
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted:
            state = "left over in" if name in tensors else "missing from"
            raise UserError(f"{place}: {name} is {state} its weights: they are not those of its config.json")
        found, shape = list(tensors[name].shape), list(wanted[name].shape)
        if found != shape:
            raise UserError(f"{place}: {name} has shape {found}, its config.json asks for {shape}")


def read_network(folder: Path) -> Network:
    """A diffusers folder's network. Raises UserError where it is not whole."""
    config = read_object(folder / "config.json", "get the tokenizer again")
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: a VQModel folder holds its weights there") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {' '.join(str(error).split())}") from None
    return assemble(config, {_today(name): value for name, value in tensors.items()}, str(folder))


def save(tokenizer: VQTokenizer, folder: str, kind: str, extra: dict[str, Any]) -> None:
    """Write the folder; `config.json` last, so that a folder with it is whole. `extra` is kept in it."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    tokenizer.network.save_pretrained(place / NETWORK, safe_serialization=True)
    config = {"kind": kind, "patch": tokenizer.patch, "codes": tokenizer.codes, "range": list(tokenizer.span)}
    if tokenizer.levels:
        config["levels"] = list(tokenizer.levels)
    (place / "config.json").write_text(json.dumps({**config, "hash": tokenizer.hash, **extra}, indent=1))


def load(folder: str, config: dict[str, Any]) -> VQTokenizer:
    """Read a folder that `save` wrote. Raises UserError where it is not whole, or not what its config.json says."""
    network = read_network(Path(folder) / NETWORK)
    try:
        low, high = config["range"]
        tokenizer = VQTokenizer(network, (low, high), config.get("levels"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json: not that of a {config['kind']} tokenizer: {error}; make it again") from None
    for key in ("patch", "codes", "hash"):
        if getattr(tokenizer, key) != config.get(key):
            raise UserError(
                f"{folder}: its network has {key} {getattr(tokenizer, key)}, config.json says {config.get(key)}; make it again"
            )
    return tokenizer


def _digest(network: Network, span: tuple[float, float], levels: tuple[int, ...] | None) -> str:
    """Sixteen hex digits of all that decides which token a picture gets: encoder, codebook, levels and pixel range.

    DeLVM asks for equal codebooks only. That is too little: grids of equal levels all have one codebook, and an encoder that
    was trained further on a frozen codebook writes other tokens. The decoder is left out: one that was trained further on the
    same tokens, as published ones were, reads them as well, and may take its place.
    """
    digest = hashlib.sha256(json.dumps([list(span), levels]).encode())
    for name, value in sorted(network.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            digest.update(name.encode())
            digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _fold(network: Network) -> int:
    return max(1, math.isqrt(network.config.in_channels // 3))


def _pieces(batch: NDArray[Any], side: int) -> list[NDArray[Any]]:
    at_once = max(1, PIXELS_AT_ONCE // side**2)
    return [batch[start : start + at_once] for start in range(0, len(batch), at_once)]


def _today(name: str) -> str:
    """A weight's name in the diffusers of today."""
    if ".attentions." not in name:
        return name
    return ".".join(OLD_ATTENTION.get(part, part) for part in name.split("."))
