"""Which trials a sweep has: generators that list a round's trials and are sent what they came to.

    search = rounds(space, recipe, seed)
    proposals = next(search)                 # of the first round
    proposals = search.send(found)           # of the next one; StopIteration: there is none

What is listed follows from the space, the seed and what is sent alone, never from time. So a sweep that was killed lists the same
trials again: it is sent what their folders say.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lvm_ray.config import Recipe
from lvm_ray.seeds import stable_hash
from lvm_ray.tune import population
from lvm_ray.tune.domains import Grid, draw, ends, is_log, is_whole, step_of, tidied
from lvm_ray.tune.space import Settings, Space

Found = Sequence[float] | None  # a trial's objectives, in the space's order; None where it has none

STARTUP = 8  # trials of tpe that are drawn before it begins to choose: at most, and at most half of all


class Proposal(NamedTuple):
    """A trial that is to be.

    settings  by key path
    parent    place among all trials of the one that it goes on from; None: from nothing
    until     the step after which it leaves; None: it runs to its end
    """

    settings: Settings
    parent: int | None = None
    until: int | None = None


Rounds = Generator[list[Proposal], list[Found], None]


def rounds(space: Space, recipe: Recipe, seed: int) -> Rounds:
    """The rounds of a space's search over a recipe."""
    if space.search == "tpe":
        return _tpe(space, seed)
    if space.search == "population":
        return _population(space, recipe, seed)
    return _once(_combinations(space) if space.search == "grid" else _drawn(space, seed))


def _once(settings: list[Settings]) -> Rounds:
    yield [Proposal(one) for one in settings]


def _combinations(space: Space) -> list[Settings]:
    """Every combination of the grid's values, the last key's changing fastest."""
    keys, values = list(space.varied), [ends(value) for value in space.varied.values()]
    return [space.fixed | dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]


def _drawn(space: Space, seed: int) -> list[Settings]:
    """Trials that are drawn one after another; each for all combinations of the grids among the values."""
    generator = np.random.default_rng([seed, stable_hash("tune")])
    grids = {key: value.values for key, value in space.varied.items() if isinstance(value, Grid)}
    found = []
    for _ in range(space.trials):
        drawn = {key: draw(value, generator) for key, value in space.varied.items() if key not in grids}
        for chosen in itertools.product(*grids.values()):
            of_all = drawn | dict(zip(grids, chosen, strict=True))
            found.append(space.fixed | {key: of_all[key] for key in space.varied})
    return found


def _tpe(space: Space, seed: int) -> Rounds:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Optuna calls experimental
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=min(STARTUP, max(1, space.trials // 2)),
            constant_liar=True,  # so that the trials of a round differ
            seed=(seed + stable_hash("tune")) % 2**32,
        )
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * len(space.objectives))
    distributions = {key: _distribution(optuna, value) for key, value in space.varied.items()}
    for start in range(0, space.trials, space.round):
        asked = [study.ask(distributions) for _ in range(min(space.round, space.trials - start))]
        chosen = [{key: _chosen(value, trial.params[key]) for key, value in space.varied.items()} for trial in asked]
        found = yield [Proposal(space.fixed | one) for one in chosen]
        for trial, values in zip(asked, found, strict=True):
            if values is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, list(values))


def _distribution(optuna: Any, domain: Any) -> Any:
    """A domain of Ray Tune as Optuna's; of a choice the number of its value, since Optuna takes plain values alone."""
    if hasattr(domain, "categories"):
        return optuna.distributions.CategoricalDistribution(range(len(domain.categories)))
    low, high = ends(domain)
    log, step = is_log(domain), step_of(domain)
    if is_whole(domain):
        return optuna.distributions.IntDistribution(low, high, log=log, step=1 if log else int(step or 1))
    return optuna.distributions.FloatDistribution(low, high, log=log, step=None if log else step)


def _chosen(domain: Any, value: Any) -> Any:
    return domain.categories[value] if hasattr(domain, "categories") else tidied(domain, value)


def _population(space: Space, recipe: Recipe, seed: int) -> Rounds:
    """Generations of one population: each goes on from the one before, the worst from the best, with shares of their own."""
    generator = np.random.default_rng([seed, stable_hash("population")])
    steps = int(space.fixed.get("train.steps", recipe.train.steps))
    members = population.first(space.varied, space.trials, generator)
    parents: list[int | None] = [None] * space.trials
    for generation in range(space.generations):
        last = generation == space.generations - 1
        until = None if last else population.boundary(generation + 1, space.generations, steps)
        fixed = {key: value for key, value in space.fixed.items() if not key.startswith(population.SHARES)}
        settings = [fixed | population.settings_of(member, space.fixed, steps) for member in members]
        found = yield [Proposal(one, parent, until) for one, parent in zip(settings, parents, strict=True)]
        if not last:
            places, members = population.next_generation(members, found, until or steps, generator)
            parents = [generation * space.trials + place for place in places]
