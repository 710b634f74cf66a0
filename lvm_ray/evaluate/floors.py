"""What an answer is compared with: the best that needs no model, and the most that the tokenizer allows.

Floors: the query copied, the query through the tokenizer, the last example's label, and the task's own (median filters,
all background, the mean label). Each is read back and measured like an answer; the best one is a metric's floor.
Ceiling: the true label picture through the tokenizer, read back and measured likewise. Tokens have a floor of their own,
the training answers' most frequent codes, and no ceiling.

None of it depends on a model, so it is computed once for a test set and kept beside the shards, in `references.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm_ray.config import Recipe
from lvm_ray.data.shards import Shards
from lvm_ray.errors import BadItem, UserError
from lvm_ray.evaluate.statistics import Measure, Reference, best, token_measure, token_scores
from lvm_ray.evaluate.subjects import Subject
from lvm_ray.storage import read_file, split_name, write_file
from lvm_ray.tasks.base import Item, PairTask, Picture, Sample, TrivialAnswer, View

CEILING = "ceiling"
COPIED = "the query"
ROUND_TRIP = "the query through the tokenizer"
LAST_EXAMPLE = "the last example's label"
UNIGRAM = "the training answers' code frequencies"

TRAINING_SAMPLES = 500  # that a mean or majority label is learnt from: evenly spread over the training items
CACHE = "references.json"
CODE = ("evaluate", "model", "sources", "tasks", "tokenizer")


def trivial_answers(task: PairTask, size: int) -> list[TrivialAnswer]:
    """The task's own answers without a model, learnt from training items as the model sees them."""
    count = sum(1 for _ in task.items("train"))
    places = set(np.linspace(0, count - 1, min(TRAINING_SAMPLES, count)).astype(int).tolist())
    samples = []
    for item in (item for place, item in enumerate(task.items("train")) if place in places):
        try:
            sample = task.load(item, "train")
        except BadItem:
            continue
        view = task.view(sample, size, None)
        samples.append(task.transform(sample, view, size, np.random.default_rng(0)))
    if not samples:
        raise UserError(f"tasks.{task.name}.train: no usable training items, which evaluation learns its floors from")
    return task.trivial_answers(samples, size)


def reference_measures(
    task: PairTask,
    sample: Sample,
    views: Sequence[View],
    queries: Sequence[Picture],
    round_trips: Mapping[str, Sequence[Picture]],
    example_label: Picture,
    trivial: Sequence[TrivialAnswer],
) -> dict[str, Measure]:
    """One item's measures of every floor by name, and of the ceiling.

    `round_trips` holds the pictures of ROUND_TRIP (queries) and CEILING (true labels) after the tokenizer, one a view.
    """
    pictures = {COPIED: queries, LAST_EXAMPLE: [example_label] * len(views), **round_trips}
    answers = {name: task.read(list(shown), views, sample) for name, shown in pictures.items()}
    answers |= {answer.name: answer.answer(sample) for answer in trivial}
    return {name: task.measure(answer, sample) for name, answer in answers.items()}


def unigram_measure(counts_V: NDArray[np.int64], truth_N: NDArray[np.uint16]) -> Measure:
    """The token measure of an item's true answer under the training answers' code counts, add-one smoothed."""
    smoothed_V = counts_V + 1.0
    nll_N = np.log(smoothed_V.sum()) - np.log(smoothed_V[truth_N])
    return token_measure(nll_N, truth_N == counts_V.argmax())


def references(task: PairTask, measures: Sequence[Mapping[str, Measure]], unigrams: Sequence[Measure]) -> dict[str, Reference]:
    """Each metric's floor, its name and ceiling, over a set of items: per item the measures by name, and the unigram's where
    there are training answers."""
    scores = {name: task.score([item[name] for item in measures]) for name in measures[0]}
    found = {}
    for metric, higher in task.metrics.items():
        floor, floor_name = best({name: values[metric] for name, values in scores.items() if name != CEILING}, higher)
        found[metric] = Reference(floor, floor_name, scores[CEILING][metric])
    for metric, value in token_scores(unigrams).items() if unigrams else ():
        found[metric] = Reference(value, UNIGRAM, None)
    return found


def cache_key(recipe: Recipe, subject: Subject, items: Sequence[Item], shards: Shards, decoder: str) -> str:
    """Sixteen hex digits that change with anything that the references of a task or benchmark depend on, the code included.
    `items` are those that are asked, and those of its own that are shown. `decoder` stands for the tokenizer's files: tokens that
    are the same may be shown otherwise."""
    files = [os.path.getsize(path) if os.path.isfile(path) else None for item in items for path in item.paths]
    values = [
        shards.manifest.digest,
        recipe.size,
        recipe.seed,
        recipe.evaluate.batch,
        subject.described,
        [item.id for item in items],
        files,
        decoder,
        code_hash(),
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@cache
def code_hash() -> str:
    """A hash of the packages that have a part in an answer or in its measure."""
    package = Path(__file__).parents[1]
    sources = sorted(path for name in CODE for path in (package / name).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def read_cache(recipe: Recipe, asked: Mapping[str, Subject], keys: Mapping[str, str]) -> dict[str, dict[str, Reference]]:
    """The references of those tasks whose key is the one that they were computed under: {task: {metric: Reference}}."""
    entries, found = _cache(recipe), {}
    for task, key in keys.items():
        entry = entries.get(asked[task].asked_as, {})
        if entry.get("key") == key:
            found[task] = {metric: Reference(**values) for metric, values in entry["metrics"].items()}
    return found


def write_cache(
    recipe: Recipe, asked: Mapping[str, Subject], keys: Mapping[str, str], found: Mapping[str, Mapping[str, Reference]]
) -> None:
    """Keep references beside the shards, where that place can be written; elsewhere they are computed again next time."""
    entries = _cache(recipe)
    for task, metrics in found.items():
        values = {metric: vars(reference) for metric, reference in metrics.items()}
        entries[asked[task].asked_as] = {"key": keys[task], "metrics": values}
    with contextlib.suppress(UserError):
        write_file(_cache_folder(recipe), CACHE, json.dumps(entries, indent=1, sort_keys=True).encode())


def _cache(recipe: Recipe) -> dict[str, Any]:
    try:
        content = json.loads(read_file(_cache_folder(recipe), CACHE) or b"{}")
    except (OSError, ValueError, UserError):
        return {}
    return content if isinstance(content, dict) else {}


def _cache_folder(recipe: Recipe) -> str:
    """The folder that the shards lie in: PIPELINE/data."""
    return split_name(recipe.shard_folder.rstrip("/"))[0] or "."
