"""Objects as regions of an image, painted into one mask of ids: largest first, so that small ones are not covered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lvm_ray.sources.base import Region


def paint(
    regions: Sequence[Region], height: int, width: int, identity: Callable[[int, Region], int], elsewhere: int = 0
) -> NDArray[np.uint8]:
    """A mask uint8 [height, width]: each pixel holds the id of the smallest region there, `elsewhere` where there is none.

    `identity` gives the id of a region by its rank, 0 the largest. One region is decoded at a time.
    """
    from pycocotools import mask as coco

    ids = np.full((height, width), elsewhere, np.uint8)
    for rank, region in enumerate(sorted(regions, key=lambda region: -region.area)):
        ids[coco.decode(region.rle).astype(bool)] = identity(rank, region)
    return ids
