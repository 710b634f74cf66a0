"""Tensors out of the files of others. Nothing is unpickled that is not a tensor.

model.safetensors, or shards of it named by model.safetensors.index.json
pytorch_model.bin, or shards of it named by pytorch_model.bin.index.json
*.pt    a dictionary of tensors
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lvm_ray.errors import UserError
from lvm_ray.json_file import read_object
from lvm_ray.model.shape import Tensors

WHOLE = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read


def read_folder(folder: Path) -> Tensors:
    """The weights of a Hugging Face folder, of one file or of shards. Raises UserError where a file is missing or damaged."""
    for name in WHOLE:
        if (folder / name).is_file():
            return read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    raise UserError(f"{folder}: holds none of {', '.join(WHOLE)} or their index.json: this is not a whole model")


def _read_shards(index: Path) -> Tensors:
    places = read_object(index, "get the model again").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: has no weight_map of names to files: get the model again")
    weights: Tensors = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise UserError(f"{index}: names the file {name!r}, which is no name in its folder: get the model again")
        for key, tensor in read_tensors(index.parent / name).items():
            if key in weights:
                raise UserError(f"{index.parent / name}: {key} stands in another file of the model too: get the model again")
            weights[key] = tensor
    return weights


def read_tensors(path: Path) -> Tensors:
    """The tensors of one file by name, on the CPU, in the dtypes that it holds.

    Raises UserError where the file is missing or damaged, or holds anything else than a dictionary of tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: copy the whole model")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}): copy the model again") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # bytes of others fail a reader in any way
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors"
        else:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: refused: {reason}: get the model from a place that you trust") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path}: refused: not a dictionary of tensors")
    return tensors
