"""The stage: a reference network for each task of a recipe, trained on its pairs and scored on its test items.

    RUN/references.json    {TASK: {METRIC: {"value", "ci95", "n"}}, ..., "how": {TASK: a sentence}, "key": what it depends on}

Same pairs, same copies, same picture size, same test items, same measures and intervals as the models of the recipe. Networks
stop by the clock, so another machine makes other steps: unlike `evaluation.json` this file is not the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from lvm_ray.config import Recipe, to_dict
from lvm_ray.data.shards import Shards, open_shards
from lvm_ray.errors import BadItem
from lvm_ray.evaluate.statistics import bootstrap, interval, rounded
from lvm_ray.evaluate.units import test_items
from lvm_ray.progress import Bar
from lvm_ray.reference.heads import Head, head_of
from lvm_ray.reference.networks import UNet
from lvm_ray.reference.train import Report, Trained, drawn_on, fit, make_views, pixels_of
from lvm_ray.seeds import stable_hash
from lvm_ray.storage import read_file, write_file
from lvm_ray.tasks.base import Item, PairTask, Split
from lvm_ray.threads import torch_threads

FILE = "references.json"
VERSION = 1  # grows when the networks or their training change, so that older ones are trained anew


def write_references(run: str, recipe: Recipe, minutes: float, bar: Bar) -> dict[str, Any]:
    """Train and score the reference networks of a recipe in so many core-minutes, an equal part for each task, and write their
    file into a run folder, unless it is there already. `bar` counts core-seconds.

    Raises UserError where there is no test item or no training image.
    """
    shards = open_shards(recipe.shard_folder)
    items = test_items(recipe.model_copy(update={"benchmarks": {}}))  # which are for models that were trained elsewhere too
    seconds = 60 * minutes / len(items)
    key = _key(recipe, shards, items, minutes)
    bar.total = 60 * minutes
    known = _read(run)
    if known.get("key") == key:
        bar.set(bar.total, note="as before")
        return known
    found: dict[str, Any] = {"how": {}, "key": key}
    for place, (name, listed) in enumerate(items.items()):

        def report(spent: float, before: float = place * seconds, name: str = name) -> None:
            bar.set(before + min(spent, seconds), note=name)

        head, trained, found["how"][name] = train_reference(recipe, name, shards, seconds, report=report)
        found[name] = score_reference(recipe, name, head, trained.network, listed, recipe.evaluate.split)
    write_file(run, FILE, (json.dumps(rounded(found), indent=1, sort_keys=True) + "\n").encode())
    return found


def train_reference(
    recipe: Recipe, name: str, shards: Shards, seconds: float, factor: float = 1.0, report: Report = lambda spent: None
) -> tuple[Head, Trained, str]:
    """The network of one task, trained for so many core-seconds on the pairs that the recipe's plan draws on, at `factor` times
    its head's rate; and how, in words."""
    head = head_of(cast(PairTask, recipe.tasks[name]))
    views = make_views(recipe, name, head, drawn_on(recipe, shards, name))
    with torch_threads(1):
        trained = fit(head, views, seconds, factor * head.rate, recipe.seed, report)
    parameters = sum(values.numel() for values in trained.network.parameters())
    how = (
        f"{head.name}, {parameters / 1e6:.2g} M parameters: {trained.seconds:.0f} core-seconds, {trained.steps:,} steps, on "
        f"{len(views.pictures):,} views of {views.pairs:,} pairs"
    )
    return head, trained, how


def score_reference(
    recipe: Recipe, name: str, head: Head, network: UNet, items: Sequence[Item], split: Split
) -> dict[str, dict[str, Any]]:
    """{metric: {"value", "ci95", "n"}} of a network over items of a split; those that cannot be read are left out, as in every
    evaluation."""
    task, measures = cast(PairTask, recipe.tasks[name]), []
    with torch_threads(1), torch.inference_mode():
        for item in items:
            try:
                sample = task.load(item, split)
                views = task.questions(sample, recipe.size)
                # As the item's pair in the shards, so that an image that a task makes itself is the one that models see.
                seed = [recipe.seed, stable_hash(name, split, item.id), 0]
                seen = [task.transform(sample, view, recipe.size, np.random.default_rng(seed)) for view in views]
            except BadItem:
                continue
            pixels_Q3SS = pixels_of(np.stack([part.image for part in seen]))
            measures.append(task.measure(head.answer(network(pixels_Q3SS), pixels_Q3SS, views, sample), sample))
    values = task.score(measures)
    resampled = task.resampled_scores(measures, bootstrap(len(measures), recipe.evaluate.resamples, recipe.seed))
    return {metric: {"value": values[metric], "ci95": interval(resampled[metric]), "n": len(measures)} for metric in task.metrics}


def _key(recipe: Recipe, shards: Shards, items: Mapping[str, Sequence[Item]], minutes: float) -> str:
    """Sixteen hex digits that change with what the file depends on."""
    values = to_dict(recipe)
    parts = {
        "version": VERSION,
        "minutes": minutes,
        "split": recipe.evaluate.split,
        "shards": shards.manifest.digest,
        "items": {name: [item.id for item in listed] for name, listed in items.items()},
        "resamples": recipe.evaluate.resamples,
        **{key: values[key] for key in ("seed", "size", "pairs", "tasks", "balance")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read(run: str) -> dict[str, Any]:
    try:
        content = json.loads(read_file(run, FILE) or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
