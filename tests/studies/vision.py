"""A vision network to learn from: a small ResNet that was taught to name what stands where in the drawn scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from lvm_ray.data.synthetic import CLASSES
from lvm_ray.train.features import IMAGENET_DEVIATION, IMAGENET_MEAN

STEPS, BATCH, RATE = 150, 32, 2e-3
STRIDE = 8  # pixels of one of its places, as of a token
WIDTHS = (32, 64)
SHAPE = ResNetConfig(embedding_size=32, hidden_sizes=list(WIDTHS), depths=[1, 2], layer_type="basic")


def train_network(source: Path, folder: Path, seed: int) -> float:
    """Teach it the commonest class of every square of 8 pixels, from the training scenes of segmentation below `source`, and keep
    it in `folder` as Hugging Face does. The share of squares of the last tenth of the scenes that it names rightly."""
    pictures, masks = (_read(source / "train" / "segmentation" / part) for part in ("images", "masks"))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    pixels_P3SS = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / deviation
    shares_PCGG = F.avg_pool2d(F.one_hot(torch.from_numpy(masks).long(), len(CLASSES) + 1).permute(0, 3, 1, 2).float(), STRIDE)
    names_PGG = shares_PCGG.argmax(dim=1)
    torch.manual_seed(seed)
    network = ResNetModel(SHAPE)
    head = torch.nn.Conv2d(WIDTHS[-1], len(CLASSES) + 1, 1)
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    generator, kept = torch.Generator().manual_seed(seed), len(pixels_P3SS) * 9 // 10
    for _ in range(STEPS):
        chosen = torch.randint(0, kept, (BATCH,), generator=generator)
        loss = F.cross_entropy(head(network(pixels_P3SS[chosen]).last_hidden_state), names_PGG[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        found = head(network(pixels_P3SS[kept:]).last_hidden_state).argmax(dim=1)
    network.save_pretrained(folder)
    return float((found == names_PGG[kept:]).float().mean())


def _read(folder: Path) -> NDArray[np.uint8]:
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))])
