"""A run's checkpoint as a stock folder: `lvm-ray export RUN --format hf --out DIR [--step N]`.

DIR is what RUN/model is when a run is done: a `LlamaForCausalLM` in safetensors that any program loads, codebook and
projection folded into its embedding, and `image_tokenizer.json`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import lvm_ray.tokenizer
from lvm_ray import config
from lvm_ray.errors import UserError


def export_model(run: str, out: str, step: int | None = None) -> Path:
    """Write a run's newest checkpoint, or that of a step, as the stock folder `out`; the checkpoint's folder.

    Raises UserError where there is no such run or checkpoint, where its tokenizer is not that of its training, and where `out`
    is not empty.
    """
    place = Path(run) / "config.yaml"
    if not place.is_file():
        raise UserError(f"{run}: no config.yaml here, so not a run: --format hf takes the folder of a run")
    recipe = config.load(str(place), run=str(run))
    if recipe.teacher is not None:
        raise UserError(f"{run}: a pipeline: name one of its runs, {run}/teacher or {run}/student")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UserError(f"--out {out}: is there already: name a new folder")

    from lvm_ray.data.shards import open_shards
    from lvm_ray.model.folder import TOKENIZER_FILE, read_tokenizer
    from lvm_ray.train import checkpoint, launch
    from lvm_ray.train.job import tokenizer_folder

    found = checkpoint.latest(run) if step is None else Path(run) / checkpoint.FOLDER / f"step-{step:06d}"
    if found is None or not found.is_dir():
        raise UserError(f"{found or run}: no such checkpoint" if found else f"{run}: no checkpoint here: train it first")
    state = checkpoint.read_state(found)
    checkpoint.require_same(found, state, config.fingerprint(recipe), state.plan)
    folder = tokenizer_folder(recipe)
    tokenizer = lvm_ray.tokenizer.load_tokenizer(folder)
    if (Path(run) / "model" / TOKENIZER_FILE).is_file():
        trained_on = read_tokenizer(Path(run) / "model")["hash"]
        if trained_on != tokenizer.hash:
            raise UserError(f"{folder}: its codebook is {tokenizer.hash}, the run {run} was trained on {trained_on}")
    else:
        open_shards(recipe.shard_folder).require_tokenizer(tokenizer.hash)
    launch.write_model(recipe, np.asarray(tokenizer.codebook, np.float32), tokenizer.hash, found, folder, Path(out))
    return found
