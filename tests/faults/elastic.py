"""Runs whose number of workers changes between restarts: the same rows, and the same loss to 1e-4.

`command_line`  real commands, each killed with SIGKILL: 2 -> 1 -> 4 -> 0 workers.
`grid`          2 -> 1 -> 2 workers for AdamW and Muon at ZeRO 1, 2 and 3. Starting workers takes half a minute, so each group of
                Ray Train's workers serves all six: they share one stream of the plan, and every run has its own folder. A run is
                stopped by its stream, which ends between two checkpoints. What each worker read is written down.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.processes import wait
from tests.faults.runs import PATIENCE, Base, Case, case, journal, newest, reached
from tests.toys import make_toy_shards, toy_recipe

TOLERANCE = 1e-4
GRID = [(optimizer, zero) for optimizer in ("adamw", "muon") for zero in (1, 2, 3)]
GRID_STEPS, GRID_EVERY = 60, 5
STRETCHES = [(2, 22), (1, 43), (2, None)]  # workers, and the step at which the stream ends
BATCH, MICRO = 8, 2


def command_line(base: Base) -> Iterator[Case]:
    """2 -> 1 -> 4 -> 0 workers, each stopped by SIGKILL between two checkpoints."""
    reference, run = base.reference(), base.place / "changing"
    stops = [(2, 20), (1, 44), (4, 68), (0, None)]
    notes = []
    for workers, stop in stops:
        command = base.start(run.name, f"compute.workers={workers}")
        if stop is None:
            code = command.finish()
            break
        wait(lambda command=command, stop=stop: command.ended or reached(run) >= stop, PATIENCE, 0.01)
        command.end()
        notes.append(f"{workers} workers to step {reached(run)}, last checkpoint {newest(run)}")
        if reached(run) < stop:
            yield case("2 -> 1 -> 4 -> 0 workers", f"{'; '.join(notes)}: {command.last_line}", False)
            return
    outcome, ok = compare(journal(run), journal(reference))
    if code != 0:
        outcome, ok = f"exit code {code}: {command.last_line}", False
    yield case("2 -> 1 -> 4 -> 0 workers, SIGKILL of the driver each time", f"{'; '.join(notes)}; {outcome}", ok)


def compare(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> tuple[str, bool]:
    """How far a journal is from the undisturbed one's, and whether that is near enough."""
    if [(line["step"], line["rows"]) for line in found] != [(line["step"], line["rows"]) for line in wanted]:
        return f"{len(found)} lines of {len(wanted)} steps", False
    far = [abs(line["loss"] - other["loss"]) for line, other in zip(found, wanted, strict=True)]
    targets = [
        abs(line["target_loss"][task] - other["target_loss"][task])
        for line, other in zip(found, wanted, strict=True)
        for task in line["target_loss"]
    ]
    last = f"{found[-1]['loss']:.6f} and {wanted[-1]['loss']:.6f}"
    said = f"last loss {last}; the largest difference in {len(far)} steps is {max(far):.1e}, of a task's {max(targets):.1e}"
    return said, far[-1] <= TOLERANCE


def grid(base: Base) -> Iterator[Case]:
    """Each optimizer at each ZeRO stage, 2 -> 1 -> 2 workers, beside its undisturbed run of 2."""
    from lvm_ray import ray_session

    place = base.place / "grid"
    make_toy_shards(place / "shards")
    ray_session.start(2)
    try:
        _stretch(place, "undisturbed", 2, None)
        for number, (workers, stop) in enumerate(STRETCHES):
            _stretch(place, "changed", workers, stop, number)
    finally:
        ray_session.shutdown()
    for optimizer, zero in GRID:
        changed, undisturbed = (place / kind / f"{optimizer}-{zero}" for kind in ("changed", "undisturbed"))
        outcome, ok = compare(journal(changed), journal(undisturbed))
        rows, wanted = consumed(changed), consumed(undisturbed)
        same = rows == wanted == [list(range(start, start + BATCH)) for start in range(0, BATCH * GRID_STEPS, BATCH)]
        read = "the same rows in every step" if same else "other rows"
        yield case(f"2 -> 1 -> 2 workers, {optimizer}, ZeRO {zero}", f"{read}; {outcome}", ok and same)
    shutil.rmtree(place)


