"""Training tokenizers of our own: a small `VQModel` with a learnt codebook (`vq`) or a grid of finite scalars (`fsq`).

The network folds squares of pixels into channels, starts as a chain of orthogonal filters (every residual branch at zero) and
trains with Muon on its filters: together worth 6 dB in the few hundred steps that a CPU affords. A codebook comes late: the
network first learns to reconstruct without one, then the codes are k-means centres of its latents, and from there follow them by
moving averages; a code that is hardly used starts again at a latent of the batch. A grid needs none of this.

Where several workers train, each passes its part of the recipe's batch; gradients are averaged, latents gathered, so all hold
the same network and codes, and the pictures of a step do not depend on how many workers there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import TokenizerSection
from lvm_ray.tokenizer import finite
from lvm_ray.tokenizer.patch import nearest
from lvm_ray.tokenizer.vqmodel import Network, VQTokenizer, assemble, latents_of, pixels_of

SPAN = (-1.0, 1.0)  # what a VQModel without `lookup_from_codebook` is taken to see
LARGEST_FOLD = 4
CHANNELS = 16  # of a learnt code
FREE_PART = 0.1  # of the steps before the codebook
LLOYD_ROUNDS = 10
POINTS_A_CODE = 64  # latents that k-means sees, at most
MEMORY = 0.98  # of the codebook's moving averages, a step
DEAD = 0.03  # of the average use: a code below starts again
COMMITMENT = 4.0  # in units of the reconstruction error and the latents' spread: 0.25 costs 1.7 dB
WARMUP = 15  # steps
ADVERSARY_FROM = 0.5  # of the steps
MEASURED = 512  # pictures that the use of the codes is told of

Report = Callable[[int, str], None]


@dataclass(frozen=True)
class Use:
    """How the codes are used: the part of them that occurs, and the perplexity of their frequencies."""

    part: float
    perplexity: float

    @staticmethod
    def of(counts_V: Tensor) -> Use:
        share_V = counts_V.double() / counts_V.sum().clamp(min=1e-12)
        entropy = -torch.special.xlogy(share_V, share_V).sum().item()
        return Use((share_V > DEAD / len(share_V) / 10).double().mean().item(), math.exp(entropy))

    def __str__(self) -> str:
        return f"{self.part:.0%} of the codes used, perplexity {self.perplexity:.0f}"


class Autoencoder(nn.Module):
    """Pictures to pictures by way of codes, differentiable."""

    def __init__(self, network: Network, fold: int, levels: list[int] | None) -> None:
        super().__init__()
        self.network, self.fold, self.levels = network, fold, levels

    def forward(self, pixels_BCSS: Tensor, free: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reconstruction [B, 3, S, S], commitment loss, latents [P, D] and codes [P]. `free` goes round the codes."""
        latents_PD, _ = latents_of(self.network, pixels_BCSS, SPAN, self.fold)
        commitment = latents_PD.new_zeros(())
        if self.levels:
            steps_PD = finite.bound(latents_PD, self.levels)
            codes_P, points_PD = finite.codes_of(steps_PD.detach(), self.levels), finite.points_of(steps_PD, self.levels)
        elif free:
            codes_P, points_PD = torch.zeros(len(latents_PD), dtype=torch.int64, device=latents_PD.device), latents_PD
        else:
            codebook_VD = self.network.quantize.embedding.weight
            codes_P = nearest(latents_PD.detach(), codebook_VD)
            # In units of the latents' own spread, which is nobody's choice.
            commitment = F.mse_loss(latents_PD, codebook_VD[codes_P]) / latents_PD.detach().var(dim=0).mean().clamp(min=1e-6)
            points_PD = latents_PD + (codebook_VD[codes_P] - latents_PD).detach()
        pixels = pixels_of(self.network, points_PD, len(pixels_BCSS), SPAN, self.fold)
        return pixels, commitment, latents_PD.detach(), codes_P


