"""Writing labels that were read back, in the formats that their users have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def save_mask(mask: NDArray[np.uint8], colours: NDArray[np.uint8], path: str) -> str:
    """A mask [H, W] of ids as an indexed PNG in `colours` [C, 3]; the path."""
    image = Image.fromarray(mask, mode="P")
    filled = np.zeros((256, 3), dtype=np.uint8)
    filled[: len(colours)] = colours
    image.putpalette(filled.tobytes())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path
