"""A trial: an ordinary training in an ordinary run folder, and what that folder says of it.

    SWEEP/trials/00007/trial.json    which trial it is
    .../failed.json                  why there is no result
    .../stopped.json                 at which step it was stopped, and why
    .../tally.json                   what its process tokenised and asked of teachers

All but the last are written by the driver: a trial's process may outlive a driver that was killed, beside its successor.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lvm_ray import config, estimate, tally
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.progress import Bar
from lvm_ray.recipe_sections import FIRST_TEACHER, OneTeacherSection
from lvm_ray.train.meter import METRICS_FILE, last_line, read_metrics
from lvm_ray.train.workers import ask_to_leave, write
from lvm_ray.tune.space import Settings

FACTS, FAILED, STOPPED, TALLY = "trial.json", "failed.json", "stopped.json", "tally.json"
LOOK_EVERY = 0.2  # seconds between two looks at a trial's journal
LEAVES_IN = 600  # seconds that a stopped trial may take to save and leave before its process is given up
LONGEST = 300  # letters of a reason


@dataclass(frozen=True)
class Trial:
    """One training of a sweep.

    kind    search; repeat: of one of the best, with another seed; reference: what they are compared with; again: the schedule
            that a population found, from nothing
    seed    train.seed; None: the recipe's own
    parent  number of the trial whose weights it goes on from, as that one left them; None: it begins by itself
    until   the step after which it leaves; None: it runs to its end
    """

    number: int
    kind: str
    settings: Settings
    seed: int | None = None
    parent: int | None = None
    until: int | None = None

    def folder(self, sweep: str) -> str:
        return f"{sweep}/trials/{self.number:05d}"


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    state       waiting, finished, stopped or failed
    step        the last one that was validated; 0: none
    objectives  by name, at that step; empty where there is no result
    seconds     of training
    reason      why it failed or was stopped
    """

    trial: Trial
    state: str
    step: int = 0
    objectives: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""


def recipe_of(base: Recipe, trial: Trial, sweep: str, place: str) -> Recipe:
    """A trial's recipe: the student's with the trial's settings and seed, in the trial's folder, with its teachers' answers kept.

    Raises UserError, which names `place`, where the settings do not make a recipe.
    """
    seed = {} if trial.seed is None else {"train.seed": trial.seed}
    recipe = config.changed(base, trial.settings | seed | {"run": trial.folder(sweep)}, place)
    return with_caches(recipe, f"{sweep}/answers")


def with_caches(recipe: Recipe, folder: str) -> Recipe:
    """The recipe with a cache for each teacher that can have one and has none yet."""
    distill = recipe.distill
    if distill is None or distill.on_policy:
        return recipe

    def kept(name: str, one: OneTeacherSection) -> OneTeacherSection:
        asked = one.cache or one.teacher is None or 0 in one.weights.values()
        return one if asked else one.model_copy(update={"cache": f"{folder}/{name}"})

    also = {name: kept(name, one) for name, one in distill.also.items()}
    return recipe.model_copy(update={"distill": kept(FIRST_TEACHER, distill).model_copy(update={"also": also})})


def validations(run: str) -> list[dict[str, Any]]:
    """The lines of a run's journal that have a validation."""
    return [line for line in read_metrics(run) if "validation" in line]


def outcome_of(trial: Trial, recipe: Recipe, names: Sequence[str], majority: str) -> Outcome:
    """What a trial's folder says. `names` of objectives; `majority`: the task with the most pairs."""
    folder, scored = Path(recipe.run), validations(recipe.run)
    last = last_line(recipe.run) or {}
    seconds = float(last.get("seconds", 0.0))
    failed, stopped = _read(folder / FAILED), _read(folder / STOPPED)
    if failed:
        return Outcome(trial, "failed", int(last.get("step", 0)), seconds=seconds, reason=str(failed.get("reason", "")))
    if stopped:  # its process goes on until it is told: what counts is where it was stopped
        scored = [line for line in scored if line["step"] <= stopped["step"]]
        seconds = float(scored[-1].get("seconds", 0.0)) if scored else seconds
    written = trial.until is not None or (folder / "model" / "model.safetensors").is_file()
    whole = bool(scored) and scored[-1]["step"] == (trial.until or recipe.train.steps) and written
    if not scored or not (stopped or whole):
        return Outcome(trial, "waiting", int(last.get("step", 0)), seconds=seconds)
    objectives = {name: objective(name, scored[-1], recipe, majority) for name in names}
    wrong = next((name for name, value in objectives.items() if not math.isfinite(value)), None)
    if wrong:
        return Outcome(trial, "failed", scored[-1]["step"], seconds=seconds, reason=f"its {wrong} is no number")
    state, reason = ("stopped", str(stopped.get("reason", ""))) if stopped and not whole else ("finished", "")
    return Outcome(trial, state, scored[-1]["step"], objectives, seconds, reason)