class Codebook:
    """Moves a network's codebook after its latents. All workers see the same latents, so all move it alike."""

    def __init__(self, vectors_VD: Tensor, generator: torch.Generator) -> None:
        self.vectors_VD, self.generator = vectors_VD, generator
        self.counts_V = torch.zeros(len(vectors_VD))
        self.sums_VD = torch.zeros_like(vectors_VD)
        self.revived = 0

    def start(self, points_PD: Tensor) -> None:
        """K-means centres of these latents. A code that nobody owns takes a random one."""
        codes = len(self.vectors_VD)
        self.vectors_VD.copy_(self._drawn(points_PD, codes, distinct=True))
        for _ in range(LLOYD_ROUNDS):
            owner_P = nearest(points_PD, self.vectors_VD)
            counts_V, sums_VD = _owned(points_PD, owner_P, codes)
            means_VD = sums_VD / counts_V.clamp(min=1)[:, None]
            self.vectors_VD.copy_(torch.where(counts_V[:, None] > 0, means_VD, self._drawn(points_PD, codes)))
        self.counts_V = torch.ones_like(self.counts_V)
        self.sums_VD = self.vectors_VD.clone()

    def follow(self, points_PD: Tensor, codes_P: Tensor) -> None:
        """One step of the moving averages, counted in average uses of a code; dead codes start again at a latent."""
        counts_V, sums_VD = _owned(points_PD, codes_P, len(self.vectors_VD))
        unit = len(points_PD) / len(self.vectors_VD)
        self.counts_V = torch.lerp(counts_V / unit, self.counts_V, MEMORY)
        self.sums_VD = torch.lerp(sums_VD / unit, self.sums_VD, MEMORY)
        dead_V = self.counts_V < DEAD
        self.revived += int(dead_V.sum())
        fresh_VD = self._drawn(points_PD, len(self.vectors_VD))
        self.counts_V = torch.where(dead_V, 0.5, self.counts_V)
        self.sums_VD = torch.where(dead_V[:, None], 0.5 * fresh_VD, self.sums_VD)
        self.vectors_VD.copy_(self.sums_VD / self.counts_V[:, None])

    def _drawn(self, points_PD: Tensor, count: int, distinct: bool = False) -> Tensor:
        if distinct and len(points_PD) >= count:
            return points_PD[torch.randperm(len(points_PD), generator=self.generator)[:count]]
        return points_PD[torch.randint(len(points_PD), (count,), generator=self.generator)]


