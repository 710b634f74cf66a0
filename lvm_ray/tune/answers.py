"""What a sweep found: pure functions from outcomes to `sweep.json`, to the recipe of the winner, and to a sentence about it.

The trial that a search likes best is best in part by luck, since its own result chose it. So the best few are trained again with
new seeds, and what is said of the winner is said of these alone, paired by seed with the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lvm_ray.tune.space import Settings, Space
from lvm_ray.tune.trial import Outcome

NAMES = {"target_perplexity": "target perplexity", "majority_cost": "the majority task's perplexity", "parameters": "parameters"}
SHORT = {"distill.temperature": "T=", "distill.weight": "weight "}


def same(one: Settings, other: Settings) -> bool:
    """Whether two trials differ by their seeds alone."""
    return one == other  # 1 and 1.0 are the same


def ranked(outcomes: Sequence[Outcome], goal: str) -> list[Outcome]:
    """The search's trials that ran to their end, the best first; of equal ones, and of the same settings, the first alone."""
    found: list[Outcome] = []
    done = [one for one in outcomes if one.trial.kind == "search" and one.state == "finished" and one.trial.until is None]
    for one in sorted(done, key=lambda one: (one.objectives[goal], one.trial.number)):
        if not any(same(one.trial.settings, other.trial.settings) for other in found):
            found.append(one)
    return found


def by_seed(outcomes: Sequence[Outcome], settings: Settings, goal: str) -> dict[int | None, float]:
    """{seed: objective} of the trials with these settings that were trained again or are the reference."""
    return {
        one.trial.seed: one.objectives[goal]
        for one in outcomes
        if one.trial.kind in ("repeat", "reference") and one.state == "finished" and same(one.trial.settings, settings)
    }


def own_or_by_seed(outcomes: Sequence[Outcome], settings: Settings, goal: str) -> dict[int | None, float]:
    """{seed: objective} over new seeds; where there are none, of the search's own trial with these settings."""
    own = [one.objectives[goal] for one in ranked(outcomes, goal) if same(one.trial.settings, settings)]
    return by_seed(outcomes, settings, goal) or ({None: own[0]} if own else {})


def mean(values: Sequence[float]) -> float:
    """Of perplexities: the exponential of the mean of their logarithms."""
    return math.exp(sum(map(math.log, values)) / len(values))


def winner(outcomes: Sequence[Outcome], space: Space) -> Outcome | None:
    """The search's trial whose settings are best over new seeds; where nothing was trained again, the best by its own result."""
    goal = space.objectives[0]
    best = ranked(outcomes, goal)
    again = [
        (mean(list(found.values())), one.trial.number, one)
        for one in best
        if (found := by_seed(outcomes, one.trial.settings, goal))
    ]
    if again:
        return min(again, key=lambda entry: entry[:2])[2]
    return best[0] if best else None


