"""What a frozen vision network sees in the images of a sentence, for a student to arrange its own states alike.

A network that was trained on photos knows what belongs together; a student of tokens finds that out from its few pairs. The
term compares, for each image of a sentence, how alike the network finds its places with how alike the student's states of one
layer are there: 1 - CKA, the centred kernel alignment of the two (linear kernels; Kornblith et al. 2019). It asks for no layer
between the two widths, so nothing is trained, sharded or saved beside the student.

The network sees what the tokens say: each image through the tokenizer's decoder. Label pictures are drawings that no such
network was made for, so they are left out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import FeaturesSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lvm_ray.tokenizer import Tokenizer

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # where a folder does not say its own
UNUSED = ("pooler.", "classifier.", "head.")  # what sums a picture up; a published network may have it or not


class Architecture(NamedTuple):
    """One kind of vision network: its class in transformers, and how many pixels one of its places stands for."""

    model: str
    stride: Callable[[Any], int]
    options: Mapping[str, bool] = MappingProxyType({})


NETWORKS = {
    "convnext": Architecture("ConvNextModel", lambda config: config.patch_size * 2 ** (len(config.depths) - 1)),
    "dinov2": Architecture("Dinov2Model", lambda config: config.patch_size),
    "resnet": Architecture(
        "ResNetModel", lambda config: 4 * 2 ** (len(config.depths) - 1 + bool(config.downsample_in_first_stage))
    ),
    "vit": Architecture("ViTModel", lambda config: config.patch_size, {"interpolate_pos_encoding": True}),
}


class Features(NamedTuple):
    """What is compared, and how much it weighs.

    see     image tokens int64 [P, N] -> features [P, N, F], no gradient
    weight  of the term in the loss
    layer   of the student, whose states are compared
    """

    see: Callable[[torch.Tensor], torch.Tensor]
    weight: float
    layer: int


class VisionNetwork:
    """A frozen network behind a tokenizer's decoder: image tokens int64 [P, N] -> features [P, N, F], one a token.

    Pictures are enlarged or reduced so that the network has a place for each token.
    """

    def __init__(self, section: FeaturesSection, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device) -> None:
        self._kind, self._tokenizer = NETWORKS[section.network], tokenizer
        self._model = load_network(section).to(device, dtype).eval().requires_grad_(False)  # type: ignore[arg-type]
        self._stride = self._kind.stride(self._model.config)
        mean, deviation = _normalisation(Path(section.weights))
        self._mean, self._deviation = (torch.tensor(values).view(3, 1, 1).to(device) for values in (mean, deviation))
        self._dtype, self._device = dtype, device

    @torch.no_grad()
    def __call__(self, tokens_PN: torch.Tensor) -> torch.Tensor:
        grid = round(tokens_PN.shape[1] ** 0.5)
        pictures = self._tokenizer.decode(tokens_PN.cpu().numpy().astype(np.uint16))
        pixels_P3SS = torch.from_numpy(pictures).to(self._device).permute(0, 3, 1, 2).float() / 255
        side = grid * self._stride
        if side != pixels_P3SS.shape[-1]:
            pixels_P3SS = F.interpolate(pixels_P3SS, (side, side), mode="bilinear", antialias=True)
        pixels_P3SS = ((pixels_P3SS - self._mean) / self._deviation).to(self._dtype)
        found: torch.Tensor = self._model(pixels_P3SS, **self._kind.options).last_hidden_state
        # A transformer's first place stands for the whole picture.
        return found.flatten(2).transpose(1, 2) if found.ndim == 4 else found[:, -grid * grid :]


def alignment(one_PND: torch.Tensor, other_PNE: torch.Tensor) -> torch.Tensor:
    """Centred kernel alignment of two descriptions of the same N places, for each of P pictures: [P] in 0..1, in float32.

    1 where one is the other turned, mirrored and scaled as a whole; the widths may differ. Where a description is the same at all
    places there is nothing to compare, and the alignment is 0.
    """
    kernels = []
    for values in (one_PND, other_PNE):
        values = values.float() if values.dtype != torch.float64 else values
        values = values - values.mean(dim=1, keepdim=True)
        kernels.append((values @ values.transpose(1, 2)).flatten(1))
    first, second = kernels
    return F.cosine_similarity(first, second, dim=1)


def layer_of(recipe: Recipe, section: FeaturesSection) -> int:
    """The student's layer whose states are compared: the one in the middle, where the recipe names none."""
    return section.layer if section.layer is not None else (recipe.model.layers - 1) // 2


def load_network(section: FeaturesSection) -> PreTrainedModel:
    """The network of a folder, in float32: safetensors alone are read.

    Raises UserError where it cannot be read, and where a weight is missing.
    """
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, found = getattr(transformers, NETWORKS[section.network].model).from_pretrained(
            section.weights, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"distill.features.weights: {section.weights}: cannot be read ({reason}): copy the network again"
        ) from None
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(UNUSED))
    if missing:
        raise UserError(
            f"distill.features.weights: {section.weights}/model.safetensors: lacks weight {missing[0]} ({len(missing)} such): "
            f"name the folder of a whole {section.network}"
        )
    network: PreTrainedModel = model
    return network


def _normalisation(folder: Path) -> tuple[Any, Any]:
    """Mean and deviation of each colour that a network was trained with, of values 0..1."""
    try:
        said = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        return said["image_mean"], said["image_std"]
    except (OSError, ValueError, KeyError, TypeError):
        return IMAGENET_MEAN, IMAGENET_DEVIATION
