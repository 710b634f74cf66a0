"""Which trials a sweep has: generators that list a round's settings and are sent what they came to.

    search = rounds(space, seed)
    settings = next(search)                  # of the first round
    settings = search.send(found)            # of the next one; StopIteration: there is none

What is listed follows from the space, the seed and what is sent alone, never from time. So a sweep that was killed lists the same
trials again: it is sent what their folders say.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from lvm_ray.seeds import stable_hash
from lvm_ray.tune.space import Grid, Settings, Space, draw, ends, is_log, is_whole, step_of, tidied

Found = Sequence[float] | None  # a trial's objectives, in the space's order; None where it has none
Rounds = Generator[list[Settings], list[Found], None]

STARTUP = 8  # trials of tpe that are drawn before it begins to choose: at most, and at most half of all


def rounds(space: Space, seed: int) -> Rounds:
    """The rounds of a space's search."""
    if space.search == "tpe":
        return _tpe(space, seed)
    return _once(_combinations(space) if space.search == "grid" else _drawn(space, seed))


def _once(settings: list[Settings]) -> Rounds:
    yield settings


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
        for chosen in itertools.product(*grids.values()):
            of_grids = dict(zip(grids, chosen, strict=True))
            varied = {key: of_grids[key] if key in of_grids else draw(value, generator) for key, value in space.varied.items()}
            found.append(space.fixed | varied)
    return found


def _tpe(space: Space, seed: int) -> Rounds:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=min(STARTUP, max(1, space.trials // 2)),
        constant_liar=True,  # so that the trials of a round differ
        seed=(seed + stable_hash("tune")) % 2**32,
    )
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * len(space.objectives))
    distributions = {key: _distribution(optuna, value) for key, value in space.varied.items()}
    for start in range(0, space.trials, space.round):
        asked = [study.ask(distributions) for _ in range(min(space.round, space.trials - start))]
        found = yield [
            space.fixed | {key: _chosen(value, trial.params[key]) for key, value in space.varied.items()} for trial in asked
        ]
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