def effect(ours: Mapping[int | None, float], theirs: Mapping[int | None, float]) -> dict[str, Any] | None:
    """By how many percent a perplexity is lower than another's: over the seeds that both have, with Student's 95 % interval of
    the paired differences of logarithms; None of the interval with one seed, None where there is no seed."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    differences = [math.log(theirs[seed]) - math.log(ours[seed]) for seed in seeds]
    n, centre = len(differences), sum(differences) / len(differences)
    interval = None
    if n > 1:
        from scipy.stats import t

        error = math.sqrt(sum((one - centre) ** 2 for one in differences) / (n - 1) / n)
        half = float(t.ppf(0.975, n - 1)) * error
        interval = [_percent_lower(centre - half), _percent_lower(centre + half)]
    return {"percent": _percent_lower(centre), "ci95": interval, "seeds": n}


def _percent_lower(difference: float) -> float:
    return 100 * (1 - math.exp(-difference))


def settings_text(settings: Settings, fixed: Settings | None = None) -> str:
    """`T=2.8, weight 1, balance.ratios.derain 12`, without what all trials have."""
    shown = {key: value for key, value in settings.items() if key not in (fixed or {}) and value != {}}
    return ", ".join(_setting_text(key, value) for key, value in shown.items()) or "the recipe as it is"


def _setting_text(key: str, value: Any) -> str:
    if key == "balance.schedule":
        return _schedule_text(value)
    return f"{SHORT.get(key, f'{key} ')}{f'{value:.4g}' if isinstance(value, float) else value}"


def _schedule_text(parts: Sequence[Mapping[str, Any]]) -> str:
    """`from 0 %: pose 0.5 derain 0.5; from 50 %: ...`, shares as they are given."""
    return "; ".join(
        f"from {part['start']:.0%}: " + " ".join(f"{task} {share:.3g}" for task, share in part["shares"].items())
        for part in parts
    )


def sentence(outcomes: Sequence[Outcome], space: Space, reference: Settings, against: str) -> str:
    """What was found, and how sure one can be of it. `against`: the reference in words."""
    best, goal = winner(outcomes, space), space.objectives[0]
    if best is None:
        return "No trial ran to its end: there is no winner."
    ours, theirs = settings_text(best.trial.settings, space.fixed), own_or_by_seed(outcomes, reference, goal)
    if same(best.trial.settings, reference):
        return f"Nothing was better than {against}, which is the reference itself."
    found = effect(own_or_by_seed(outcomes, best.trial.settings, goal), theirs)
    if found is None:
        return f"{ours} has the lowest {NAMES[goal]}, {best.objectives[goal]:.4g}, and no reference to compare it with."
    way, size = ("lowers", found["percent"]) if found["percent"] >= 0 else ("raises", -found["percent"])
    result = f"{ours} {way} {NAMES[goal]} by {size:.1f} %"
    if found["ci95"] is None:
        return f"{result} against {against} with one seed: that is no result yet, since another seed may turn it round."
    low, high = found["ci95"] if found["percent"] >= 0 else (-found["ci95"][1], -found["ci95"][0])
    sure = "" if low > 0 else " The interval includes no difference at all: chance explains this as well."
    return f"{result} [{low:.1f}, {high:.1f}] against {against} ({found['seeds']} seeds).{sure}"


def summary(
    outcomes: Sequence[Outcome],
    space: Space,
    reference: Settings,
    against: str,
    seed: int,
    counters: Mapping[str, int],
    complete: bool,
) -> dict[str, Any]:
    """The values of `sweep.json`; `seed` is the recipe's own."""
    best, goal = winner(outcomes, space), space.objectives[0]
    return {
        "space": space.described(),
        "complete": complete,
        "sentence": sentence(outcomes, space, reference, against),
        "best": best and _over_seeds(outcomes, best.trial.settings, goal) | _entry(best, seed),
        "reference": _over_seeds(outcomes, reference, goal) | {"settings": reference, "text": against},
        "again": best and _again(outcomes, best, goal),
        "effect": best and effect(*(own_or_by_seed(outcomes, one, goal) for one in (best.trial.settings, reference))),
        "counters": dict(counters),
        "trials": [_entry(one, seed) for one in outcomes],
    }


def _again(outcomes: Sequence[Outcome], best: Outcome, goal: str) -> float | None:
    """Of a population's winner: what its schedule comes to when it is trained from nothing."""
    found = [one for one in outcomes if one.trial.kind == "again" and same(one.trial.settings, best.trial.settings)]
    return found[0].objectives.get(goal) if found else None


def _over_seeds(outcomes: Sequence[Outcome], settings: Settings, goal: str) -> dict[str, Any]:
    found = by_seed(outcomes, settings, goal)
    return {"mean": mean(list(found.values())) if found else None, "seeds": len(found)}


def _entry(one: Outcome, seed: int) -> dict[str, Any]:
    return {
        "number": one.trial.number,
        "kind": one.trial.kind,
        "settings": one.trial.settings,
        "parent": one.trial.parent,
        "until": one.trial.until,
        "seed": seed if one.trial.seed is None else one.trial.seed,
        "state": one.state,
        "step": one.step,
        "objectives": dict(one.objectives),
        "reason": one.reason,
        "seconds": one.seconds,
    }


def front(trials: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[int]:
    """Numbers of the entries of `sweep.json` that no other one beats in all objectives."""
    done = [one for one in trials if one["state"] == "finished" and one["kind"] == "search" and one.get("until") is None]

    def beaten(one: Mapping[str, Any]) -> bool:
        mine = [one["objectives"][name] for name in names]
        others = ([other["objectives"][name] for name in names] for other in done if other is not one)
        return any(all(b <= a for a, b in zip(mine, other, strict=True)) and other != mine for other in others)

    return [one["number"] for one in done if not beaten(one)]
