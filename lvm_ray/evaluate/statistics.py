"""From measured items to `evaluation.json`: scores, bootstrap intervals, floors, ceilings and progress. Pure functions.

A metric's entry is {"value", "ci95": [lo, hi], "n", "floor", "floor_name", "ceiling", "progress", "higher_is_better"}.
`floor` is the best answer that needs no model, `ceiling` the truth after the tokenizer's round trip, and
`progress` = (value - floor) / (ceiling - floor): 0 is worth nothing, 1 is all that this tokenizer allows. A value that
does not exist is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm_ray.tasks.base import PairTask

DIGITS = 6  # of a number in evaluation.json

TOKEN_METRICS = {"target_perplexity": False, "token_accuracy": True}
MORE_TOKEN_METRICS = {"mean_perplexity": False}  # that a benchmark may ask for

Measure = dict[str, Any]  # what scoring needs of one item: plain JSON values


@dataclass(frozen=True)
class Reference:
    """What a metric's value is compared with. None: there is no such thing, as a tokenizer's ceiling of perplexity."""

    floor: float | None
    floor_name: str | None
    ceiling: float | None


UNKNOWN = Reference(None, None, None)


def bootstrap(items: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Draws of items with replacement, int64 [resamples, items]."""
    return np.random.default_rng(seed).integers(0, items, (resamples, items))


def interval(values: NDArray[np.float64]) -> list[float | None]:
    """The middle 95 % of resampled values; those that do not exist (NaN) are left out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return [None, None]
    return [float(edge) for edge in np.percentile(known, [2.5, 97.5])]


def progress(value: float | None, floor: float | None, ceiling: float | None) -> float | None:
    """The part of the way from floor to ceiling; None where either is unknown or there is no way."""
    if value is None or floor is None or ceiling is None or floor == ceiling:
        return None
    return (value - floor) / (ceiling - floor)


def token_measure(nll_N: NDArray[np.float64], correct_N: NDArray[np.bool_]) -> Measure:
    """One item's answer tokens: their number, summed negative log-likelihood in nats, and how many were the likeliest."""
    return {"tokens": int(nll_N.size), "nll": float(nll_N.sum()), "correct": int(correct_N.sum())}


def resampled_token_scores(measures: Sequence[Measure], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """`target_perplexity` and `token_accuracy`, pooled over each row of `draws` [R, n], and `mean_perplexity`, items' mean."""
    tokens, nll, correct = (np.array([measure[key] for measure in measures], float) for key in ("tokens", "nll", "correct"))
    pooled = tokens[draws].sum(1)
    return {
        "target_perplexity": np.exp(nll[draws].sum(1) / pooled),
        "token_accuracy": correct[draws].sum(1) / pooled,
        "mean_perplexity": np.exp(nll / tokens)[draws].mean(1),
    }


def token_scores(measures: Sequence[Measure]) -> dict[str, float]:
    """`target_perplexity` = exp(pooled negative log-likelihood a token), `token_accuracy` = pooled share of likeliest tokens,
    `mean_perplexity` = the mean over items of exp(negative log-likelihood a token)."""
    everything = np.arange(len(measures))[None]
    return {name: float(values[0]) for name, values in resampled_token_scores(measures, everything).items()}


def best(scores: Mapping[str, float], higher_is_better: bool) -> tuple[float | None, str | None]:
    """The best value and whose it is, the first by name where several are equal; (None, None) where none exists."""
    known = {name: value for name, value in sorted(scores.items()) if math.isfinite(value)}
    if not known:
        return None, None
    name = (max if higher_is_better else min)(known, key=lambda name: known[name])
    return known[name], name


def task_entries(
    task: PairTask,
    measures: Sequence[Measure],
    token_measures: Sequence[Measure],
    references: Mapping[str, Reference],
    resamples: int,
    seed: int,
    metrics: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every metric's entry for one task: those of the task and the two of tokens, or those that `metrics` names; tokens may have
    no references. All share the same resamples."""
    known = task.metrics | TOKEN_METRICS | MORE_TOKEN_METRICS
    draws = bootstrap(len(measures), resamples, seed)
    values = task.score(measures) | token_scores(token_measures)
    resampled = task.resampled_scores(measures, draws) | resampled_token_scores(token_measures, draws)
    return {
        name: _entry(values[name], resampled[name], len(measures), references.get(name, UNKNOWN), known[name])
        for name in metrics or [*task.metrics, *TOKEN_METRICS]
    }


def rounded(value: Any) -> Any:
    """Plain JSON values with every number at DIGITS digits after the point, and null for one that is not finite."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return round(value, DIGITS) + 0.0 if math.isfinite(value) else None
    return value


def _entry(value: float, resampled: NDArray[np.float64], n: int, reference: Reference, higher_is_better: bool) -> dict[str, Any]:
    return {
        "value": value,
        "ci95": interval(resampled),
        "n": n,
        "floor": reference.floor,
        "floor_name": reference.floor_name,
        "ceiling": reference.ceiling,
        "progress": progress(value, reference.floor, reference.ceiling),
        "higher_is_better": higher_is_better,
    }