def objective(name: str, line: Mapping[str, Any], recipe: Recipe, majority: str) -> float:
    """An objective by a validation's line of the journal; infinite beyond what a float holds."""
    if name == "parameters":
        return float(estimate.parameters(recipe.model, recipe.tokenizer.codes))
    loss = line["validation"] if name == "target_perplexity" else line["validation_loss"].get(majority, math.nan)
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def _read(path: Path) -> dict[str, Any]:
    """A small JSON file; {} where there is none."""
    with suppress(FileNotFoundError):
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        except ValueError:
            raise UserError(f"{path}: not readable: remove its folder, and the trial is trained again") from None
    return {}


def claim(trial: Trial, folder: str) -> None:
    """Say in a trial's folder which trial it is. Raises UserError where it is another one's."""
    found, own = _read(Path(folder) / FACTS), json.loads(json.dumps(asdict(trial)))
    if found and found != own:
        raise UserError(
            f"{folder}: holds another trial ({found.get('settings')}): remove this sweep's folder, or rename the space"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    write(Path(folder) / FACTS, json.dumps(own))


def record(folder: str, file: str, **facts: Any) -> None:
    """Keep what became of a trial."""
    write(Path(folder) / file, json.dumps(facts))


def tallied(folder: str) -> dict[str, int]:
    """What the processes of a trial counted."""
    return {kind: int(_read(Path(folder) / TALLY).get(kind, 0)) for kind in tally.KINDS}


class Work(NamedTuple):
    """What a trial's process does: a training, to its end or `until` a step, from nothing or `after` another run's checkpoint,
    which is (its folder, its step)."""

    recipe: Recipe
    until: int | None = None
    after: tuple[str, int] | None = None


def run(work: Work, goal: str, majority: str) -> None:
    """A trial's part in its own process, as Ray Tune runs it: train, and report the objective `goal` of each validation.

    It first reports what the journal of an interrupted run has, so that a new scheduler knows the trial. What goes wrong is
    reported as well: a process that is used again has no use for a traceback.
    """
    from ray import tune

    # Ray Tune waits so long for the thread of a trial that it stops, before it gives the process to the next one.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(LEAVES_IN)
    asked, problems = threading.Event(), list[BaseException]()
    training = threading.Thread(target=_train, args=(work, asked, problems), daemon=True)
    recipe, reported = work.recipe, 0
    try:
        reported = _report(recipe, goal, majority, reported)
        training.start()
        while training.is_alive():
            training.join(LOOK_EVERY)
            reported = _report(recipe, goal, majority, reported)
    except SystemExit:  # how Ray Tune stops a trial: at its report
        if training.is_alive():
            ask_to_leave(recipe.run, asked)
            training.join()
        raise
    if problems:
        tune.report({"failed": reason_of(problems[0])})


def _train(work: Work, asked: threading.Event, problems: list[BaseException]) -> None:
    from lvm_ray.train import launch

    recipe = work.recipe
    try:
        with tally.counted() as counts:
            if work.after:
                _fork(recipe, *work.after)
            launch.train(recipe, Bar("trial", recipe.train.steps, "steps"), asked, work.until)
    except BaseException as error:
        problems.append(error)
    before = tallied(recipe.run)
    record(recipe.run, TALLY, **{kind: before[kind] + counts[kind] for kind in counts})


def _fork(recipe: Recipe, parent: str, step: int) -> None:
    """Give a run that has none the checkpoint of another one, up to which the plan is the same, and its journal."""
    from dataclasses import replace

    from lvm_ray.train import checkpoint
    from lvm_ray.train.job import make_job, resolve

    if checkpoint.latest(recipe.run):
        return
    found, own = Path(parent) / checkpoint.FOLDER / f"step-{step:06d}", make_job(resolve(recipe)).state
    state = replace(checkpoint.read_state(found), fingerprint=own.fingerprint, plan=own.plan)
    lines = [json.dumps(line) + "\n" for line in read_metrics(parent) if line["step"] <= step]
    (Path(recipe.run) / METRICS_FILE).write_text("".join(lines), encoding="utf-8")
    checkpoint.save(recipe.run, state, *checkpoint.load(found), recipe.train.keep_checkpoints, recipe.train.keep_best)


def _report(recipe: Recipe, goal: str, majority: str, after: int) -> int:
    """Report the validations after a step, one by one: the last one's step."""
    from ray import tune

    for line in validations(recipe.run):
        if line["step"] > after:
            after = line["step"]
            tune.report({"step": after, "objective": objective(goal, line, recipe, majority)})
    return after


def reason_of(error: BaseException) -> str:
    """An exception as one line for people."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text[:LONGEST]
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:LONGEST]