def consumed(run: Path) -> list[list[int]]:
    """The rows that each step's update was made of, sorted: what a later stretch read counts, as its weights do."""
    steps: dict[int, tuple[int, list[int]]] = {}
    for path in sorted(run.glob("rows-*.jsonl")):
        stretch = int(path.name.split("-")[1])
        for line in path.read_text().splitlines():
            read = json.loads(line)
            kept = steps.get(read["step"], (stretch, []))
            if kept[0] != stretch:
                kept = (stretch, [])
            steps[read["step"]] = (stretch, kept[1] + read["rows"])
    return [sorted(rows) for _, (_, rows) in sorted(steps.items())]


def _recipe(place: Path, kind: str, optimizer: str, zero: int, workers: int) -> Any:
    train = {"steps": GRID_STEPS, "batch": BATCH, "micro_batch": MICRO, "optimizer": optimizer, "zero": zero, "rate": 1e-3}
    often = {"log_every": 1, "checkpoint_every": GRID_EVERY, "keep_best": 0, "validation": 0}
    return toy_recipe(
        place / kind / f"{optimizer}-{zero}",
        shards=str(place / "shards"),
        train=train | often,
        compute={"workers": workers},
    )


def _stretch(place: Path, kind: str, workers: int, stop: int | None, number: int = 0) -> None:
    """One group of workers: all runs of the grid from their last checkpoints to the step where the stream ends."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from lvm_ray.data.stream import data_config, training_dataset
    from lvm_ray.train import launch

    jobs = [_job(_recipe(place, kind, optimizer, zero, workers)) for optimizer, zero in GRID]
    for job in jobs:
        Path(job.recipe.run).mkdir(parents=True, exist_ok=True)
    positions = {launch._reached(job).rows for job in jobs}
    assert len(positions) == 1, f"the runs of the grid have come apart: {positions}"
    scratch = place / "ray" / f"{kind}-{number}"
    scratch.mkdir(parents=True)
    TorchTrainer(
        _worker,
        train_loop_config={"jobs": jobs, "stop": stop, "number": number, "position": positions.pop()},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="train", storage_path=str(scratch)),
        datasets={"train": training_dataset(jobs[0].recipe, lambda: launch._reached(jobs[0]).rows)},
        dataset_config=data_config(),
    ).fit()


def _job(recipe: Any) -> Any:
    """The job that `launch.train` would make of the recipe."""
    from unittest import mock

    import lvm_ray.tokenizer
    from lvm_ray.train.job import make_job, resolve
    from tests.toys import load_toy_tokenizer

    with mock.patch.object(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer):
        return make_job(resolve(recipe))


class Stopped(Exception):
    """The stream has come to the step at which a stretch ends."""


def _worker(arguments: dict[str, Any]) -> None:
    """Ray Train's worker: the runs one after another, each on the whole stream."""
    import ray.train

    from lvm_ray.data.stream import worker_batches
    from lvm_ray.train.work import work

    context = ray.train.get_context()
    shard, workers, rank = ray.train.get_dataset_shard("train"), context.get_world_size(), context.get_world_rank()
    each = BATCH // (MICRO * workers)
    for job in arguments["jobs"]:
        log = Path(job.recipe.run) / f"rows-{arguments['number']}-{rank}.jsonl"

        def batches(position: int, log: Path = log) -> Iterator[Any]:
            assert position == arguments["position"], (position, arguments["position"])
            with log.open("w") as file:
                for number, batch in enumerate(worker_batches(shard, MICRO)):
                    step = position // BATCH + number // each + 1
                    if arguments["stop"] is not None and step > arguments["stop"]:
                        raise Stopped
                    file.write(json.dumps({"step": step, "rows": batch["row"].tolist()}) + "\n")
                    file.flush()
                    yield batch

        with contextlib.suppress(Stopped):
            work(job, batches, workers, rank == 0, lambda: False)
