"""Tokenizers: pictures to tokens and back. One folder each, named by the `kind` in its `config.json`.

    patch        k-means codes of patches with a learned decoder (`patch.py`): seconds
    vq, fsq      a small VQModel of our own (`training.py`, `launch.py`): minutes
    published    one that others trained, read once (`published.py`, `muse.py`)

`load_tokenizer` gives an object with `codes`, `patch`, `hash`, `codebook` [V, D], `encode` and `decode`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lvm_ray.config import Recipe
from lvm_ray.errors import BadItem, UserError
from lvm_ray.json_file import read_object
from lvm_ray.recipe_sections import TokenizerSection
from lvm_ray.seeds import stable_hash
from lvm_ray.tasks.base import Task
from lvm_ray.threads import torch_threads

KINDS = ("patch", "vq", "fsq", "published")
AGAIN = "make the tokenizer again"

Report = Callable[[int, str], None]  # steps done, and a note


class Tokenizer(Protocol):
    """What the rest of the system needs of a tokenizer."""

    codes: int
    patch: int

    @property
    def hash(self) -> str: ...

    @property
    def codebook(self) -> Any:
        """Float32 tensor [V, D]."""

    def encode(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """[B, S, S, 3] -> [B, N]."""

    def decode(self, tokens: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """[B, N] -> [B, S, S, 3]."""

    def to(self, device: str) -> Any:
        """Itself, computing on another device."""


def on_gpu(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer on this process's GPU, in whole fp32. (Another kind of device may still decide near ties otherwise.)

    Raises UserError where torch finds no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"placement.tokenize: GPU is asked for, and torch finds none on node {os.uname().nodename}: leave it out, or "
            "install a build of torch for the node's GPUs"
        )
    torch.backends.cudnn.allow_tf32 = False  # products of ten bits would make other tokens
    moved: Tokenizer = tokenizer.to("cuda")
    return moved


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a folder. Raises UserError where there is none, or one of an unknown kind."""
    config = read_config(folder)
    if config["kind"] == "patch":
        from lvm_ray.tokenizer import patch

        return patch.load(folder, config)
    from lvm_ray.tokenizer import vqmodel

    return vqmodel.load(folder, config)


def is_trained(recipe: Recipe) -> bool:
    """Whether the pipeline folder holds a tokenizer. Raises UserError where it is not the one that the recipe describes."""
    path = Path(recipe.tokenizer_folder) / "config.json"
    if not path.is_file():
        return False
    load_tokenizer(recipe.tokenizer_folder)
    found = read_config(recipe.tokenizer_folder)
    published = recipe.tokenizer.kind == "published"  # its source may be a folder of ours, of another kind
    for key in ("patch", "codes", "source") if published else ("kind", "patch", "codes", "levels", "source"):
        wanted = getattr(recipe.tokenizer, key)
        if found.get(key) != wanted:
            raise UserError(
                f"{path}: its {key} is {found.get(key)}, the recipe's tokenizer.{key} is {wanted}; "
                "remove the folder to make another tokenizer, or use another --run"
            )
    wanted = recipe.tokenizer.range
    if wanted is not None and found.get("range") != list(wanted):
        raise UserError(
            f"{path}: its range is {found.get('range')}, the recipe's tokenizer.range is {list(wanted)}; "
            "remove the folder to make another tokenizer, or use another --run"
        )
    return True


def train_tokenizer(recipe: Recipe, report: Report) -> None:
    """Make the recipe's tokenizer and save it: read the published one, or train one on the training pictures, images and
    label pictures of all tasks alike. `report` hears how many steps are done, and how well.

    Raises UserError where a task has no usable training item, and where a published tokenizer cannot be used.
    """
    section, folder = recipe.tokenizer, recipe.tokenizer_folder
    if section.kind == "published":
        _take_over(section, folder)
        return
    pairs = max(1, section.pictures // (2 * len(recipe.tasks)))
    pictures = np.concatenate([sample_pictures(recipe, name, pairs) for name in recipe.tasks])
    if section.kind == "patch":
        import torch

        from lvm_ray.tokenizer import patch

        # With the recipe's threads, and not with those that a training before it has left to this process.
        with torch_threads(recipe.compute.threads or torch.get_num_threads()):
            patch.save(patch.train(section, pictures, recipe.seed, report), folder)
    else:
        from lvm_ray.tokenizer import launch

        launch.train(recipe, pictures, report)


def _take_over(section: TokenizerSection, folder: str) -> None:
    """Keep a published tokenizer, or one that another run has trained, in a folder of this run."""
    source = section.source
    assert source is not None
    path = Path(source) / "config.json"
    if not path.is_file() or "kind" not in read_object(path, "get the tokenizer again"):
        from lvm_ray.tokenizer import published, vqmodel

        vqmodel.save(published.read(section), folder, section.kind, {"source": source})
        return
    require_described(load_tokenizer(source), section, source)
    copy = Path(f"{folder}.new")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    (copy / "config.json").write_text(json.dumps({**read_config(source), "source": source}, indent=1))
    copy.rename(folder)


def require_described(tokenizer: Tokenizer, section: TokenizerSection, source: str) -> None:
    """Raises UserError where a published tokenizer's patch or codes are not the recipe's."""
    for key in ("patch", "codes"):
        found, wanted = getattr(tokenizer, key), getattr(section, key)
        if found != wanted:
            raise UserError(f"{source}: its {key} is {found}, the recipe's tokenizer.{key} is {wanted}: set it to {found}")


def sample_pictures(recipe: Recipe, name: str, pairs: int) -> NDArray[np.uint8]:
    """About `pairs` training pairs of a task as pictures [2 x pairs, S, S, 3]: distinct items first, then further copies."""
    task = recipe.tasks[name]
    assert isinstance(task, Task)
    count = sum(1 for _ in task.items("train"))
    if not count:
        raise UserError(f"tasks.{name}.train: missing: the tokenizer and the model learn from training pairs")
    places = np.random.default_rng([recipe.seed, stable_hash(name)]).permutation(count)[:pairs].tolist()
    wanted = frozenset(places)  # a second pass instead of a list: the items of a large data set fill no memory
    found = {place: item for place, item in enumerate(task.items("train")) if place in wanted}
    chosen = [found[place] for place in places]
    pictures: list[NDArray[np.uint8]] = []
    reasons: list[str] = []
    for item in chosen:
        try:
            sample = task.load(item, "train")
        except BadItem as error:
            reasons.append(str(error))
            continue
        for copy in range(-(-pairs // len(chosen)) if task.copies > 1 else 1):
            pictures += task.see(sample, copy, [recipe.seed, stable_hash(name, "tokenizer", item.id)], recipe.size).pictures
    if not pictures:
        raise UserError(f"tasks.{name}.train: none of {len(chosen)} items can be read; the first: {reasons[0]}")
    return np.stack(pictures)


def read_config(folder: str) -> dict[str, Any]:
    """What a tokenizer folder's config.json says. Raises UserError where there is none, or one of no kind that is known."""
    path = Path(folder) / "config.json"
    config = read_object(path, AGAIN, "no tokenizer here: run `lvm-ray tokenize` first")
    if config.get("kind") not in KINDS:
        raise UserError(f"{path}: kind is {config.get('kind')!r}; known: {', '.join(KINDS)}")
    return config
