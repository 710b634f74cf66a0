"""The journal's lines, passed on while a training writes them: to trackers, and on a cluster to Prometheus.

The driver reads them from the file, wherever the workers are that write it. So a tracker that is slow or away costs the training
nothing, its keys stay with the driver, and what it missed is made up from the file. Each gets the lines after the last step that
it has, so a run that goes on, or whose workers start again before lines that were passed on already, has no step twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from lvm_ray import ray_session
from lvm_ray.config import Recipe
from lvm_ray.observe import prometheus, trackers
from lvm_ray.progress import Bar, say
from lvm_ray.threads import watching
from lvm_ray.train.meter import last_line, lines_after


class Follower(Protocol):
    """Who gets the lines. `last` is the last step that it has."""

    last: int

    def log(self, line: Mapping[str, Any]) -> None: ...

    def close(self, done: bool) -> None: ...


@contextmanager
def followed(recipe: Recipe, bar: Bar) -> Iterator[None]:
    """Pass on the lines of a run's journal while the body trains, and the last ones when it ends, well or not.

    Whoever fails is said once, and gets what it lacks with the next line.
    """
    feeds = [_Feed(recipe.run, name, partial(trackers.OPEN[name], recipe)) for name in recipe.trackers]
    if ray_session.joined():
        journal = prometheus.Journal(bar.name, _last_step(recipe.run))
        feeds.append(_Feed(recipe.run, "prometheus", lambda: journal))

    def look() -> None:
        for feed in feeds:
            feed.look()

    if not feeds:
        yield
        return
    done = False
    try:
        with watching(look):
            yield
        done = True
    finally:
        look()
        for feed in feeds:
            feed.close(done)


class _Feed:
    """One follower: opened at the first line, since that may take its time."""

    def __init__(self, run: str, name: str, open_: Callable[[], Follower]) -> None:
        self._run, self._name, self._open = run, name, open_
        self._follower: Follower | None = None
        self._seen = 0
        self._complained = False

    def look(self) -> None:
        newest = _last_step(self._run)
        if newest == self._seen:
            return
        self._seen = newest
        with self._said_once():
            self._follower = self._follower or self._open()
            for line in lines_after(self._run, self._follower.last):
                self._follower.log(line)
                self._follower.last = line["step"]

    def close(self, done: bool) -> None:
        if self._follower:
            with self._said_once():
                self._follower.close(done)

    @contextmanager
    def _said_once(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a client, of its server, of the network: none of them stops a training
            if not self._complained:
                say(f"warning: {self._name}: {' '.join(str(error).split()) or type(error).__name__}: training goes on without it")
            self._complained = True


def _last_step(run: str) -> int:
    return int((last_line(run) or {}).get("step", 0))
