"""How alike two pictures are: PSNR and SSIM, as the restoration literature computes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lvm_ray.tasks.base import Picture

SSIM_WINDOW = 11  # pixels a side (Wang et al. 2004)


def luma(picture: Picture) -> NDArray[np.float64]:
    """The Y of ITU-R BT.601 in 16..235, as MATLAB's rgb2ycbcr and the deraining literature compute it: [H, W]."""
    return np.asarray(16 + (picture @ np.array([65.481, 128.553, 24.966])) / 255)


def psnr(answer: NDArray[np.generic], truth: NDArray[np.generic]) -> float:
    """Peak signal-to-noise ratio in dB, peak 255; 100 where they are equal. Any shape: pixels of RGB, or one channel."""
    error = float(np.mean((answer.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


def psnr_y(answer: Picture, truth: Picture) -> float:
    """The PSNR of the Y channels."""
    return psnr(luma(answer), luma(truth))


def ssim_y(answer: Picture, truth: Picture) -> float:
    """Structural similarity of the Y channels: 11x11 Gaussian window of deviation 1.5, as published (Wang et al. 2004)."""
    return float(ssim_map_y(answer, truth).mean())


def ssim_map_y(answer: Picture, truth: Picture) -> NDArray[np.float64]:
    """The SSIM of the Y channels around every pixel whose window lies in the picture: [H - 10, W - 10]."""
    from skimage.metrics import structural_similarity

    _, values = structural_similarity(  # type: ignore[no-untyped-call]
        luma(answer), luma(truth), data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    border = SSIM_WINDOW // 2
    return np.asarray(values[border:-border, border:-border])
