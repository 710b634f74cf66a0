"""What a formula cannot give, or only under assumptions: small simulations, event by event. All are functions of their arguments
and of a generator of random numbers.

Where a formula exists too, `tests/test_scale.py` holds the two against each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

import numpy as np
from numpy.random import Generator

Draw = Callable[[], float]


def run_with_failures(
    work: float, interval: float, save: float, restart: float, mtbf: float, rng: Generator, noticed: bool = False
) -> float:
    """Seconds that a training of `work` seconds takes, with a checkpoint of `save` seconds after each `interval` of work.

    Failures come at random, on the average every `mtbf` seconds, also while it saves and restarts; each takes it back to its last
    checkpoint. `noticed`: they announce themselves early enough to save first, so no work is lost.
    """
    done = clock = 0.0
    while done < work:
        part = min(interval, work - done)
        failure = rng.exponential(mtbf)
        if failure >= part + save:
            clock += part + save
            done += part
            continue
        clock += failure
        if noticed:
            clock += save
            done += min(failure, part)
        while (again := rng.exponential(mtbf)) < restart:
            clock += again
        clock += restart
    return clock


def drain(unit_seconds: Iterable[float], actors: int) -> float:
    """Seconds until the last of some units is done, where each actor takes the next unit as soon as it is free."""
    free = [0.0] * actors
    for seconds in unit_seconds:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def unit_times(units: int, rng: Generator, spread: float = 0.3, slow: float = 0.01, factor: float = 10.0) -> np.ndarray:
    """Seconds of units with a mean of one and a heavy tail: lognormal, and a part of them `factor` times slower (a throttled
    disk, a sick node)."""
    seconds = rng.lognormal(0.0, spread, units) * np.where(rng.random(units) < slow, factor, 1.0)
    return np.asarray(seconds / (np.exp(spread**2 / 2) * (1 + slow * (factor - 1))))


def request_rate(readers: int, latency: Draw, limit: float, count: int) -> float:
    """Requests a second that some readers get out of an object store, each one at a time, where the store starts at most `limit`
    a second and answers a request after `latency()` seconds."""
    waiting = [0.0] * readers
    start = end = 0.0
    for _ in range(count):
        start = max(heapq.heappop(waiting), start)
        end = max(end, finish := start + latency())
        heapq.heappush(waiting, finish)
        start += 1 / limit  # before which the store starts no other
    return count / end


def slowest(gpus: int, spread: float, steps: int, rng: Generator) -> float:
    """The mean over steps of the slowest GPU's time, where each one's is lognormal with a median of 1."""
    return float(np.mean([rng.lognormal(0.0, spread, gpus).max() for _ in range(steps)]))


def micro_batch(layers: int, forward: float, backward: float, gather: float, reduce: float, overlapped: bool) -> float:
    """Seconds of one micro batch on a GPU whose wire works beside it.

    Each of the layers takes so many seconds forward and backward. With ZeRO 3 its weights are gathered before either, one layer
    ahead (`gather`; 0: they are there). After its backward pass its gradients are sent (`reduce`). Where that is not
    `overlapped`, GPU and wire wait for each other.
    """
    clock = wire = 0.0  # when the GPU and the wire are free
    for seconds, sends in ((forward, 0.0), (backward, reduce)):
        wire = arrived = max(wire, clock) + gather if gather else clock
        for layer in range(layers):
            begun = max(clock, arrived)
            more = gather and layer + 1 < layers
            if more and overlapped:
                wire = arrived = max(wire, begun) + gather
            clock = begun + seconds
            if sends:
                wire = max(wire, clock) + sends
                clock = clock if overlapped else wire
            if more and not overlapped:
                wire = arrived = clock + gather
    return max(clock, wire)
