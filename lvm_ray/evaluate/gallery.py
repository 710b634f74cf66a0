"""The gallery: which items of each task are shown, and their pictures.

    RUN/gallery/{task}/{k:02d}-{query,truth,answer}.png
    RUN/gallery.json    an entry each: task, item, measures, its own score by the main metric, why it is shown, the three files

The first items show what answers are like; the best, the middle and the worst, by the last run's own scores, how far they range.
All runs that are scored together show the same items, so that their answers can be set beside each other. Answers are kept as
tokens: only those of the items that are shown are decoded, here, and what was asked is drawn again.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvm_ray.config import Recipe
from lvm_ray.errors import BadItem
from lvm_ray.evaluate.score import Job, Scored, Scorer, middle, png, seen
from lvm_ray.evaluate.statistics import MORE_TOKEN_METRICS, TOKEN_METRICS, rounded, token_scores
from lvm_ray.evaluate.subjects import Subject, subjects
from lvm_ray.storage import write_file
from lvm_ray.tasks.base import Item
from lvm_ray.threads import torch_threads

FIRST = 8  # items of each task, in their order
OF_EACH = 2  # of the best, the middle and the worst


@dataclass(frozen=True)
class _Shown:
    """An item that is shown, why, and what was asked of it and is true, as PNG files."""

    scored: Scored
    why: str
    query: bytes
    truth: bytes


def write_galleries(
    job: Job, places: Sequence[str], items: Mapping[str, Sequence[Item]], scored: Mapping[str, Sequence[Scored]]
) -> None:
    """Write the gallery of every run of a job into its place."""
    scorer, asked = Scorer(job), subjects(job.recipe)
    entries: list[list[dict[str, Any]]] = [[] for _ in places]
    for name, listed in scored.items():
        with torch_threads(1):
            shown = _shown(job.recipe, asked[name], {item.id: item for item in items[name]}, listed)
            for k, folder in enumerate(places if shown else ()):
                answers = scorer.decode(np.stack([np.frombuffer(one.scored.answers[k], "<u2") for one in shown]))
                for place, (one, answer) in enumerate(zip(shown, answers, strict=True)):
                    entry = _entry(asked[name], one, k)
                    for part, picture in (("query", one.query), ("truth", one.truth), ("answer", png(answer))):
                        entry[part] = f"gallery/{name}/{place:02d}-{part}.png"
                        write_file(folder, entry[part], picture)
                    entries[k].append(entry)
    for folder, of_run in zip(places, entries, strict=True):
        write_file(folder, "gallery.json", (json.dumps(rounded(of_run), indent=1, sort_keys=True) + "\n").encode())


def choose(scores: Sequence[float], higher_is_better: bool) -> dict[int, str]:
    """{place: why} of the items that are shown: the first ones in their order, then those of the best, the middle and the worst
    that are not among them. `why` is best, median, worst or, of any other, first. Of equal scores the earlier item is the better
    one; one that has no score (NaN) is none of them."""
    known = [place for place, score in enumerate(scores) if math.isfinite(score)]
    ranked = sorted(known, key=lambda place: (-scores[place] if higher_is_better else scores[place], place))
    half = max(0, (len(ranked) - OF_EACH) // 2)
    why: dict[int, str] = {}
    for word, places in (("best", ranked[:OF_EACH]), ("worst", ranked[-OF_EACH:]), ("median", ranked[half : half + OF_EACH])):
        for place in places:
            why.setdefault(place, word)
    first = range(min(FIRST, len(scores)))
    return {
        place: why.get(place, "first") for place in [*first, *(place for place in ranked if place in why and place not in first)]
    }


def own_score(subject: Subject, scored: Scored, run: int) -> float:
    """The main metric over this item alone, as an answer of this run; NaN where one item has none."""
    metric, _ = main_metric(subject)
    if metric not in subject.task.metrics:
        return token_scores([scored.tokens[run]])[metric]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an item of which nothing can be scored
        return subject.task.score([scored.measures[run]])[metric]


def main_metric(subject: Subject) -> tuple[str, bool]:
    """The metric that stands for all others, and whether higher is better."""
    known = subject.task.metrics | TOKEN_METRICS | MORE_TOKEN_METRICS
    name = next(iter(subject.benchmark.metrics if subject.benchmark else subject.task.metrics))
    return name, known[name]


def _shown(recipe: Recipe, subject: Subject, items: Mapping[str, Item], listed: Sequence[Scored]) -> list[_Shown]:
    found = []
    scores = [own_score(subject, one, -1) for one in listed]
    for place, why in choose(scores, main_metric(subject)[1]).items():
        try:
            query, truth = _asked(recipe, subject, items[listed[place].item])
        except BadItem:  # gone since it was answered
            continue
        found.append(_Shown(listed[place], why, query, truth))
    return found


def _asked(recipe: Recipe, subject: Subject, item: Item) -> tuple[bytes, bytes]:
    """What is seen of an item and its label picture, as PNG files; of several tiles the middle one stands for all."""
    sample = subject.task.load(item, subject.split)
    views = subject.task.questions(sample, recipe.size)
    part = seen(recipe, subject, item, sample, views[middle(len(views))])
    return png(part.image), png(subject.task.draw(part.label, recipe.size))


def _entry(subject: Subject, shown: _Shown, run: int) -> dict[str, Any]:
    scored = shown.scored
    return {
        "task": subject.name,
        "item": scored.item,
        "measures": scored.measures[run],
        "metric": main_metric(subject)[0],
        "score": own_score(subject, scored, run),
        "why": shown.why,
    }
