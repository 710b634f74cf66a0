"""A sweep from a recipe and a space to its answers: rounds of trials, the best few again with new seeds, what was found.

Nothing here remembers anything: each round is listed anew, and what its trials came to is read from their folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvm_ray import config, tally
from lvm_ray.config import Recipe
from lvm_ray.data.balance import strategy, training_rows
from lvm_ray.data.plan import make_plan
from lvm_ray.data.shards import Manifest, open_shards
from lvm_ray.errors import UserError
from lvm_ray.progress import Bar, stage
from lvm_ray.train.workers import write
from lvm_ray.tune import answers, search
from lvm_ray.tune.board import Board
from lvm_ray.tune.population import boundary
from lvm_ray.tune.space import Settings, Space, check_keys, corners
from lvm_ray.tune.trial import Outcome, Trial, Work, claim, outcome_of, recipe_of, tallied

FACTS, JSON, BEST = "space.json", "sweep.json", "best.yaml"
VALIDATIONS = 9  # of a training that may be stopped


class Sweep:
    """What is searched, and where: values that follow from a recipe and a space.

    recipe     of the training that is varied: a pipeline's student, or a single run
    folder     of the sweep
    reference  settings of the trials that the winner is compared with; in words `against`
    seed       of trials that set none

    Raises UserError where the recipe cannot have the space's values.
    """

    def __init__(self, recipe: Recipe, space: Space) -> None:
        self.space = space
        self.folder = os.path.abspath(f"{recipe.run}/tune/{space.name}")
        self.recipe = _varied(recipe)
        check_keys(space, self.recipe)
        if not self.recipe.train.validation:
            raise UserError("train.validation: 0, and trials are compared by their validation: set it to 32")
        wanted = space.reference_of(self.recipe)
        self.against = answers.settings_text(wanted)
        self.reference = space.fixed | {
            key: value for key, value in wanted.items() if key in space.values or value != config.value_at(self.recipe, key)
        }
        self.seed = self.recipe.training_seed

    def recipe_of(self, trial: Trial) -> Recipe:
        """A trial's recipe, as far as it does not depend on the machine."""
        recipe = recipe_of(self.recipe, trial, self.folder, self.space.path)
        if self.space.search == "population":
            every = recipe.train.steps // self.space.generations
        elif self.space.stopping:
            every = max(1, min(recipe.train.checkpoint_every, recipe.train.steps // VALIDATIONS))
        else:
            return recipe
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpoint_every": every})})

    def first_round(self) -> list[Trial]:
        """The trials that the search begins with; of a grid and of random ones these are all."""
        return self.listed(next(self.rounds()), 0)

    def rounds(self) -> search.Rounds:
        """What the search lists, round by round."""
        return search.rounds(self.space, self.recipe, self.seed)

    def listed(self, proposals: Sequence[search.Proposal], first: int) -> list[Trial]:
        """A round's trials, numbered from `first` on."""
        return [Trial(first + place, "search", one.settings, None, one.parent, one.until) for place, one in enumerate(proposals)]

    def repeats(self, outcomes: Sequence[Outcome]) -> list[Trial]:
        """The best few and the reference with new seeds; without repeats the reference alone, where it is no trial already."""
        seeds = [self.seed + 1 + number for number in range(self.space.repeats)]
        no_seed: list[int | None] = [None]
        ranked = answers.ranked(outcomes, self.space.objectives[0])
        best = ranked[: self.space.best] if seeds else []
        wanted: list[tuple[str, Settings, int | None]] = [
            ("again", one.trial.settings, None) for one in ranked[: self.space.best] if self.space.search == "population"
        ]
        wanted += [("repeat", one.trial.settings, seed) for one in best for seed in seeds]
        if ranked and not any(answers.same(one.trial.settings, self.reference) for one in (best if seeds else ranked)):
            wanted += [("reference", self.reference, seed) for seed in (seeds or no_seed)]
        return [Trial(len(outcomes) + place, *one) for place, one in enumerate(wanted)]

    def check_data(self, manifest: Manifest) -> None:
        """Raises UserError where these shards lack what an end of a range asks for, or validation sentences."""
        from lvm_ray.train.validation import read_validation

        for settings in [*corners(self.space), self.reference]:
            one = config.changed(self.recipe, settings, self.space.path)
            try:
                strategy(one.balance, training_rows(manifest, one), manifest.images_per_row)
            except UserError as error:
                raise UserError(f"{self.space.path}: {error}") from None
        if not len(read_validation(self.recipe)["task"]):
            raise UserError(
                f"{self.recipe.shard_folder}: no validation sentences, by which trials are compared: give the tasks `validation`"
            )

    def require_same(self) -> None:
        """Keep what is searched in the sweep's folder. Raises UserError where it holds another search."""
        path, own = Path(self.folder) / FACTS, {"recipe": config.fingerprint(self.recipe), "space": self.space.described()}
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else own
        if found != own:
            what = "space" if found["recipe"] == own["recipe"] else "recipe"
            raise UserError(
                f"{self.folder}: holds trials of another {what}: rename the space's file to search anew, or remove this folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(own, indent=1) + "\n")


def _varied(recipe: Recipe) -> Recipe:
    if recipe.continual:
        raise UserError("continual: a sweep varies one training, not one stage after another: leave continual out")
    return config.student_recipe(recipe) if recipe.teacher else recipe.model_copy(update={"shards": recipe.shard_folder})


def run(sweep: Sweep) -> dict[str, Any]:
    """Run a sweep to its end, over shards and teachers that are there: the values of its `sweep.json`.

    Trials that fail are among the values. Raises UserError, before any trial, where something cannot be.
    """
    manifest = open_shards(sweep.recipe.shard_folder).manifest
    sweep.check_data(manifest)
    sweep.require_same()
    rounds, names = _Rounds(sweep, manifest), sweep.space.objectives
    searching = sweep.rounds()
    outcomes: list[Outcome] = []
    proposals = next(searching)
    while proposals:
        found = rounds.run(sweep.listed(proposals, len(outcomes)), outcomes)
        outcomes += found
        proposals = _next(searching, [[one.objectives[name] for name in names] if one.objectives else None for one in found])
    outcomes += rounds.run(sweep.repeats(outcomes), outcomes)
    return rounds.keep(outcomes, complete=True)


def _next(searching: search.Rounds, found: list[search.Found]) -> list[search.Proposal]:
    try:
        return searching.send(found)
    except StopIteration:
        return []


class _Rounds:
    """Runs rounds one after another, and keeps what they come to."""

    def __init__(self, sweep: Sweep, manifest: Manifest) -> None:
        self._sweep, self._manifest = sweep, manifest
        rows = training_rows(manifest, sweep.recipe)
        self._majority = max(rows, key=lambda task: rows[task][0] * manifest.images_per_row[task])
        self._answered: set[tuple[str, int]] = set()  # plans to whose sentences the answers are there
        self._machine: Any = None  # (resolved compute section, Room): looked at where a trial is to be trained

    def run(self, trials: list[Trial], before: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes of a round's trials. Those that are over already are left as they are."""
        waiting = [one.trial for one in self._outcomes(trials) if one.state == "waiting"]
        if waiting:
            self._train(trials, waiting, before)
        found = self._outcomes(trials)
        self.keep([*before, *found])
        lost = next((one.trial for one in found if one.state == "waiting"), None)
        if lost:
            raise UserError(f"{lost.folder(self._sweep.folder)}: neither finished nor failed: the same command goes on with it")
        return found

    def keep(self, outcomes: Sequence[Outcome], complete: bool = False) -> dict[str, Any]:
        """Write `sweep.json`, and `best.yaml` where there is a winner: the values."""
        sweep = self._sweep
        counts = [tallied(one.trial.folder(sweep.folder)) for one in outcomes]
        values = answers.summary(
            outcomes,
            sweep.space,
            sweep.reference,
            sweep.against,
            sweep.seed,
            {kind: sum(one[kind] for one in counts) for kind in tally.KINDS},
            complete,
        )
        write(Path(sweep.folder) / JSON, json.dumps(values, indent=1) + "\n")
        best = answers.winner(outcomes, sweep.space)
        if best:
            recipe = config.load(f"{best.trial.folder(sweep.folder)}/config.yaml", run=f"{sweep.folder}/best")
            write(Path(sweep.folder) / BEST, config.dump(recipe))
        return values

    def _outcomes(self, trials: Sequence[Trial]) -> list[Outcome]:
        names = self._sweep.space.objectives
        return [outcome_of(trial, self._sweep.recipe_of(trial), names, self._majority) for trial in trials]

    def _train(self, trials: list[Trial], waiting: list[Trial], before: Sequence[Outcome]) -> None:
        from lvm_ray.train.job import absolute
        from lvm_ray.tune import running

        sweep, space = self._sweep, self._sweep.space
        compute, room = self._look_at_machine()
        recipes = {
            one.number: absolute(sweep.recipe_of(one).model_copy(update={"compute": room.compute(compute)})) for one in waiting
        }
        if space.search == "population" and room.workers:
            raise UserError("compute.workers: a population's trials train in one process each: set it to 1")
        works = {one.number: self._work(one, recipes[one.number]) for one in waiting}
        running.start(room.cpus)
        self._ask_teachers(list(recipes.values()), compute if room.workers else running.whole_machine(compute))
        for trial in trials:
            claim(trial, trial.folder(sweep.folder))
        known = [*before, *self._outcomes(trials)]
        over = [
            one.trial.folder(sweep.folder) for one in known if one.trial.kind == "search" and one.state in ("finished", "stopped")
        ]
        stops = space.stopping and trials[0].kind == "search"
        board = Board(space, known, recipes)

        def changed(number: int, begins: bool) -> None:
            if begins:
                board.begin(number)
                return
            found = self._outcomes(trials)
            board.end(found[number - trials[0].number])
            self.keep([*before, *found])

        name = "trials" if trials[0].kind == "search" else "new seeds"
        with stage(name, total=len(trials), unit="trials") as bar, board.shown(bar):
            bar.set(len(trials) - len(waiting), note=f"{room.at_once} at once")
            running.run_trials(works, room, sweep.folder, space.objectives[0], self._majority, over if stops else None, changed)

    def _work(self, trial: Trial, recipe: Recipe) -> Work:
        """What a trial's process does, with its recipe as it gets it."""
        if trial.parent is None:
            return Work(recipe, trial.until)
        space = self._sweep.space
        generation = trial.number // space.trials
        before = boundary(generation, space.generations, recipe.train.steps)
        return Work(recipe, trial.until, (f"{self._sweep.folder}/trials/{trial.parent:05d}", before))

    def _look_at_machine(self) -> Any:
        """The compute section as resolved, and the trials' room: the same for all rounds, since threads decide last digits."""
        from lvm_ray.train.job import resolve
        from lvm_ray.tune.running import room_for

        if self._machine is None:
            sweep = self._sweep
            grouped = "compute.workers" in sweep.space.values
            base = config.changed(sweep.recipe, sweep.space.fixed, sweep.space.path)
            resolved = resolve(base)
            self._machine = resolved.compute, room_for(resolved, base.compute.threads, sweep.space.at_once, grouped)
        return self._machine

    def _ask_teachers(self, recipes: Sequence[Recipe], compute: Any) -> None:
        """Have the teachers' answers to every sentence of the trials' plans in their caches.

        Raises UserError where the recipe, the teachers and the data do not fit together.
        """
        from lvm_ray.train.caching import cache
        from lvm_ray.train.job import make_job

        plans = {(plan.fingerprint, len(plan)): one for one in recipes for plan in [make_plan(self._manifest, one)]}
        missing = {name: one for name, one in plans.items() if name not in self._answered}
        kept = [name for name, one in recipes[0].teachers.items() if one.cache]
        if kept and missing:
            with stage("answers", total=len(missing) * len(kept), unit="plans") as bar:
                for one in missing.values():
                    for name in kept:
                        part = Bar(name, None, "sentences")
                        cache(one.model_copy(update={"compute": compute}), name, part)
                        bar.advance(1, note=f"{part.total:,.0f} sentences of {name}")
        if not self._answered:
            make_job(recipes[0])
        self._answered |= set(missing)


def describe(sweep: Sweep) -> str:
    """What a sweep would do and cost, as text: its trials, those that are over, and the hours. Leaves nothing behind."""
    from lvm_ray import estimate
    from lvm_ray.progress import duration
    from lvm_ray.train.job import resolve

    space, trials = sweep.space, sweep.first_round()
    recipes = [sweep.recipe_of(trial) for trial in trials]
    resolved = resolve(recipes[0])
    rate = estimate.matmul_rate(resolved.compute.precision) * estimate.CPU_SHARE

    def seconds(recipe: Recipe) -> float:
        tokens = recipe.train.batch * recipe.sentence_tokens * recipe.train.steps
        teachers = estimate.teacher_models(recipe)  # those that no cache stands for
        operations = estimate.operations_per_token(recipe.model, recipe.tokenizer.codes, recipe.sentence_tokens, teachers)
        return tokens * operations / rate

    each = sum(map(seconds, recipes)) / len(recipes)
    again = space.repeats * (min(space.best, space.number) + 1) or 1
    places = [Path(recipe.run) for recipe in recipes]
    over = sum((place / "model" / "model.safetensors").is_file() or (place / "stopped.json").is_file() for place in places)
    values = [f"  {key}: {value}" for key, value in space.described()["values"].items()]
    return "\n".join(
        [
            f"{space.name}: {space.search} over",
            *values,
            *(
                f"  trial {trial.number}: {answers.settings_text(trial.settings, space.fixed)}, seed {sweep.seed}"
                for trial in trials
            ),
            *([f"  and {space.number - len(trials)} more, chosen by what these come to"] if space.number > len(trials) else []),
            f"  {over} of them are over already, in {sweep.folder}",
            f"then up to {again} trainings more: the best {space.best} and {sweep.against}, each with {space.repeats} new seeds"
            if space.repeats
            else f"then {sweep.against}, to compare with; with one seed no difference is sure",
            f"about {duration(each)} of this machine a training by its matrix product: "
            f"{duration(each * (space.trainings + again))} in all" + (", less what is stopped early" if space.stopping else ""),
        ]
    )
