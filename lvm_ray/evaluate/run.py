"""The stage: every held-out item asked of every run, here or in Ray's actors, then the files of each run folder.

    RUN/items.parquet      task, item, measures (JSON): what any score follows from
    RUN/gallery/, RUN/gallery.json    pictures of the first, the best, the middle and the worst items of each task (`gallery.py`)
    RUN/answered/          what is answered so far, unit by unit (`kept.py`)
    RUN/evaluation.json    written last: scores, intervals, floors, ceilings, progress

Floors and ceilings do not depend on a model: they are computed once for a test set and kept beside its shards. The files
hold neither time nor path nor number of workers, and are the same bytes for any number of workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from lvm_ray import placement
from lvm_ray.config import Recipe
from lvm_ray.data.shards import Shards, open_shards
from lvm_ray.errors import UserError
from lvm_ray.evaluate import floors, kept
from lvm_ray.evaluate.gallery import write_galleries
from lvm_ray.evaluate.score import Job, Scored, Scorer, Unit, UnitResult
from lvm_ray.evaluate.statistics import Reference, rounded, task_entries
from lvm_ray.evaluate.subjects import Subject, subjects
from lvm_ray.evaluate.units import make_units, test_items
from lvm_ray.model.folder import read_tokenizer
from lvm_ray.progress import Bar
from lvm_ray.storage import write_file
from lvm_ray.tasks.base import Item, PairTask
from lvm_ray.tokenizer import Tokenizer, load_tokenizer
from lvm_ray.train.job import resolve

SCHEMA = 1
RESTARTS = 2  # of an actor whose machine was lost; its unit is done again


def evaluate_runs(
    runs: Sequence[str],
    recipe: Recipe,
    bar: Bar,
    load: Callable[[str], Tokenizer] = load_tokenizer,
    places: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Score trained run folders on the recipe's items and benchmarks; each run's evaluation, as written to its folder, or to its
    one of `places`.

    `bar` counts answers: one an item and run. `compute.workers` x threads actors of Ray work; with 0 workers, or where one
    alone would work, this process does. Raises UserError where there is no item, where the shards, the tokenizer and
    the runs do not belong together, and where more than `max_bad` of a task's items cannot be used.
    """
    recipe = resolve(recipe, "evaluate")
    shards = open_shards(recipe.shard_folder)
    place = tokenizer_folder(runs[0])
    for run in runs:
        shards.require_tokenizer(read_tokenizer(f"{run}/model")["hash"])
    items = test_items(recipe)
    decoder = kept.files_hash(place)
    asked = subjects(recipe)
    keys = {task: floors.cache_key(recipe, asked[task], listed, shards, decoder) for task, listed in items.items()}
    references = floors.read_cache(recipe, asked, keys)
    job = Job(recipe, tuple(os.path.abspath(run) for run in runs), os.path.abspath(place), load)
    missing = [task for task in items if task not in references]
    codebook = load(place).codebook if recipe.evaluate.choose == "nearest" else None
    units = make_units(recipe, items, shards, missing, len(runs), codebook)
    bar.total = len(runs) * sum(len(listed) for listed in items.values())
    places = places or runs
    scored, bad = _collect(recipe, items, _answered(job, places, units, shards, bar))
    for task in missing:
        references[task] = _references(asked[task].task, scored[task])
    if missing:
        floors.write_cache(recipe, asked, keys, {task: references[task] for task in missing})
    write_galleries(job, places, items, scored)
    return [_finish(folder, k, recipe, shards, scored, bad, references) for k, folder in enumerate(places)]


def tokenizer_folder(run: str) -> str:
    """Where the tokenizer of a trained run lies."""
    folder = Path(run) / "model"
    return os.path.normpath(folder / str(read_tokenizer(folder)["folder"]))


def _answered(job: Job, places: Sequence[str], units: list[Unit], shards: Shards, bar: Bar) -> list[UnitResult]:
    """Every unit's result for all runs: what was kept in their places is read, the rest is asked and kept there."""
    asked_of = subjects(job.recipe)
    models, decoder = [kept.files_hash(f"{run}/model") for run in job.runs], kept.files_hash(job.tokenizer)
    keys = {
        (unit.task, unit.number): [
            kept.unit_key(job.recipe, asked_of[unit.task], unit, shards, decoder, model) for model in models
        ]
        for unit in units
    }
    parts: dict[tuple[str, int], dict[int, UnitResult]] = {}
    left = []
    for unit in units:
        named = unit.task, unit.number
        known = {k: found for k, folder in enumerate(places) if (found := kept.read(folder, unit, keys[named][k]))}
        parts[named] = known
        lacks = tuple(k for k in unit.runs if k not in known)
        referred = any(all(one.references is not None for one in found.scored) for found in known.values())
        if lacks or (unit.refer and not referred):
            left.append(replace(unit, runs=lacks))
    done = sum(len(found.scored) + len(found.bad) for known in parts.values() for found in known.values())
    bar.set(done, note="as before" if done else "")
    asked = {(unit.task, unit.number): unit.runs for unit in left}
    for result in _run(job, left):
        named = result.task, result.number
        for place, k in enumerate(asked[named]):
            kept.write(places[k], result, place, keys[named][k])
            parts[named][k] = _of_run(result, place)
        if not asked[named]:
            parts[named][-1] = result
        done += len(asked[named]) * (len(result.scored) + len(result.bad))
        bar.bad = _set_aside(parts.values())
        bar.set(done, note=f"{bar.bad} items set aside" if bar.bad else "")
    return [kept.joined([found for _, found in sorted(known.items())]) for known in parts.values()]


