"""The stages of a pipeline, one function a verb: each takes a recipe, shows its progress and leaves its files.

    synth -> tokenize -> balance -> train (teacher, then student; or stage after stage) -> evaluate -> report

`demo` is all of them in order. Every stage that is finished already says so and does nothing, so that an interrupted
pipeline goes on where it stopped. Heavy libraries are imported inside the stages, after the cheap checks.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lvm_ray import config, placement, tables
from lvm_ray.config import Recipe
from lvm_ray.continual import stage_recipes
from lvm_ray.errors import UserError
from lvm_ray.observe import prometheus
from lvm_ray.progress import duration, say, stage
from lvm_ray.storage import redacted, short_names, split_name, write_file
from lvm_ray.working_copy import moved, published, working_copy

if TYPE_CHECKING:
    from lvm_ray.tasks.base import Split

Verb = TypeVar("Verb", bound=Callable[..., Any])


def _in_working_copy(verb: Verb) -> Verb:
    """A verb of a run at a URI works in a folder of this machine, which is sent back when it has ended."""

    @wraps(verb)
    def wrapped(recipe: Recipe, *arguments: Any, **options: Any) -> Any:
        prometheus.name_run(published(recipe).run)
        with working_copy(recipe.run) as folder:
            return verb(moved(recipe, folder), *arguments, **options)

    return cast(Verb, wrapped)


@_in_working_copy
def synth(recipe: Recipe) -> None:
    """Write the embedded data set below the pipeline folder, where the recipe asks for one (`synth`)."""
    from lvm_ray.data import synthetic

    if not recipe.synth:
        raise UserError(
            "synth: this recipe names no embedded data set; add a section like `synth: {train: {segmentation: 3000}}`"
        )
    folder = Path(recipe.run) / "data" / "source"
    mark = folder / "synth.json"
    wanted = {"version": synthetic.VERSION, "counts": recipe.synth, "size": recipe.size, "seed": recipe.seed}
    total = sum(count for tasks in recipe.synth.values() for count in tasks.values())
    with stage("synth", total=total, unit="pairs") as bar:
        if mark.is_file() and json.loads(mark.read_text()) == wanted:
            bar.set(total, note="as before")
            return
        shutil.rmtree(folder, ignore_errors=True)
        synthetic.write(str(folder), recipe.synth, recipe.size, recipe.seed, bar.advance)
        mark.write_text(json.dumps(wanted))


@_in_working_copy
def tokenize(recipe: Recipe) -> None:
    """Train the tokenizer where the pipeline has none, then make token shards of every split, task and copy."""
    from lvm_ray.data import tokenize as shards

    placement.check(recipe, ["tokenize"])
    _make_tokenizer(recipe)
    with stage("tokenize", unit="pairs") as bar:
        shards.tokenize(recipe, bar)


@_in_working_copy
def balance(recipe: Recipe) -> list[dict[str, Any]]:
    """Print and keep the balance table: what each task has, what part of the plan it gets, and how often it is seen.

    Leaves `data/balance.json` and its picture `data/balance.svg`; the table's rows. Of stages every one has its table, and the
    last one's is kept.
    """
    plans = stage_recipes(recipe) if recipe.continual else {recipe.balance.strategy: recipe}
    for title, plan in plans.items():
        rows = _print_balance(title, plan)
    from lvm_ray.report.mixture import balance_picture

    place = Path(recipe.run) / "data"
    place.mkdir(parents=True, exist_ok=True)
    (place / "balance.json").write_text(json.dumps(rows, indent=1))
    (place / "balance.svg").write_text(balance_picture(rows, recipe.balance.most_repeats), encoding="utf-8")
    return rows


def _print_balance(title: str, recipe: Recipe) -> list[dict[str, Any]]:
    from lvm_ray.data.balance import balance_table, warnings
    from lvm_ray.data.shards import open_shards

    rows = balance_table(open_shards(recipe.shard_folder).manifest, recipe)
    tables.print_balance(title, rows)
    for line in warnings(rows):
        say(f"warning: {line}")
    return rows


@_in_working_copy
def train(recipe: Recipe, only: str | None = None) -> list[str]:
    """Train what the recipe describes: teacher then student, stage after stage, or a single run. The run folders.

    `only`: one of tokenizer, teacher and student by itself. Raises UserError where the recipe has no teacher to tell apart.
    """
    from lvm_ray.data.balance import balance_table, warnings
    from lvm_ray.data.shards import open_shards

    if only == "tokenizer":
        _make_tokenizer(recipe)
        return [recipe.tokenizer_folder]
    placement.check(recipe, ["train"])
    manifest = open_shards(recipe.shard_folder).manifest
    for plan in stage_recipes(recipe).values() if recipe.continual else [recipe]:
        for line in warnings(balance_table(manifest, plan)):
            say(f"warning: {line}")
    return _train(recipe, only)


def _train(recipe: Recipe, only: str | None = None) -> list[str]:
    from lvm_ray.train import launch

    runs = _runs(recipe, only)
    if recipe.teacher or recipe.continual:
        _keep_recipe(recipe)
    folders = []
    for name, run in runs.items():
        if name == "student":  # what its teacher says, the pipeline knows how to get
            _cache(run)
        with working_copy(run.run), stage(f"train {Path(run.run).name}", total=run.train.steps, unit="steps") as bar:
            folders.append(str(launch.train(run, bar)))
    return folders


def cache(recipe: Recipe) -> None:
    """Keep the answers of the teachers for which the recipe names a `cache`, to every sentence of its plan.

    Raises UserError where it names none.
    """
    prometheus.name_run(published(recipe).run)
    run = list(_runs(recipe).values())[-1]
    if not any(one.cache for one in run.teachers.values()):
        raise UserError(
            "distill.cache: missing: name the folder of the teacher's answers, as --set distill.cache=runs/demo/answers"
        )
    _cache(run)


def _cache(run: Recipe) -> None:
    kept = {name: one.cache for name, one in run.teachers.items() if one.cache}
    if not kept:
        return
    from lvm_ray.train.caching import cache
    from lvm_ray.train.job import resolve

    run = resolve(run, "cache")
    for name, folder in kept.items():
        with stage(f"answers of {name}", unit="sentences") as bar:
            facts = cache(run, name, bar)
        a_token = facts.state_bytes / run.sentence_tokens
        say(f"{folder}: {a_token:,.0f} bytes a token of a sentence; answers to 1 B tokens would take {a_token / 1e3:,.2g} TB")


def _runs(recipe: Recipe, only: str | None = None) -> dict[str, Recipe]:
    """The single runs that a recipe describes, by name, in the order of their training."""
    if recipe.teacher is None:
        if only:
            raise UserError(f"--only {only}: this recipe has no teacher section: leave --only out")
        return stage_recipes(recipe) if recipe.continual else {"run": recipe}
    runs = {"teacher": config.teacher_recipe(recipe), "student": config.student_recipe(recipe)}
    return {only: runs[only]} if only else runs


def dry_run(
    recipe: Recipe, trains: bool, only: str | None = None, scores: bool = False, stages: Sequence[placement.Stage] = ()
) -> None:
    """Print what a verb would do and cost. Of one that `trains`, also make every check of a run that its data allows; of one that
    `scores`, list the benchmarks; of its `stages`, look for nodes that may run them.

    Raises UserError where a check fails. Leaves nothing behind.
    """
    from lvm_ray.estimate import describe

    if only == "tokenizer":
        trains, only = False, None
    runs = _runs(recipe, only)
    if trains:
        from lvm_ray.train.job import resolve

        runs = {name: resolve(run) for name, run in runs.items()}
    print(describe(recipe, runs, trains))
    if scores and recipe.benchmarks:
        from lvm_ray.evaluate.subjects import benchmark_lines

        print("\n".join(benchmark_lines(recipe)))
    placement.check(placement.at_once(recipe), stages)
    if trains:
        to_be_made = {run.run: name for name, run in runs.items() if not Path(run.run, "model").is_dir()}
        for name, run in runs.items():
            _check(name, placement.at_once(run), to_be_made)


def costs(recipe: Recipe, only: str | None = None, space_file: str | None = None) -> str:
    """What a verb that is sent elsewhere would cost there, as text; of a sweep each of its trainings. Looks at no data."""
    from lvm_ray.estimate import describe
    from lvm_ray.tune.space import read_space

    text = describe(recipe, _runs(recipe, None if only == "tokenizer" else only), elsewhere=True)
    if space_file is None:
        return text
    space = read_space(space_file)
    again = space.repeats * (space.best + 1) or 1
    return f"{text}\n{space.name}: {space.trainings} trainings of the last of these, and up to {again} to compare and repeat"


def _check(name: str, run: Recipe, to_be_made: Mapping[str, str]) -> None:
    """Make and show the checks of one run. Those of data and models that are still to be made, {folder: name}, have to wait."""
    from lvm_ray.data.shards import has_manifest
    from lvm_ray.train import launch
    from lvm_ray.train.preflight import Check, checks

    data = has_manifest(run.shard_folder)
    waits = "data: run lvm-ray tokenize" if not data else ""
    needed = [str(folder) for folder in (run.model.init, *(one.teacher for one in run.teachers.values()))]
    missing = next((to_be_made[folder] for folder in needed if folder in to_be_made), None)
    if missing and not waits:
        waits = f"the {missing}" if missing == "teacher" else missing
    rehearsal = [] if waits else [Check("rehearsal", lambda: launch.rehearse(run))]
    for check in [*checks(run, data), *rehearsal]:
        with stage(f"{name}: {check.name}") as bar:
            bar.set(1, note=check.run())
    if waits:
        say(f"{name}: {'rehearsal waits' if data else 'shards and rehearsal wait'} for {waits}")


@_in_working_copy
def tune(recipe: Recipe, space_file: str, dry: bool = False) -> dict[str, Any]:
    """Search the student's settings as a space file says: the values of the sweep's `sweep.json`.

    What the trials need and is not there yet is made first: tokens, and a pipeline's teacher. `dry`: say what it would do and
    cost.
    """
    from lvm_ray.data.shards import has_manifest
    from lvm_ray.tune import running
    from lvm_ray.tune import sweep as sweeps
    from lvm_ray.tune.board import print_trials
    from lvm_ray.tune.space import read_space

    sweep = sweeps.Sweep(recipe, read_space(space_file))
    if dry:
        print(sweeps.describe(sweep))
        return {}
    data = has_manifest(recipe.shard_folder)
    taught = not recipe.teacher or (Path(recipe.run) / "teacher" / "model" / "model.safetensors").is_file()
    if not (data and taught):
        running.start(os.cpu_count() or 1)  # at once as large as the trials will need it
    if not data:
        if recipe.synth:
            synth(recipe)
        tokenize(recipe)
    if not taught:
        _train(recipe, "teacher")
    values = sweeps.run(sweep)
    print_trials(values, sweep.space)
    if values["best"]:
        say(f"lvm-ray train {sweep.folder}/{sweeps.BEST} --run DIR: trial {values['best']['number']} again, to the last digit")
    report(sweep.folder)
    return values


@_in_working_copy
def evaluate(recipe: Recipe) -> None:
    """Score the recipe's runs on its held-out items; a pipeline's own `evaluation.json` is the student's, or the last stage's."""
    from lvm_ray.evaluate.run import evaluate_runs

    placement.check(recipe, ["evaluate"])
    runs = [run.run for run in _runs(recipe).values()]
    for run in runs:
        _require_model(run)
    with stage("evaluate", unit="answers") as bar:
        results = evaluate_runs(runs, recipe, bar)
    names, references = ["evaluation.json"], None
    if recipe.evaluate.reference_minutes:
        from lvm_ray.reference.run import FILE, write_references

        with stage("reference networks", unit="core-seconds") as bar:
            references = write_references(runs[-1], recipe, recipe.evaluate.reference_minutes, bar)
        names.append(FILE)
    if runs[-1] != recipe.run:
        for name in names:
            shutil.copyfile(f"{runs[-1]}/{name}", f"{recipe.run}/{name}")
    tables.print_scores({Path(run).name: result for run, result in zip(runs, results, strict=True)}, references)


def compare(first: str, second: str, out: str | None = None) -> dict[str, Any]:
    """Print by what the scores of two evaluated runs differ on the items that both answered; `out` keeps it as JSON."""
    from lvm_ray.evaluate import compare as comparing

    found = comparing.compare(first, second)
    tables.print_comparison(found, short_names(first, second))
    if out:
        folder, name = split_name(out)
        write_file(folder or ".", name, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
    return found


def study(folder: str, over: Sequence[str], split: Split) -> dict[str, Any]:
    """Ask a trained run in every way that the settings of `over` make, print the table, and say what would have helped."""
    from lvm_ray.evaluate import study as studying

    with working_copy(folder) as place:
        run = list(_runs(config.load(f"{place}/config.yaml", run=place)).values())[-1].run
        _require_model(run)
        with stage("study", unit="ways") as bar:
            found = studying.study(run, over, split, bar)
    tables.print_study(found, split)
    return found


def report(folder: str, form: str = "html", others: Sequence[str] = ()) -> str:
    """Write the report of a pipeline, run or sweep folder as html, md or json, with other runs beside it; its path."""
    from lvm_ray.report.page import write_report
    from lvm_ray.report.sweep import write_sweep

    names = short_names(*map(redacted, (folder, *others)))
    with ExitStack() as copies, stage("report") as bar:
        place, *beside = [copies.enter_context(working_copy(one)) for one in (folder, *others)]
        if (Path(place) / "sweep.json").is_file() and not beside:
            path = write_sweep(place, form)
        else:
            path = write_report(place, form, beside, names)
        bar.set(1, note=str(path))
    return str(path)


@_in_working_copy
def demo(recipe: Recipe) -> str:
    """Every stage in order, from nothing to the report page; the page's path."""
    began = time.monotonic()
    placement.check(recipe, placement.STAGES)
    if recipe.synth:
        synth(recipe)
    tokenize(recipe)
    balance(recipe)
    _train(recipe)  # what there is to warn of, the balance has said
    evaluate(recipe)
    path = report(recipe.run)
    say(f"done in {duration(time.monotonic() - began)}: open {path}")
    return path


def _make_tokenizer(recipe: Recipe) -> None:
    """Train the tokenizer, or read the published one, where the pipeline has none."""
    from lvm_ray import tokenizer

    steps = 0 if recipe.tokenizer.kind == "published" else recipe.tokenizer.steps
    with stage("tokenizer", total=steps or None, unit="steps") as bar:
        if tokenizer.is_trained(recipe):
            bar.set(steps, note="as before")
        else:
            tokenizer.train_tokenizer(recipe, lambda done, note: bar.set(done, note=note))
            bar.set(steps)


def _keep_recipe(recipe: Recipe) -> None:
    """The pipeline's own resolved recipe, at the top of its folder."""
    place = Path(recipe.run)
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(config.dump(published(recipe)), encoding="utf-8")


def _require_model(run: str) -> None:
    if not (Path(run) / "model" / "model.safetensors").is_file():
        raise UserError(f"{run}: no trained model here (model/model.safetensors); run `lvm-ray train` first")
