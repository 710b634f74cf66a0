"""The small tokenizer that trains in seconds: k-means codes of square patches, and a decoder that sees the neighbours.

A token is the nearest of V codes to a patch's principal components. Decoding lays the codes' mean patches side by side
and adds a correction by a small convolutional network over the grid of codes, which removes the seams. It stands in
for a VQGAN where none can be had: the embedded data set and photos on a CPU.

A folder holds `config.json` and `model.safetensors`. Tokens are in raster order, as everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import TokenizerSection

COMPONENTS = 64  # of a patch, at most: they hold over 99 % of its variance
LLOYD_ROUNDS = 12
LARGEST_SAMPLE = 120_000  # patches that k-means sees


class PatchTokenizer(nn.Module):
    """Pictures to tokens and back. Everything it knows is in its tensors and (patch, width)."""

    def __init__(self, patch: int, codes: int, components: int, width: int) -> None:
        super().__init__()
        self.patch, self.codes = patch, codes
        values = 3 * patch * patch
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(values, components))  # orthonormal columns
        self.register_buffer("codebook", torch.zeros(codes, components))
        self.decoder = nn.Sequential(
            nn.Conv2d(components, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, values, 3, padding=1),
        )
        for parameter in self.decoder[-1].parameters():
            nn.init.zeros_(parameter)

    mean: Tensor
    basis: Tensor
    codebook: Tensor

    @property
    def hash(self) -> str:
        """Sixteen hex digits of the codebook: shards and models of different codebooks never meet."""
        return hashlib.sha256(self.codebook.contiguous().numpy().tobytes()).hexdigest()[:16]

    @torch.no_grad()
    def encode(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """Pictures [B, S, S, 3] in 0..255 to tokens [B, N]; S is a multiple of the patch."""
        patches = _to_patches(torch.from_numpy(np.ascontiguousarray(pictures)).to(self.codebook.device), self.patch)
        tokens = nearest(self._project(patches.flatten(0, 1)), self.codebook)
        return tokens.reshape(patches.shape[:2]).cpu().numpy().astype(np.uint16)

    @torch.no_grad()
    def decode(self, tokens: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Tokens [B, N] to pictures [B, S, S, 3]; N is a square number."""
        pictures = self.reconstruct(torch.from_numpy(tokens.astype(np.int64)).to(self.codebook.device))
        return (pictures.clamp(0, 1) * 255).round().byte().cpu().numpy()

    def reconstruct(self, tokens_BN: Tensor) -> Tensor:
        """Tokens to pictures [B, S, S, 3], about 0..1, differentiable in the decoder."""
        side = round(tokens_BN.shape[1] ** 0.5)
        code_BND = self.codebook[tokens_BN]
        correction = self.decoder(code_BND.transpose(1, 2).reshape(len(tokens_BN), -1, side, side)).flatten(2).transpose(1, 2)
        return _from_patches(code_BND @ self.basis.T + self.mean + correction, self.patch)

    def _project(self, patches_PX: Tensor) -> Tensor:
        return (patches_PX - self.mean) @ self.basis

    @torch.no_grad()
    def learn_codes(self, patches_PX: Tensor, generator: torch.Generator) -> None:
        """Principal components and k-means codes of patches [P, values]. A code that nobody uses takes a random patch."""
        self.mean.copy_(patches_PX.mean(0))
        centred = patches_PX - self.mean
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        self.basis.copy_(vectors.flip(1)[:, : self.basis.shape[1]])
        points = centred @ self.basis
        self.codebook.copy_(points[torch.randperm(len(points), generator=generator)[: self.codes]])
        for _ in range(LLOYD_ROUNDS):
            owner = nearest(points, self.codebook)
            sums = torch.zeros_like(self.codebook).index_add_(0, owner, points)
            counts = torch.bincount(owner, minlength=self.codes)
            fresh = points[torch.randint(len(points), (self.codes,), generator=generator)]
            self.codebook.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], fresh))


