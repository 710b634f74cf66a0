"""Named sizes of the decoder: what `model: {size: 80m}` of a recipe stands for. Light: nothing is imported.

Paper and released configs differ. The paper's table 7 gives the 300M an MLP of 2688 and the 1B one of 5504, LVM's numbers; the
configs that its authors released build 2816 and 5632, the next multiples of 256 above 8/3 of the width. These stand here. The
80M has an MLP of 3072 in the paper, with which it has 80M parameters only as a GELU MLP of two matrices, which a LLaMA's is not;
a SwiGLU of 2048 has as many. No config of it was released. `3b` and `7b` are LVM's. `tiny` and `20m` are for CPUs.
"""

from __future__ import annotations


def _size(width: int, layers: int, heads: int, mlp: int) -> dict[str, int]:
    return {"width": width, "layers": layers, "heads": heads, "mlp": mlp}


SIZES: dict[str, dict[str, int]] = {
    "tiny": _size(128, 4, 4, 352),
    "20m": _size(512, 6, 8, 1408),
    "80m": _size(768, 12, 12, 2048),
    "300m": _size(1024, 22, 8, 2816),
    "1b": _size(2048, 22, 16, 5632),
    "3b": _size(3200, 26, 32, 8640),
    "7b": _size(4096, 32, 32, 11008),
}
