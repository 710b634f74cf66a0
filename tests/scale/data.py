"""From images to rows of tokens: hours of tokenizing, and what drivers and readers hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lvm_ray.data import listing
from tests.scale import simulate
from tests.scale.inputs import measured, value
from tests.scale.workload import HOUR, IMAGES, PICTURES, SENTENCES, SIZE, cores, image_tokens, nodes, tokens

# diffusers' names for the published tokenizer's network (MUSE's VQGAN, f = 16).
PUBLISHED = {
    "block_out_channels": (128, 128, 256, 512, 768),
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "layers_per_block": 2,
    "latent_channels": 64,
    "vq_embed_dim": 64,
    "num_vq_embeddings": 8192,
    "norm_num_groups": 32,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}

# Tokenizing.


def encoder_operations() -> float:
    """Floating-point operations of the published tokenizer's encoder for a picture, its convolutions and the nearest codes."""
    widths, layers, side = PUBLISHED["block_out_channels"], PUBLISHED["layers_per_block"], SIZE
    total = _convolution(3, widths[0], side)
    before = widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers):
            total += _block(before if layer == 0 else width, width, side)
        before = width
        if level + 1 < len(widths):
            side //= 2
            total += _convolution(width, width, side)
    total += 2 * _block(before, before, side)  # the middle
    latent = PUBLISHED["latent_channels"]
    total += _convolution(before, latent, side) + _convolution(latent, latent, side, kernel=1)
    return total + 2 * side**2 * latent * PUBLISHED["num_vq_embeddings"]


def _block(before: int, width: int, side: int) -> float:
    shortcut = _convolution(before, width, side, kernel=1) if before != width else 0.0
    return _convolution(before, width, side) + _convolution(width, width, side) + shortcut


def _convolution(before: int, width: int, side: int, kernel: int = 3) -> float:
    return 2.0 * kernel**2 * before * width * side**2


def pictures_a_gpu(precision: str) -> float:
    """Pictures a second that a GPU encodes."""
    return value(f"gpu_{precision}") * value("convolution_share") / encoder_operations()


def unit_items() -> int:
    """Images of a unit of work, one copy each."""
    return listing.unit_length(IMAGES, 1)


def units() -> int:
    return -(-IMAGES // unit_items())


@dataclass(frozen=True)
class Tokenizing:
    """Hours that each part of the work would take if it were the only one.

    listing  the driver, before anybody works
    encode   the tokenizer's network
    read     decoding and drawing on the cores
    wait     for the object store; 0 where files lie on disks
    storage  the photos' bytes into the nodes
    tail     at the end, when some actors still have a unit and the others have none
    """

    listing: float
    encode: float
    read: float
    wait: float
    storage: float
    tail: float

    @property
    def total(self) -> float:
        return self.listing + self.together + self.tail

    @property
    def together(self) -> float:
        """One thread reads, draws and encodes, one after the other."""
        return self.encode + self.read + self.wait


class TokenizingThen(Tokenizing):
    """With the changes: cores read and draw beside GPUs that encode."""

    @property
    def together(self) -> float:
        return max(self.encode, self.read, self.storage)


def tokenizing(gpus: int, changed: bool = False, remote: bool = False) -> Tokenizing:
    """`remote`: photos in tars of an object store; otherwise on disks that every node reads."""
    actors = gpus if changed else round(cores(gpus))
    listed = 0.0 if changed else IMAGES * measured("list_item") / HOUR
    wait = 0.0
    if remote and not changed:
        # A photo and what its label is drawn from: two members of a tar, each listed twice and read once.
        listed += 2 * 2 * IMAGES * measured("header_requests") * value("request") / HOUR
        wait = 2 * IMAGES * measured("read_requests") * value("request") / cores(gpus) / HOUR
    encode = 1 / (gpus * pictures_a_gpu("bf16")) if changed else measured("encode_core") / cores(gpus)
    parts = {
        "listing": listed,
        "encode": IMAGES * PICTURES * encode / HOUR,
        "read": IMAGES * measured("decode_core") / cores(gpus) / HOUR,
        "wait": wait,
        "storage": IMAGES * value("image_bytes") / (nodes(gpus) * value("node_storage")) / HOUR,
    }
    kind = TokenizingThen if changed else Tokenizing
    return kind(**parts, tail=kind(**parts, tail=0.0).together * tail_part(actors))


@lru_cache(maxsize=8)
def tail_part(actors: int) -> float:
    """What the end of a tokenizing takes beyond an even share, as a part of that: simulated, with units of a heavy tail."""
    times = simulate.unit_times(units(), np.random.default_rng(0))
    return simulate.drain(times, actors) / (float(times.sum()) / actors) - 1


def unit_seconds(gpus: int, changed: bool) -> float:
    """Of a unit of the mean, by one actor."""
    actors = gpus if changed else cores(gpus)
    return tokenizing(gpus, changed).together * HOUR * actors / units()


def readers_needed() -> float:
    """Photos that must be under way at once to keep a GPU busy out of an object store (Little's law)."""
    return pictures_a_gpu("bf16") / PICTURES * measured("read_requests") * value("request")


def cores_needed() -> float:
    """Cores that decode for one GPU that encodes in bf16."""
    return pictures_a_gpu("bf16") / PICTURES * measured("decode_core")


def files() -> int:
    """Of the data set, for one copy."""
    return units()


def shard_bytes() -> float:
    return tokens() * value("bytes_per_token")


# What the driver, and every reader, holds.


@dataclass(frozen=True)
class Driver:
    """Bytes and seconds of what does not shrink with the number of GPUs. `reader_*` are those of each process that reads rows."""

    plan_bytes: float
    plan_seconds: float
    packed_bytes: float
    manifest_bytes: float
    manifest_seconds: float
    reader_bytes: float
    reader_tokens: float
    reader_names: float
    reader_order: float
    reader_seconds: float


def driver() -> Driver:
    return Driver(
        plan_bytes=SENTENCES * measured("plan_bytes"),
        plan_seconds=SENTENCES * measured("plan_seconds"),
        packed_bytes=SENTENCES * measured("packed_bytes"),
        manifest_bytes=files() * measured("manifest_bytes"),
        manifest_seconds=files() * measured("manifest_seconds"),
        reader_bytes=IMAGES * measured("reader_held"),
        reader_tokens=IMAGES * 2.0 * PICTURES * image_tokens(),
        reader_names=IMAGES * (49 + value("id_bytes") + 8),  # a Python string of one-byte characters, and its place in a list
        reader_order=IMAGES * measured("sentences_bytes"),
        reader_seconds=IMAGES * measured("sentences_seconds"),
    )


def most_images(readers: int) -> float:
    """Images at which so many reader processes fill a node's memory."""
    return value("node_memory") / readers / measured("reader_held")