def train(
    section: TokenizerSection, pictures: NDArray[np.uint8], seed: int, precision: str, report: Report
) -> tuple[VQTokenizer, dict[str, float]]:
    """Learn a tokenizer from pictures [B, S, S, 3], and what is worth keeping of it: use and perplexity of its codes.

    Part of a group of workers where torch.distributed is initialised. `report` hears of every step.
    Raises UserError where the pictures have fewer squares than there are codes.
    """
    squares = pictures.shape[0] * (pictures.shape[1] // section.patch) ** 2
    if not section.levels and squares < section.codes:
        raise UserError(f"tokenizer.codes: {section.codes} codes from {squares} squares of the training pictures; ask for fewer")
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    assert section.batch % workers == 0
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = build(section)
    model = Autoencoder(network, fold_of(section), section.levels)
    trained: nn.Module = DistributedDataParallel(model) if dist.is_initialized() else model
    codebook = Codebook(network.quantize.embedding.weight.data, generator)
    optimizers = _optimizers(network, section)
    adversary = Adversary(section) if section.adversarial else None
    free_steps = 0 if section.levels else round(FREE_PART * section.steps)
    counts_V, each = torch.zeros(section.codes), section.batch // workers
    seen: list[Tensor] = []
    for step in range(section.steps):
        chosen = torch.randint(len(pictures), (section.batch,), generator=generator)[rank * each : (rank + 1) * each]
        pixels_BCSS = torch.from_numpy(pictures[chosen.numpy()]).permute(0, 3, 1, 2).float() / 255
        free = step < free_steps
        if step == free_steps and not section.levels:
            codebook.start(torch.cat(seen) if seen else _gathered(_latents(model, pixels_BCSS)))
            seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            decoded, commitment, latents_PD, codes_P = trained(pixels_BCSS, free)
        error = F.mse_loss(decoded, pixels_BCSS)
        loss = error + COMMITMENT * error.detach() * commitment
        if adversary and step >= ADVERSARY_FROM * section.steps:
            loss = loss + section.adversarial * adversary.fooled(decoded)
        _step(optimizers, loss, step, section)
        if adversary and step >= ADVERSARY_FROM * section.steps:
            adversary.learn(pixels_BCSS, decoded.detach())
        latents_PD, codes_P = _gathered(latents_PD), _gathered(codes_P)
        if free:
            seen = [*seen, latents_PD][-max(1, POINTS_A_CODE * section.codes // len(latents_PD)) :]
        else:
            counts_V = torch.lerp(torch.bincount(codes_P, minlength=section.codes).float(), counts_V, MEMORY)
            if not section.levels:
                codebook.follow(latents_PD, codes_P)
        decibels = f"{-10 * math.log10(max(error.item(), 1e-10)):.1f} dB"
        report(step + 1, decibels if free else f"{decibels}, {Use.of(counts_V)}")
    tokenizer = VQTokenizer(network, SPAN, section.levels)
    return tokenizer, _measured(tokenizer, pictures, codebook.revived)


def build(section: TokenizerSection) -> Network:
    """A fresh network: as many halvings as the patch needs beyond the fold, channels doubling with each."""
    fold = fold_of(section)
    blocks = (section.patch // fold).bit_length()
    channels = len(section.levels) if section.levels else CHANNELS
    config = {
        "in_channels": 3 * fold**2,
        "out_channels": 3 * fold**2,
        "block_out_channels": [section.width * 2 ** min(block, 2) for block in range(blocks)],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": 1,
        "latent_channels": channels,
        "num_vq_embeddings": section.codes,
        "norm_num_groups": math.gcd(8, section.width),
        "mid_block_add_attention": False,
        "force_upcast": True,
    }
    network = assemble(config, None, "tokenizer")
    for name, parameter in network.named_parameters():
        if ".conv2." in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim == 4:
            nn.init.orthogonal_(parameter)
    network.quantize.embedding.weight.requires_grad_(False)
    if section.levels:
        network.quantize.embedding.weight.copy_(finite.grid(section.levels))
    return network


def fold_of(section: TokenizerSection) -> int:
    """Side of the squares of pixels that become channels before the network: at least one halving is left to it."""
    return min(LARGEST_FOLD, section.patch // 2)


class Adversary:
    """A small discriminator of patches: told by hinge losses which pictures are true, it makes decoded ones look so."""

    def __init__(self, section: TokenizerSection) -> None:
        widths = (3, section.width, 2 * section.width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.network = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), section.rate / 10, betas=(0.5, 0.9))

    def fooled(self, decoded: Tensor) -> Tensor:
        """The decoder's loss: how false its pictures look."""
        self.network.requires_grad_(False)
        loss: Tensor = -self.network(decoded * 2 - 1).mean()
        self.network.requires_grad_(True)
        return loss

    def learn(self, true: Tensor, decoded: Tensor) -> None:
        """One step on true and decoded pictures, averaged over the workers."""
        loss = F.relu(1 - self.network(true * 2 - 1)).mean() + F.relu(1 + self.network(decoded * 2 - 1)).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in self.network.parameters():
            if dist.is_initialized() and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        self.optimizer.step()


Optimizers = tuple[torch.optim.Muon, torch.optim.AdamW, list[tuple[nn.Parameter, nn.Parameter]]]


def _optimizers(network: Network, section: TokenizerSection) -> Optimizers:
    """Muon for the filters, each seen as the matrix that it shares its memory with, and AdamW for norms and biases."""
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    matrices = [(filters, nn.Parameter(filters.data.view(len(filters), -1))) for filters in learnt if filters.ndim == 4]
    return (
        torch.optim.Muon([matrix for _, matrix in matrices], section.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([other for other in learnt if other.ndim < 4], section.rate, betas=(0.9, 0.99), weight_decay=0.0),
        matrices,
    )


def _step(optimizers: Optimizers, loss: Tensor, step: int, section: TokenizerSection) -> None:
    """One step of both optimizers; the rate rises over WARMUP steps and falls linearly to almost nothing."""
    muon, adam, matrices = optimizers
    adam.zero_grad()
    for filters, _ in matrices:
        filters.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    for filters, matrix in matrices:
        assert filters.grad is not None
        matrix.grad = filters.grad.reshape(matrix.shape)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["lr"] = section.rate * min(1, (step + 1) / WARMUP) * max(0.02, 1 - step / section.steps)
        optimizer.step()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _latents(model: Autoencoder, pixels_BCSS: Tensor) -> Tensor:
    return latents_of(model.network, pixels_BCSS, SPAN, model.fold)[0]


def _owned(points_PD: Tensor, owner_P: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many points each code owns, and their sums."""
    sums_VD = torch.zeros(codes, points_PD.shape[1]).index_add_(0, owner_P, points_PD)
    return torch.bincount(owner_P, minlength=codes).float(), sums_VD


def _gathered(part: Tensor) -> Tensor:
    """All workers' parts in one, in the order of the workers, which is that of the batch."""
    if not dist.is_initialized():
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def _measured(tokenizer: VQTokenizer, pictures: NDArray[np.uint8], revived: int) -> dict[str, float]:
    """Use of the codes on training pictures spread evenly over all of them."""
    tokens = tokenizer.encode(pictures[np.linspace(0, len(pictures) - 1, min(MEASURED, len(pictures))).astype(int)])
    use = Use.of(torch.bincount(torch.from_numpy(tokens.astype(np.int64)).flatten(), minlength=tokenizer.codes))
    return {"use": round(use.part, 4), "perplexity": round(use.perplexity, 1), "revived": revived}
