"""A round of trials on Ray Tune: how many at once, on what, and what becomes of those that fail or are stopped.

Ray Tune starts trials, hands their processes on to the next ones, and decides who is stopped. What a trial came to is in its
folder.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lvm_ray import estimate, placement, ray_session
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.placement import PlaceSection
from lvm_ray.recipe_sections import ComputeSection
from lvm_ray.train.preflight import check_cluster, machine_memory
from lvm_ray.tune import trial as one_trial
from lvm_ray.tune.trial import FAILED, STOPPED, Work, objective, record, validations

SCRATCH = ".ray"  # below the sweep's folder: what Ray Tune writes, removed at the end
DRIVER_CPU = 0.01  # of a trial whose workers are Ray Train's: it waits for them
DEATHS = 1  # of a trial's process after which it is started again, from its last checkpoint
REDUCTION = 3  # asha: of so many trials at a step one goes on
# Read by Ray when it starts, and by every process that it starts.
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # whose tables are printed at any verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command; the same one goes on
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "3600",  # another sweep may be there first
}


@dataclass(frozen=True)
class Room:
    """Where trials run.

    workers  of a trial; 0: it trains in its own process
    threads  of each worker
    at_once  trials at the same time
    gpus     whether each worker has a GPU
    place    where on a cluster
    """

    workers: int
    threads: int
    at_once: int
    gpus: bool
    place: PlaceSection

    @property
    def cpus(self) -> int:
        """Logical CPUs of all trials at once, but for the data's."""
        return self.at_once * (self.workers or self.threads)

    @property
    def resources(self) -> dict[str, float]:
        """What a trial asks Ray Tune for. Workers are Ray Train's to ask for."""
        if self.workers:
            return {"CPU": DRIVER_CPU}
        return placement.share(self.place, self.gpus) | {"CPU": self.threads}

    def compute(self, section: ComputeSection) -> ComputeSection:
        """A trial's `compute` section."""
        return section.model_copy(update={"workers": self.workers, "threads": self.threads})


