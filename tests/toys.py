"""Toys that tests run the real code on: a tokenizer of 64 colours, three tasks of eight images, ready token shards.

Importing this module names the toy tasks in the registry, so that recipes of them validate, also in Ray's workers.
Everything is 16 x 16 pixels: 4 tokens a picture, 32 tokens a sentence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lvm_ray.data.shards import Manifest, count_rows, write_manifest, write_part
from lvm_ray.errors import BadItem
from lvm_ray.tasks import TASKS
from lvm_ray.tasks.base import Item, PairTask, Picture, Sample, Seen, Split, Task, TrivialAnswer, View

if TYPE_CHECKING:
    import torch

    from lvm_ray.config import Recipe

SIZE = 16
PATCH = 8
CODES = 64
IMAGE_TOKENS = (SIZE // PATCH) ** 2


class ToyTokenizer:
    """A patch's mean colour, each channel in four steps: 64 codes. Needs no folder and no training."""

    codes = CODES
    patch = PATCH
    hash = "toy-64-colours"

    @property
    def codebook(self) -> torch.Tensor:
        """float32 [64, 3], in -1..1."""
        import torch

        return torch.from_numpy(self._colours().astype(np.float32) / 127.5 - 1)

    def encode(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """uint8 [B, S, S, 3] -> uint16 [B, N], raster order."""
        batch, side, _, _ = pictures.shape
        patches = side // PATCH
        means = pictures.reshape(batch, patches, PATCH, patches, PATCH, 3).mean(axis=(2, 4))
        steps = np.clip(np.rint(means / 85), 0, 3).astype(np.uint16)
        codes: NDArray[np.uint16] = steps[..., 0] * 16 + steps[..., 1] * 4 + steps[..., 2]
        return codes.reshape(batch, -1)

    def decode(self, tokens: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """[B, N] -> uint8 [B, S, S, 3]: each token a square of its colour."""
        side = round(tokens.shape[1] ** 0.5)
        colours = self._colours()[np.asarray(tokens, np.int64)].reshape(len(tokens), side, side, 3)
        return colours.repeat(PATCH, axis=1).repeat(PATCH, axis=2)

    def _colours(self) -> NDArray[np.uint8]:
        codes = np.arange(CODES)
        return (np.stack([codes // 16, codes // 4 % 4, codes % 4], axis=1) * 85).astype(np.uint8)


def load_toy_tokenizer(folder: str) -> ToyTokenizer:
    """Stands in for `lvm_ray.tokenizer.load_tokenizer`."""
    return ToyTokenizer()


class ToyImages(Task):
    """Images of four coloured squares, made from their names; `train`, `validation` and `test` are numbers of items.

    `bad` names items that cannot be loaded. With `people: 2` the items `train-0003-0` and `train-0003-1` share the original
    `train-0003`.
    """

    train: int = Field(8, ge=0)
    validation: int = Field(4, ge=0)
    test: int = Field(4, ge=0)
    people: int = Field(1, ge=1)
    bad: list[str] = Field([])

    def items(self, split: Split) -> list[Item]:
        names = [f"{split}-{i:04d}" for i in range(getattr(self, split))]
        return [Item(f"{name}-{k}", name, (f"{name}.png",)) for name in names for k in range(self.people)]

    def load(self, item: Item, split: Split) -> Sample:
        if item.problem or item.id in self.bad:
            raise BadItem(item.problem or f"{item.paths[0]}: this toy is broken")
        rng = np.random.default_rng(list(hashlib.sha256(item.original.encode()).digest()))
        squares = rng.integers(0, 4, (2, 2, 3)) * 85
        image = squares.astype(np.uint8).repeat(SIZE, axis=0).repeat(SIZE, axis=1)
        return Sample(image, self.label(image))

    def label(self, image: Picture) -> Picture | None:
        raise NotImplementedError


class ToyTask(ToyImages, PairTask):
    """A task of pairs, with a label made from each image."""

    metrics: ClassVar[dict[str, bool]] = {"error": False}

    def view(self, sample: Sample, size: int, rng: np.random.Generator | None) -> View:
        height, width, _ = sample.image.shape
        return View((0.0, 0.0, float(width), float(height)), mirrored=bool(rng is not None and rng.random() < 0.5))

    def transform(self, sample: Sample, view: View, size: int, rng: np.random.Generator) -> Sample:
        image, label = (_shrink(picture, size, view.mirrored) for picture in (sample.image, sample.label))
        if view.mirrored:
            # Another change of the image that copies differ by, so that more than two of them do.
            image = np.clip(image.astype(np.int16) + rng.integers(-85, 86), 0, 255).astype(np.uint8)
        return Sample(image, label)

    def draw(self, label: Any, size: int) -> Picture:
        picture: Picture = label
        return picture

    def read(self, pictures: Sequence[Picture], views: Sequence[View], sample: Sample) -> Any:
        scale = sample.image.shape[0] // pictures[0].shape[0]
        return pictures[0].repeat(scale, axis=0).repeat(scale, axis=1)

    def measure(self, answer: Any, sample: Sample) -> dict[str, Any]:
        return {"error": float(np.abs(answer.astype(np.float64) - sample.label).mean())}

    def score(self, measures: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {"error": float(np.mean([measure["error"] for measure in measures]))}

    def trivial_answers(self, training: Sequence[Sample], size: int) -> list[TrivialAnswer]:
        return [TrivialAnswer("grey", lambda sample: np.full_like(sample.label, 128))]

    def save(self, answer: Any, sample: Sample, stem: str) -> list[str]:
        from PIL import Image

        Image.fromarray(answer).save(f"{stem}.png")
        return [f"{stem}.png"]


class Invert(ToyTask):
    """The label is the negative."""

    name: ClassVar[str] = "invert"

    def label(self, image: Picture) -> Picture:
        return np.asarray(255 - image, np.uint8)


class Threshold(ToyTask):
    """The label is white where the image is bright, else black."""

    name: ClassVar[str] = "threshold"

    def label(self, image: Picture) -> Picture:
        bright = image.mean(axis=2, keepdims=True) > 127
        return np.where(bright, 255, 0).astype(np.uint8).repeat(3, axis=2)


class Swap(ToyTask):
    """The label is the image with red and blue exchanged."""

    name: ClassVar[str] = "swap"

    def label(self, image: Picture) -> Picture:
        return np.ascontiguousarray(image[:, :, ::-1])


class Plain(ToyImages):
    """Images without a label: a row is one picture."""

    name: ClassVar[str] = "plain"
    pictures: ClassVar[int] = 1

    def label(self, image: Picture) -> None:
        return None

    def see(self, sample: Sample, copy: int, seed: Sequence[int], size: int) -> Seen:
        return Seen((_shrink(sample.image, size, mirrored=copy % 2 == 1),), covered=1.0)


TOY_TASKS: dict[str, type[Task]] = {"invert": Invert, "threshold": Threshold, "swap": Swap, "plain": Plain}
TASKS.update(TOY_TASKS)


def toy_recipe(folder: Path | str, **changes: Any) -> Recipe:
    """A recipe of the three toy tasks in a pipeline folder: 24, 8 and 8 training pairs, of 1, 3 and 2 copies.

    `changes` replace whole keys, or single keys of a section where the value is a mapping and the key is a section:
    `toy_recipe(folder, train={"steps": 4}, tasks={"invert": {}})`. `tasks` is always replaced whole.
    """
    from lvm_ray.config import Recipe

    values: dict[str, Any] = {
        "run": str(folder),
        "size": SIZE,
        "pairs": 4,
        "tasks": {"invert": {"train": 24, "copies": 1}, "threshold": {"copies": 3}, "swap": {"copies": 2}},
        "tokenizer": {"patch": PATCH, "codes": CODES},
        "model": {"width": 32, "layers": 2, "heads": 2, "mlp": 64},
        "train": {"steps": 8, "batch": 8, "micro_batch": 4, "rate": 1e-3, "log_every": 2, "checkpoint_every": 4},
        "compute": {"workers": 0, "threads": 1, "precision": "fp32"},
    }
    for key, change in changes.items():
        merge = key != "tasks" and isinstance(change, Mapping) and isinstance(values.get(key, {}), Mapping)
        values[key] = {**values.get(key, {}), **change} if merge else change
    return Recipe.model_validate(values)


def make_toy_shards(
    folder: Path | str,
    tasks: Mapping[str, tuple[int, int]] | None = None,
    *,
    pictures: Mapping[str, int] | None = None,
    image_tokens: int = IMAGE_TOKENS,
    codes: int = CODES,
    tokenizer: str = ToyTokenizer.hash,
    held_out: int = 4,
    seed: int = 0,
) -> Manifest:
    """Write a finished data set without images: `tasks` gives (training rows, copies), default as `toy_recipe`.

    Each label token is its image token plus a number of the task's own, so that a small model learns it quickly. `pictures`
    names tasks whose rows are not pairs, but so many pictures, each following from the one before likewise.
    """
    tasks = {"invert": (24, 1), "threshold": (8, 3), "swap": (8, 2)} if tasks is None else tasks
    per_row = {task: (pictures or {}).get(task, 2) for task in tasks}
    files: dict[str, dict[str, Any]] = {}
    for order, (task, (pairs, copies)) in enumerate(tasks.items()):
        for split, count, versions in (("train", pairs, copies), ("validation", held_out, 1), ("test", held_out, 1)):
            ids = [f"{split}-{i:04d}-0" for i in range(count)]
            for copy in range(versions):
                key = hashlib.sha256(f"{seed} {split} {task} {copy}".encode()).digest()
                images = np.random.default_rng(list(key)).integers(0, codes, (count, image_tokens))
                shown = [(images + k * (1 + 7 * order)) % codes for k in range(per_row[task])]
                tokens = np.concatenate(shown, axis=1).astype(np.uint16)
                path, entry = write_part(str(folder), split, task, copy, 0, ids, [name[:-2] for name in ids], tokens)
                files[path] = entry
    side = SIZE // PATCH
    manifest = Manifest(
        size=round(image_tokens**0.5) * (SIZE // side),
        patch=PATCH,
        image_tokens=image_tokens,
        tokenizer=tokenizer,
        codes=codes,
        seed=seed,
        settings="toy",
        rows=count_rows(files),
        files=files,
        bad=dict.fromkeys(tasks, 0),
        images_per_row=per_row,
    )
    write_manifest(str(folder), manifest)
    return manifest


def journal(run: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's journal without what a clock says: what two runs of one recipe have in common."""
    from lvm_ray.train.meter import read_metrics

    measured = ("seconds", "tokens_per_s", "matmul_share", "checkpoint_s", "eta_s")
    return [{key: value for key, value in line.items() if key not in measured} for line in read_metrics(run)]


def crash_after(monkeypatch: Any, micro_batches: int) -> None:
    """Let the stream of rows of trainings in this process break once that many micro batches were read."""
    from lvm_ray.train import launch

    read = launch.local_batches

    def breaking(*arguments: Any) -> Any:
        for number, batch in enumerate(read(*arguments)):
            if number == micro_batches:
                raise ConnectionError("the disk is gone")
            yield batch

    monkeypatch.setattr(launch, "local_batches", breaking)


def _shrink(picture: Picture, size: int, mirrored: bool) -> Picture:
    step = picture.shape[0] // size
    small = picture[::step, ::step]
    return np.ascontiguousarray(small[:, ::-1] if mirrored else small)