def train(
    section: TokenizerSection, pictures: NDArray[np.uint8], seed: int, report: Callable[[int, str], None]
) -> PatchTokenizer:
    """Learn codes and decoder from pictures [B, S, S, 3]. `report` hears of every decoder step."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    values = 3 * section.patch**2
    tokenizer = PatchTokenizer(section.patch, section.codes, min(COMPONENTS, values), section.width)
    patches = _to_patches(torch.from_numpy(pictures), section.patch).flatten(0, 1)
    if len(patches) < section.codes:
        raise UserError(
            f"tokenizer.codes: {section.codes} codes from {len(patches)} patches of the training pictures; ask for fewer"
        )
    tokenizer.learn_codes(patches[torch.randperm(len(patches), generator=generator)[:LARGEST_SAMPLE]], generator)
    tokens = torch.from_numpy(tokenizer.encode(pictures).astype(np.int64))
    truth = torch.from_numpy(pictures)
    optimizer = torch.optim.AdamW(tokenizer.decoder.parameters(), lr=section.rate, weight_decay=0.01)
    steps = max(2, section.steps)
    rising = max(0.1, 1.5 / steps)  # a part of a step more than one: the schedule divides by the steps after the first
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, section.rate, total_steps=steps, pct_start=rising)
    for step in range(section.steps):
        batch = torch.randint(len(truth), (min(section.batch, len(truth)),), generator=generator)
        loss = F.mse_loss(tokenizer.reconstruct(tokens[batch]), truth[batch].float() / 255)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        report(step + 1, f"{-10 * loss.log10().item():.1f} dB")
    return tokenizer.eval().requires_grad_(False)


def save(tokenizer: PatchTokenizer, folder: str) -> None:
    """Write the folder; `config.json` last, so that a folder with it is whole."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tokenizer.state_dict().items()}, place / "model.safetensors")
    config = {
        "kind": "patch",
        "patch": tokenizer.patch,
        "codes": tokenizer.codes,
        "components": tokenizer.codebook.shape[1],
        "width": tokenizer.decoder[0].out_channels,
        "hash": tokenizer.hash,
    }
    (place / "config.json").write_text(json.dumps(config, indent=1))


def load(folder: str, config: dict[str, Any]) -> PatchTokenizer:
    """Read a folder that `save` wrote. Raises UserError where its tensors are not those of its config."""
    try:
        tokenizer = PatchTokenizer(config["patch"], config["codes"], config["components"], config["width"])
        tokenizer.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    except Exception as error:
        raise UserError(f"{folder}: not a whole patch tokenizer: {' '.join(str(error).split())}; train it again") from None
    if tokenizer.hash != config["hash"]:
        raise UserError(f"{folder}: its codebook is not the one that config.json names; train the tokenizer again")
    return tokenizer.eval().requires_grad_(False)


def _to_patches(pictures_BSSC: Tensor, patch: int) -> Tensor:
    """[B, S, S, 3] in 0..255 to [B, N, 3 * patch^2] in 0..1, patches in raster order."""
    batch, side = pictures_BSSC.shape[0], pictures_BSSC.shape[1] // patch
    cut = pictures_BSSC.float().div(255).reshape(batch, side, patch, side, patch, 3)
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(batch, side * side, patch * patch * 3)


def _from_patches(patches_BNX: Tensor, patch: int) -> Tensor:
    batch, side = patches_BNX.shape[0], round(patches_BNX.shape[1] ** 0.5)
    laid = patches_BNX.reshape(batch, side, side, patch, patch, 3).permute(0, 1, 3, 2, 4, 5)
    return laid.reshape(batch, side * patch, side * patch, 3)


def nearest(points_PD: Tensor, codebook_VD: Tensor) -> Tensor:
    """Index [P] of the nearest code, in pieces so that no [P, V] matrix of distances is ever whole."""
    norms = (codebook_VD**2).sum(1)
    return torch.cat([(norms - 2 * piece @ codebook_VD.T).argmin(1) for piece in torch.split(points_PD, 8192)])