def room_for(recipe: Recipe, threads: int | None, number: int, grouped: bool) -> Room:
    """The room that so many trials of a resolved recipe have. `threads`: of a worker, where the recipe says so.

    On CPUs of this machine alone a trial trains in one process, whatever the recipe's workers: its cores are busy with other
    trials.
    `grouped`: the space itself asks for workers. Joins a cluster (`RAY_ADDRESS`) to look at it. Raises UserError where it lacks
    what a trial needs.
    """
    gpus, joins = recipe.compute.device == "cuda", ray_session.joined()
    workers = recipe.compute.least_workers if grouped or joins or gpus else 0
    workers = workers if workers > 1 else 0
    nodes = _nodes_of_cluster(recipe) if joins else [(os.cpu_count() or 1, _own_gpus() if gpus else 0)]
    cores, cards, largest = sum(cpus for cpus, _ in nodes), sum(gpu for _, gpu in nodes), max(cpus for cpus, _ in nodes)
    if joins and workers:
        check_cluster(recipe)
    if gpus and cards < max(1, workers):
        raise UserError(f"compute.device: cuda, and {cards} GPUs are there for the {max(1, workers)} of a trial: set it to cpu")
    if joins and threads and threads > largest and not workers:
        raise UserError(f"compute.threads: {threads} of a trial, and the largest node has {largest} CPUs: set at most {largest}")
    if workers:
        places = min((cores - joins) // workers, cards // workers if gpus else number)
    else:
        each = threads or max(1, min(largest, cores // max(1, min(number, cards) if gpus else number)))
        places = sum(min(cpus // each, gpu) if gpus else cpus // each for cpus, gpu in nodes)
    if not joins and not gpus:
        need = max(1, workers) * estimate.memory(recipe, estimate.teacher_models(recipe)).total
        places = min(places, int(machine_memory() // need))
    at_once = max(1, min(places, number))
    threads = threads or max(1, min(largest, cores // (at_once * max(1, workers))))
    return Room(workers, threads, at_once, gpus, placement.place_of(recipe, "train"))


def _nodes_of_cluster(recipe: Recipe) -> list[tuple[int, int]]:
    """(CPUs, GPUs) of each node that may train, of the cluster that the command joins."""
    ray_session.start(0)
    nodes = placement.require(recipe, "train", 1)
    found = [(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0))) for node in nodes]
    if not any(cpus for cpus, _ in found):
        raise UserError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: a cluster without CPUs: add nodes that run workers")
    return found


def _own_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def start(cpus: int) -> None:
    """Have Ray running for trials that need so many logical CPUs together."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray_session.start(cpus)


def whole_machine(compute: ComputeSection) -> ComputeSection:
    """What asks teachers where trials train in processes of their own: this process, on all cores."""
    return compute.model_copy(update={"workers": 0, "threads": os.cpu_count() or 1})


def run_trials(
    works: Mapping[int, Work],
    room: Room,
    sweep: str,
    goal: str,
    majority: str,
    known: Sequence[str] | None,
    changed: Callable[[int, bool], None],
) -> None:
    """Run trials, {number: work}, until each has finished, failed or was stopped: their folders say which.

    goal, majority  the objective that is reported, and the task with the most pairs
    known           asha: run folders of the trials that are over already; None: nobody is stopped
    changed         called with a trial's number and True when it starts, False when it is over
    """
    start(room.cpus)
    recipes, address = {number: work.recipe for number, work in works.items()}, os.environ.get("RAY_ADDRESS")
    from ray import tune
    from ray.tune import Callback

    class Recorder(Callback):
        """Keeps in a trial's folder what only the driver learns."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            changed(trial.config["trial"], True)

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            if "failed" in result:
                record(recipes[trial.config["trial"]].run, FAILED, reason=result["failed"])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            changed(trial.config["trial"], False)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            record(recipes[trial.config["trial"]].run, FAILED, reason=_death(trial))
            changed(trial.config["trial"], False)

    def train(config: dict[str, Any]) -> None:
        if address:  # a trial's process is on the cluster that the command has joined
            os.environ["RAY_ADDRESS"] = address
        one_trial.run(works[config["trial"]], goal, majority)

    labels = {} if room.workers else room.place.selector  # of workers they are Ray Train's to ask for
    asked: Any = tune.PlacementGroupFactory([room.resources], bundle_label_selector=[labels]) if labels else room.resources
    scheduler = None if known is None else _stopping(recipes, goal, majority, known)
    scratch = Path(sweep) / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    with _quiet():
        tune.Tuner(
            tune.with_resources(train, asked),
            param_space={"trial": tune.grid_search(list(recipes))},
            # A process that has imported torch serves one trial after another.
            tune_config=tune.TuneConfig(max_concurrent_trials=room.at_once, reuse_actors=True, scheduler=scheduler),
            run_config=tune.RunConfig(
                name="round",
                storage_path=str(scratch.absolute()),
                verbose=0,
                callbacks=[Recorder()],
                failure_config=tune.FailureConfig(max_failures=DEATHS),
            ),
        ).fit()
    shutil.rmtree(scratch, ignore_errors=True)


def _death(trial: Any) -> str:
    """Why a trial's process has ended, as far as Ray knows."""
    error = trial.get_pickled_error()
    if "OutOfMemory" in type(error).__name__:
        return "its process was ended for its memory: lower train.micro_batch, or run fewer trials at once (compute.threads)"
    if "ActorDied" in type(error).__name__:
        return f"its process was ended {DEATHS + 1} times from outside, as the system does when memory is short"
    return " ".join(str(error or trial.get_error()).split())[: one_trial.LONGEST]


def _stopping(recipes: Mapping[int, Recipe], goal: str, majority: str, known: Sequence[str]) -> Any:
    """Ray Tune's ASHA, which knows the trials that are over and keeps in a trial's folder that it was stopped."""
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    sections = [recipe.train for recipe in recipes.values()]
    steps, first = max(section.steps for section in sections), min(section.checkpoint_every for section in sections)

    class Stopping(ASHAScheduler):
        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
            if result.get("step", 0) >= steps:  # it ends by itself, once its model is written
                return TrialScheduler.CONTINUE
            decision, number = super().on_trial_result(controller, trial, result), trial.config.get("trial")
            if decision == TrialScheduler.STOP and number is not None:
                reason = f"not among the best of {REDUCTION} at step {result['step']}"
                record(recipes[number].run, STOPPED, step=result["step"], reason=reason)
            return decision

    scheduler = Stopping(
        time_attr="step", metric="objective", mode="min", max_t=steps, grace_period=min(first, steps), reduction_factor=REDUCTION
    )
    recipe = next(iter(recipes.values()))
    for folder in known:
        over: Any = SimpleNamespace(trial_id=folder, config={})
        nobody: Any = None  # no controller: ASHA asks it nothing
        scheduler.on_trial_add(nobody, over)
        for line in validations(folder):
            result = {"step": line["step"], "objective": objective(goal, line, recipe, majority)}
            if scheduler.on_trial_result(nobody, over, result) == TrialScheduler.STOP:
                break
    return scheduler


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Tune's own remarks are about files of its own, and about trials that the table shows as failed."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
