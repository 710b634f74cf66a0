"""Answers for anybody's pictures: `lvm-ray predict RUN --image FILE... [--task NAME] [--examples DIR] --out DIR`.

Example pairs and a picture make a prompt, and the model's next tokens are the answer picture. The examples are training
pairs of the task, or one's own: a folder of `NAME.png` with `NAME_label.png`, or a folder laid out like a source of the
task (`images` and `masks`, `images` and a COCO JSON file, `rainy` and `clean`).

Each answer is a picture NAME-TASK.png and, for a task of the run, the label read back from it in the format that its
users have. Ray is not started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.continual import stage_folders
from lvm_ray.data.shards import open_shards
from lvm_ray.errors import BadItem, UserError
from lvm_ray.evaluate.prompts import chooser, prompt_tokens
from lvm_ray.sources.files import SUFFIXES, read_image
from lvm_ray.tasks.base import PairTask, Picture, Sample, View
from lvm_ray.tasks.geometry import see_image, whole
from lvm_ray.tokenizer import Tokenizer, load_tokenizer

LABEL = "_label"  # NAME_label.png is the label picture of NAME.png
ANSWER = "answer"  # stands for the task's name where one's own examples say what the task is


def predict(
    run_folder: str,
    images: Sequence[str],
    out: str,
    examples: str | None = None,
    task: str | None = None,
    load: Callable[[str], Tokenizer] = load_tokenizer,
) -> list[str]:
    """Answer pictures with a trained run; the paths written, all below `out`.

    `examples` names a folder of example pairs, of which the first `evaluate.examples` by name are shown. Without `examples`
    and `task` every task of the run answers. Raises UserError naming the file or folder that cannot be used.
    """
    run = _run_folder(run_folder)
    recipe = config.load(str(run / "config.yaml"))
    answered = [name for name, section in recipe.tasks.items() if isinstance(section, PairTask)]
    if task is not None and task not in answered:
        raise UserError(f"--task {task}: this run has the tasks {', '.join(answered)}")
    if not answered and not examples:
        raise UserError(f"{run_folder}: trained without labels ({', '.join(recipe.tasks)}): show it --examples of what to answer")
    pictures = {path: _read(path) for path in images}
    stems = _stems(images)
    shown = _own_examples(recipe, Path(examples), task) if examples else None
    names = [task] if task else [ANSWER] if examples else answered
    answer = _answerer(run, recipe, load, shown)
    written = []
    for path, picture in pictures.items():
        for name in names:
            written += answer(name, picture, f"{out}/{stems[path]}-{name}")
    return written


def _answerer(
    run: Path, recipe: Recipe, load: Callable[[str], Tokenizer], shown: list[tuple[Picture, Picture]] | None
) -> Callable[[str, Picture, str], list[str]]:
    """A function (task, picture, stem) that answers one picture and gives the paths written."""
    from lvm_ray.evaluate.answer import draw_seed, respond, voted
    from lvm_ray.evaluate.run import tokenizer_folder
    from lvm_ray.evaluate.score import decoder
    from lvm_ray.train.job import resolve

    tokenizer = load(tokenizer_folder(str(run)))
    model = decoder(str(run), resolve(recipe).compute.precision, tokenizer)
    own_E2N = None if shown is None else tokenizer.encode(np.stack([part for pair in shown for part in pair]))
    training: dict[str, Callable[[str, NDArray[np.uint16]], NDArray[np.uint16]]] = {}

    def examples(name: str, item: str, query_N: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Tokens [votes, E, 2N] of the pairs of each of a picture's prompts."""
        if own_E2N is not None:
            return own_E2N.reshape(1, -1, 2 * query_N.shape[0])
        if name not in training:
            training[name] = _training_examples(run, recipe, name, tokenizer)
        return training[name](item, query_N)

    def answer(name: str, picture: Picture, stem: str) -> list[str]:
        task = cast("PairTask | None", recipe.tasks.get(name))
        sample = Sample(picture, None)
        views = task.questions(sample, recipe.size) if task else [whole(picture)]
        seen = [see_image(picture, view, recipe.size) for view in views]
        queries_QN = tokenizer.encode(np.stack([task.query(part) if task else part for part in seen]))
        sets_VE2N = examples(name, Path(stem).name, queries_QN[len(queries_QN) // 2])  # of tiles the middle one stands for all
        draws, tokens = recipe.evaluate.draws.get(name, 0), recipe.image_tokens
        seeds = [draw_seed(recipe.seed, name, Path(stem).name, view) for view in range(len(views))]
        answers = []
        for start in range(0, len(queries_QN), recipe.evaluate.batch):
            batch = slice(start, start + recipe.evaluate.batch)
            votes = []
            for shown_E2N in sets_VE2N:
                prompts_BT = np.stack([prompt_tokens(shown_E2N, query_N) for query_N in queries_QN[batch]])
                votes.append(respond(model, tokenizer, model.read(prompts_BT), tokens, draws, seeds[batch]))
            answers.append(voted(tokenizer, np.stack(votes, axis=1)))
        return _write(task, sample, views, list(tokenizer.decode(np.concatenate(answers))), stem)

    return answer


def _write(task: PairTask | None, sample: Sample, views: list[View], pictures: list[Picture], stem: str) -> list[str]:
    """The answer picture, pieced together where the task works in tiles, and the label read back."""
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    path = f"{stem}.png"
    Image.fromarray(pictures[0] if len(pictures) == 1 else _mosaic(pictures, views, sample.image)).save(path)
    return [path] if task is None else [path, *task.save(task.read(pictures, views, sample), sample, stem)]


def _mosaic(pictures: list[Picture], views: list[View], image: Picture) -> Picture:
    """Tiles where their views lie on the image; later ones cover earlier ones."""
    canvas = Image.new("RGB", (image.shape[1], image.shape[0]))
    for picture, view in zip(pictures, views, strict=True):
        left, top, right, bottom = (round(edge) for edge in view.box)
        canvas.paste(Image.fromarray(picture).resize((right - left, bottom - top)), (left, top))
    return np.array(canvas)


def _training_examples(
    run: Path, recipe: Recipe, task: str, tokenizer: Tokenizer
) -> Callable[[str, NDArray[np.uint16]], NDArray[np.uint16]]:
    """What gives the tokens [votes, E, 2N] of training pairs of the task, as the run's evaluation chooses them, for a picture's
    name and image tokens."""
    shards, section = open_shards(_shard_folder(run, recipe)), recipe.evaluate
    _, tokens_P2N = shards.pairs("train", task, 0)
    images_PN = tokens_P2N[:, : shards.manifest.image_tokens]
    ways = section.choose, section.votes, section.examples, recipe.seed
    choose = chooser(*ways, task, shards.originals("train", task), images_PN, np.asarray(tokenizer.codebook))
    return lambda name, query_N: tokens_P2N[np.array(choose(name, "", query_N))]


def _shard_folder(run: Path, recipe: Recipe) -> str:
    """The run's shards; where the pipeline folder was moved, those beside the run."""
    beside = run.parent / "data" / "shards"
    if "://" in recipe.shard_folder or Path(recipe.shard_folder).is_dir() or not beside.is_dir():
        return recipe.shard_folder
    return str(beside)


def _own_examples(recipe: Recipe, folder: Path, task: str | None) -> list[tuple[Picture, Picture]]:
    """Pairs of pictures [size, size, 3] out of a folder of one's own."""
    if not folder.is_dir():
        raise UserError(f"--examples {folder}: no such folder")
    pairs = _named_pairs(folder, recipe.size) or _source_pairs(recipe, folder, task)
    if not pairs:
        raise UserError(
            f"--examples {folder}: no pairs here; put NAME.png and NAME{LABEL}.png, 1 to {recipe.evaluate.examples} of them"
        )
    return pairs[: recipe.evaluate.examples]


def _named_pairs(folder: Path, size: int) -> list[tuple[Picture, Picture]]:
    """Pairs NAME.png, NAME_label.png. Raises UserError for a label without its image or an image without its label."""
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    names = sorted({stem.removesuffix(LABEL) for stem in files})
    pairs = []
    for name in names:
        for wanted, partner in ((name, name + LABEL), (name + LABEL, name)):
            if wanted not in files:
                raise UserError(f"--examples {folder}: {files[partner].name} has no {wanted}.png beside it")
        image, label = _read(str(files[name])), _read(str(files[name + LABEL]))
        pairs.append((see_image(image, whole(image), size), see_image(label, whole(label), size)))
    return pairs


def _source_pairs(recipe: Recipe, folder: Path, task: str | None) -> list[tuple[Picture, Picture]]:
    """The first pairs of a folder laid out like a source of the task; [] where it is not."""
    section = cast("PairTask | None", recipe.tasks.get(task or ""))
    source = getattr(section, "train", None)
    if section is None or source is None:
        return []
    found = {field: _part(folder, field) for field, value in source if isinstance(value, str) and field != "format"}
    if not all(found.values()):
        return []
    section = section.model_copy(update={"train": source.model_copy(update=found), "hold_out": {}})
    items = islice(section.items("train"), recipe.evaluate.examples)
    shown = [section.see(section.load(item, "train"), 0, (recipe.seed,), recipe.size).pictures for item in items]
    return [(image, label) for image, label in shown]


def _part(folder: Path, field: str) -> str | None:
    """Where a field of a source lies in a folder: a folder of its name, or for annotations the one JSON file."""
    if (folder / field).is_dir():
        return str(folder / field)
    files = sorted(folder.glob("*.json"))
    return str(files[0]) if field == "annotations" and len(files) == 1 else None


def _run_folder(folder: str) -> Path:
    """The run itself; of a pipeline folder the student, or the last stage."""
    for place in (Path(folder), Path(folder) / "student", *reversed(stage_folders(folder))):
        if (place / "model").is_dir() and (place / "config.yaml").is_file():
            return place
    raise UserError(f"{folder}: no trained run here (config.yaml and model/); give the folder of a finished run")


def _stems(images: Sequence[str]) -> dict[str, str]:
    """A name for each picture's answers. Raises UserError where two pictures would share one."""
    stems: dict[str, str] = {}
    for path in images:
        stem = Path(path).stem
        if stem in stems.values() and path not in stems:
            raise UserError(f"--image {path}: another picture is called {stem} as well, and their answers would have one name")
        stems[path] = stem
    return stems


def _read(path: str) -> Picture:
    try:
        return read_image(path)
    except BadItem as error:
        raise UserError(str(error)) from None
