"""What one sees of a sweep: a table of its trials that is drawn again and again while they run, and the one at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lvm_ray.config import Recipe
from lvm_ray.progress import Bar, duration, is_live, live_table, say, table
from lvm_ray.train.meter import last_line
from lvm_ray.tune import answers
from lvm_ray.tune.space import Space
from lvm_ray.tune.trial import Outcome

SHOWN = 12  # rows of the table that is drawn again and again
REASON = 60  # letters of a reason in a table


class Board:
    """The trials of a sweep as far as they are known, while a round of them runs.

    outcomes  of the rounds before and of this one
    recipes   of the trials that are trained in this round
    """

    def __init__(self, space: Space, outcomes: Sequence[Outcome], recipes: Mapping[int, Recipe]) -> None:
        self._space, self._goal = space, space.objectives[0]
        self._outcomes = {one.trial.number: one for one in outcomes}
        self._recipes = recipes
        self._running: dict[int, str] = {}

    def begin(self, number: int) -> None:
        """A trial has started."""
        self._running[number] = "starts"

    def end(self, one: Outcome) -> None:
        """A trial is over."""
        self._running.pop(one.trial.number, None)
        self._outcomes[one.trial.number] = one
        shown, value = answers.settings_text(one.trial.settings, self._space.fixed), one.objectives.get(self._goal)
        if one.state == "failed":
            say(f"trial {one.trial.number} failed ({shown}): {one.reason}")
        elif not is_live():
            say(f"trial {one.trial.number} {one.state} ({shown})" + ("" if value is None else f": {value:.4f}"))

    def rows(self) -> list[list[Any]]:
        """Trials that run, then the best, then those without a result."""
        over = [one for one in list(self._outcomes.values()) if one.state != "waiting"]
        over.sort(key=lambda one: (one.state == "failed", one.objectives.get(self._goal, float("inf"))))
        running = dict(self._running)
        shown = [*(self._outcomes[number] for number in sorted(running)), *over][:SHOWN]
        return [self._row(one, running.get(one.trial.number, one.state)) for one in shown]

    def _row(self, one: Outcome, state: str) -> list[Any]:
        seed = "" if one.trial.seed is None else f", seed {one.trial.seed}"
        settings = answers.settings_text(one.trial.settings, self._space.fixed) + seed
        return [one.trial.number, settings, state, one.objectives.get(self._goal), duration(one.seconds) if one.seconds else ""]

    def look(self, bar: Bar) -> None:
        """Read how far the running trials are, and move a bar that counts this round's trials."""
        for number in list(self._running):
            line = last_line(self._recipes[number].run)
            if line and number in self._running:
                self._running[number] = f"step {line['step']} of {self._recipes[number].train.steps}"
        trained = sum(self._outcomes[number].state != "waiting" for number in self._recipes)
        bar.set((bar.total or 0) - len(self._recipes) + trained)

    @contextmanager
    def shown(self, bar: Bar) -> Iterator[None]:
        """Draw the table and move the bar while the block runs."""
        from lvm_ray.threads import watching

        columns = ["trial", "settings", "state", answers.NAMES[self._goal], "training"]
        with live_table("", columns, self.rows), watching(lambda: self.look(bar)):
            yield


def print_trials(values: Mapping[str, Any], space: Space) -> None:
    """All trials of a sweep's values, the search's first, the best of each kind before the others; and what was found."""
    goal = space.objectives[0]
    trials = sorted(values["trials"], key=lambda one: (one["kind"] != "search", one["objectives"].get(goal, float("inf"))))
    rows = [
        [
            str(one["number"]),
            answers.settings_text(one["settings"], space.fixed),
            one["kind"],
            str(one["seed"]),
            one["state"] + (f" at step {one['step']}" if one["state"] == "stopped" else ""),
            *(one["objectives"].get(name) for name in space.objectives),
            one["reason"][:REASON],
        ]
        for one in trials
    ]
    table("trials", ["trial", "settings", "kind", "seed", "state", *(answers.NAMES[name] for name in space.objectives), ""], rows)
    say(values["sentence"])
