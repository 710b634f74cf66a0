"""Two evaluated runs against each other, item by item: `lvm-ray compare RUN OTHER`.

Both have answered the same items, so the difference of their scores is known far better than either score. Its interval is
a bootstrap over items that takes both answers to an item together. Its p-value is a permutation test: were the runs equally
good, each item's two answers might as well have been the other's, so the difference is compared with those after random
exchanges (paired randomisation, Edgington & Onghena 2007). Both work for any metric, also for those that are no means over items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvm_ray import benchmarks, config
from lvm_ray.errors import UserError
from lvm_ray.evaluate.statistics import (
    TOKEN_METRICS,
    Measure,
    bootstrap,
    interval,
    resampled_token_scores,
    rounded,
)
from lvm_ray.json_file import read_object
from lvm_ray.tasks.base import PairTask

OF_PIPELINE = "name a run's folder, of a pipeline RUN/student or that of a stage, and run lvm-ray evaluate on it"
RESAMPLES = 2000  # and as many exchanges: the smallest p-value is 1 / 2001


def compare(first: str, second: str) -> dict[str, Any]:
    """What the second run's scores differ by from the first's, as plain values.

    runs     the two folders
    tasks    {task: {metric: {"first", "second", "difference": second - first, "ci95", "p", "n", "higher_is_better"}}}
             and likewise {BENCHMARK@VERSION: ...}
    remarks  what could not be compared, or not well, a line each

    Items that only one of them has answered are left out, and so are scores of tokens where the two speak different ones. Raises
    UserError naming the run that was not evaluated, and where there is nothing to compare.
    """
    runs = [first, second]
    evaluations = [_evaluation(run) for run in runs]
    items = [read_items(run) for run in runs]
    other, recipe = (config.load(f"{run}/config.yaml") for run in runs)
    remarks = []
    same_tokens = evaluations[0].get("tokenizer") == evaluations[1].get("tokenizer")
    if not same_tokens:
        remarks.append("perplexity and accuracy of tokens left out: the two speak tokens of different tokenizers")
    for key, what in (("examples", "examples shown"), ("choose", "choice of examples"), ("votes", "prompts of an item")):
        values = [found.get(key) for found in evaluations]
        if values[0] != values[1]:
            remarks.append(f"the two differ in evaluate.{key}, the {what}: {values[0]} and {values[1]}")
    tasks = {}
    asked = [_benchmarks(found, remarks) for found in evaluations]
    for task, section in {**recipe.tasks, **asked[1]}.items():
        before = {**other.tasks, **asked[0]}.get(task)
        meaning = section.meaning + section.measuring if isinstance(section, PairTask) else ()
        unlike = next((key for key in meaning if getattr(before, key, None) != getattr(section, key, None)), None)
        if before is not None and unlike is not None:
            remarks.append(f"{task} left out: the two differ in tasks.{task}.{unlike}, so their scores mean different things")
            continue
        if before is not None and getattr(before, "test", None) != getattr(section, "test", None):
            remarks.append(f"{task}: the two have different test sources; items of the same name are taken for the same")
        answered = [of_run.get(task, {}) for of_run in items]
        common = sorted(answered[0].keys() & answered[1].keys())
        alone = len(answered[0].keys() ^ answered[1].keys())
        if alone:
            remarks.append(f"{task}: {alone} items left out, which only one has answered")
        if common and isinstance(section, PairTask):
            measures = [[of_run[item] for item in common] for of_run in answered]
            tasks[task] = paired(section, *measures, tokens=same_tokens, seed=recipe.seed)
    if not tasks:
        raise UserError(f"{first} and {second}: no item that both have answered: evaluate both on the same test source")
    return rounded({"runs": runs, "tasks": tasks, "remarks": remarks, "resamples": RESAMPLES})  # type: ignore[no-any-return]


def _benchmarks(evaluation: dict[str, Any], remarks: list[str]) -> dict[str, PairTask]:
    """What scores the benchmarks of an evaluation, by NAME@VERSION; a remark for each that is of another version than ours."""
    found = {}
    for name, entry in evaluation.get("benchmarks", {}).items():
        if name in benchmarks.names() and benchmarks.read(name).version == entry.get("version"):
            found[f"{name}@{entry['version']}"] = benchmarks.scoring_task(name)
        else:
            remarks.append(f"{name}@{entry.get('version')} left out: this version of the benchmark is not here: evaluate again")
    return found


def paired(
    task: PairTask, first: Sequence[Measure], second: Sequence[Measure], *, tokens: bool, seed: int, resamples: int = RESAMPLES
) -> dict[str, dict[str, Any]]:
    """Every metric's entry, of measures of the same items in the same order. `tokens`: those of answer tokens as well."""
    n, both = len(first), [*first, *second]
    draws_RI = bootstrap(n, resamples, seed)
    exchanged_RI = np.random.default_rng([seed, 1]).random((resamples, n)) < 0.5
    items_I = np.arange(n)
    # Rows: the runs as they are, then resampled, then exchanged; each as draws of the first's n measures and the second's n.
    ones_RI = np.concatenate([items_I[None], draws_RI, np.where(exchanged_RI, items_I + n, items_I)])
    others_RI = np.concatenate([items_I[None] + n, draws_RI + n, np.where(exchanged_RI, items_I, items_I + n)])
    scores = [task.resampled_scores(both, rows_RI) for rows_RI in (ones_RI, others_RI)]
    metrics = dict(task.metrics)
    if tokens and all("answer_tokens" in measure for measure in both):
        answers = [measure["answer_tokens"] for measure in both]
        for found, rows_RI in zip(scores, (ones_RI, others_RI), strict=True):
            found |= resampled_token_scores(answers, rows_RI)
        metrics |= TOKEN_METRICS
    entries = {}
    for metric, higher in metrics.items():
        difference_R = scores[1][metric] - scores[0][metric]
        observed, after = float(difference_R[0]), difference_R[1 + resamples :]
        # Rounding must not tell an exchange that changes nothing from none at all.
        as_far = int((np.abs(after) >= abs(observed) - 1e-9 * (1 + abs(observed))).sum())
        entries[metric] = {
            "first": float(scores[0][metric][0]),
            "second": float(scores[1][metric][0]),
            "difference": observed,
            "ci95": interval(difference_R[1 : 1 + resamples]),
            "p": (1 + as_far) / (1 + resamples),
            "n": n,
            "higher_is_better": higher,
        }
    return entries


def _evaluation(run: str) -> dict[str, Any]:
    return read_object(Path(run) / "evaluation.json", "run lvm-ray evaluate again", OF_PIPELINE)


def read_items(run: str) -> dict[str, dict[str, Measure]]:
    """{task: {item: measures}} of a run's items.parquet. Raises UserError where it is missing or cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet

    path = Path(run) / "items.parquet"
    found: dict[str, dict[str, Measure]] = {}
    if not path.is_file():
        raise UserError(f"{path}: no such file: {OF_PIPELINE}")
    try:
        for row in pyarrow.parquet.read_table(path, columns=["task", "item", "measures"]).to_pylist():
            found.setdefault(row["task"], {})[row["item"]] = json.loads(row["measures"])
    except (OSError, ValueError, pa.ArrowException):
        raise UserError(f"{path}: cannot be read: run lvm-ray evaluate again") from None
    return found
