"""Published tokenizers: a local folder or a hub's name, read once and kept in our own tokenizer folder.

A source is a diffusers `VQModel` folder (weights in safetensors), one with such a folder in `vqvae` as aMUSEd ships it, or an
open-muse `VQGANModel` folder as DeLVM and LVM use it (`muse`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lvm_ray.errors import UserError
from lvm_ray.json_file import read_object
from lvm_ray.recipe_sections import TokenizerSection
from lvm_ray.tokenizer import muse, require_described
from lvm_ray.tokenizer.vqmodel import WEIGHTS, VQTokenizer, read_network

PLACES = (".", "vqvae")  # below the source: where its config.json may stand
CHANNELS = 3
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read(section: TokenizerSection) -> VQTokenizer:
    """The tokenizer of `section.source`.

    Raises UserError where there is no such source, where it holds something else or is not whole, and where its patch or
    its codes are not the recipe's.
    """
    assert section.source is not None
    folder, config = _find(section.source)
    if config["_class_name"] == muse.CLASS:
        network, span = muse.convert(folder), muse.RANGE
    else:
        network = read_network(folder)
        # aMUSEd's networks came with this key, and with pixels in 0..1; those before it saw -1..1.
        span = (0.0, 1.0) if network.config.lookup_from_codebook else (-1.0, 1.0)
    if section.range is not None:
        span = section.range
    if network.config.in_channels != CHANNELS:
        raise UserError(
            f"{section.source}: its network takes {network.config.in_channels} channels, not a picture's {CHANNELS}: "
            "of a tokenizer that lvm-ray trained name the folder above, which says how to use it"
        )
    tokenizer = VQTokenizer(network, span)
    require_described(tokenizer, section, section.source)
    return tokenizer


def _find(source: str) -> tuple[Path, dict[str, Any]]:
    """The folder with the network, and its config."""
    if Path(source).is_dir():
        root = Path(source)
    elif HUB_NAME.fullmatch(source) and not source.startswith("."):
        root = _fetch(source, [f"{place}/config.json".removeprefix("./") for place in PLACES])
    else:
        raise UserError(f"tokenizer.source: {source}: no such folder, and no name of a hub either (owner/name)")
    for place in PLACES:
        path = root / place / "config.json"
        config = read_object(path, "get the tokenizer again") if path.is_file() else {}
        if config.get("_class_name") in ("VQModel", muse.CLASS):
            if not Path(source).is_dir():
                weights = muse.WEIGHTS if config["_class_name"] == muse.CLASS else WEIGHTS
                root = _fetch(source, [f"{place}/{weights}".removeprefix("./"), f"{place}/config.json".removeprefix("./")])
            return root / place, config
    raise UserError(f"{source}: no tokenizer here: its config.json, or that of its vqvae folder, names no VQModel or VQGANModel")


def _fetch(name: str, files: list[str]) -> Path:
    """A hub's files in its local cache. Raises UserError where the hub does not answer or has none of that name."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of the client, of its HTTP library, of the network: none is ours
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tokenizer.source: {name}: no such folder, and the hub cannot give it ({reason}): check the name and the network, "
            "or name a local folder"
        ) from None