def _of_run(result: UnitResult, place: int) -> UnitResult:
    """What a result says of one of the runs that were asked."""
    scored = [
        replace(one, measures=[one.measures[place]], tokens=[one.tokens[place]], answers=one.answers[place : place + 1])
        for one in result.scored
    ]
    return replace(result, scored=scored)


def _run(job: Job, units: list[Unit]) -> Iterator[UnitResult]:
    """Do the units, in any order."""
    compute = job.recipe.compute
    assert compute.threads is not None
    if not units:
        return
    actors = min(compute.most_workers * compute.threads, len(units))
    place = placement.place_of(job.recipe, "evaluate")
    if not actors or (actors == 1 and not place.chooses):
        scorer = Scorer(job)
        for unit in units:
            yield scorer.score(unit)
        return
    from lvm_ray import ray_session

    ray_session.start(job.recipe)
    import ray
    from ray.util import ActorPool

    nodes = placement.require(job.recipe, "evaluate", actors, least=1)
    gpu = placement.gpus_of(nodes) > 0
    actors = max(1, min(actors, placement.room(nodes, placement.share(place, gpu))))
    asked = {"num_cpus": 1, "num_gpus": int(gpu), **placement.options(place)}
    remote: Any = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **asked)(Scorer)
    pool = [remote.remote(job) for _ in range(actors)]  # they end with the last reference to them
    try:
        yield from ActorPool(pool).map_unordered(lambda actor, unit: actor.score.remote(unit), units)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None


def _set_aside(parts: Iterable[Mapping[int, UnitResult]]) -> int:
    """Items that cannot be used, so far."""
    return sum(len(next(iter(known.values())).bad) for known in parts if known)


def _collect(
    recipe: Recipe, items: dict[str, list[Item]], results: list[UnitResult]
) -> tuple[dict[str, list[Scored]], dict[str, dict[str, str]]]:
    """Scored items by task in their order, and what was set aside. Raises UserError where that is too much."""
    scored: dict[str, list[Scored]] = {task: [] for task in items}
    bad: dict[str, dict[str, str]] = {task: {} for task in items}
    for result in sorted(results, key=lambda result: result.number):
        scored[result.task] += result.scored
        bad[result.task] |= result.bad
    for task, reasons in bad.items():
        total = len(items[task])
        if reasons and (not scored[task] or len(reasons) > recipe.max_bad * total):
            kind = "benchmark" if "@" in task else "task"
            example = next(iter(reasons.values()))
            raise UserError(
                f"{kind} {task}: {len(reasons)} of {total} test items cannot be used, for example {example}: "
                f"mend or remove them, or raise max_bad, now {recipe.max_bad:g}"
            )
    return scored, bad


def _references(task: PairTask, scored: list[Scored]) -> dict[str, Reference]:
    measures = [item.references for item in scored if item.references is not None]
    unigrams = [item.unigram for item in scored if item.unigram is not None]
    return floors.references(task, measures, unigrams)


def _finish(
    folder: str,
    k: int,
    recipe: Recipe,
    shards: Shards,
    scored: dict[str, list[Scored]],
    bad: dict[str, dict[str, str]],
    references: dict[str, dict[str, Reference]],
) -> dict[str, Any]:
    """Write the files of run number `k` into the folder and give its evaluation."""
    asked = subjects(recipe)
    scores = {
        name: task_entries(
            asked[name].task,
            [item.measures[k] for item in listed],
            [item.tokens[k] for item in listed],
            references[name],
            recipe.evaluate.resamples,
            recipe.seed,
            benchmark.metrics if (benchmark := asked[name].benchmark) else None,
        )
        for name, listed in scored.items()
    }
    tasks = [name for name in scores if asked[name].benchmark is None]
    nothing = {name: sum(item.measures[k]["nothing"] for item in listed) for name, listed in scored.items()}
    measured = {name: {"scores": scores[name], "bad": len(bad[name]), "nothing": nothing[name]} for name in scores}
    evaluation: dict[str, Any] = rounded(
        {
            "schema": SCHEMA,
            "tasks": {name: scores[name] for name in tasks},
            "benchmarks": {name.partition("@")[0]: _said(asked[name]) | measured[name] for name in scores if name not in tasks},
            "bad": {name: len(bad[name]) for name in tasks},
            "nothing": {name: nothing[name] for name in tasks},
            "split": recipe.evaluate.split,
            "examples": recipe.evaluate.examples,
            "choose": recipe.evaluate.choose,
            "votes": recipe.evaluate.votes,
            "resamples": recipe.evaluate.resamples,
            "seed": recipe.seed,
            "shards": shards.manifest.digest,
            "tokenizer": shards.manifest.tokenizer,
        }
    )
    _write_items(folder, k, scored)
    write_file(folder, "evaluation.json", _json(evaluation))
    return evaluation


def _said(subject: Subject) -> dict[str, Any]:
    """What stands beside a benchmark's scores: all that decides what they mean."""
    benchmark = subject.benchmark
    assert benchmark is not None
    return {
        "version": benchmark.version,
        "task": benchmark.task,
        "protocol": {**benchmark.protocol, "draws": subject.draws},
    }


def _write_items(folder: str, k: int, scored: dict[str, list[Scored]]) -> None:
    rows = []
    for task, listed in scored.items():
        for item in listed:
            measures = {**item.measures[k], "answer_tokens": item.tokens[k]}
            rows.append({"task": task, "item": item.item, "measures": json.dumps(measures, sort_keys=True)})
    schema = pa.schema([("task", pa.string()), ("item", pa.string()), ("measures", pa.string())])
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    write_file(folder, "items.parquet", sink.getvalue().to_pybytes())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
