"""Distillation: the loss beside the naive way, and a distilled step beside its parts."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from functools import lru_cache
from typing import Any

from tests.bench.data import prepared
from tests.bench.figure import Figure
from tests.bench.steps import CODES, LENGTH, SENTENCES, STUDENT, TEACHER
from tests.bench.training import CORES, PRECISION, ROUNDS

# Of some seconds each, and so many that each step comes first equally often. Half of the pairs' ratios lie within 1 to 3 % of
# their median, as quiet as the machine is, so 60 of them leave it 0.3 to 0.7 % of standard error.
PARTS_ROUNDS, PAIRS_ROUNDS = 15, 60


def loss_memory_vs_naive() -> Figure:
    """Most memory of our cross-entropy and distillation beyond their inputs, over that of the naive way."""
    found = _losses()
    ours, naive = (max(one["bytes"] for one in found[way]) for way in ("ours", "naive"))
    how = f"{ours / 2**20:,.0f} MiB against {naive / 2**20:,.0f} MiB; {_shape()}"
    return Figure(ours / naive, "x", "<= 0.125", how)


def loss_time_vs_naive() -> Figure:
    """Seconds of the same, forward and backward."""
    found = _losses()
    pairs = zip(found["ours"], found["naive"], strict=True)
    ratio = statistics.median(statistics.median(ours["seconds"]) / statistics.median(naive["seconds"]) for ours, naive in pairs)
    seconds = {way: statistics.median(statistics.median(one["seconds"]) for one in rounds) for way, rounds in found.items()}
    how = f"{seconds['ours']:.2f} s against {seconds['naive']:.2f} s, forward and backward; {_shape()}"
    return Figure(ratio, "x", "<= 1.0", how)


def _shape() -> str:
    return (
        f"cross-entropy and forward KL at 32,768 x 8,192 from {PRECISION} states of width 768, {CORES} threads, {ROUNDS} rounds"
    )


@lru_cache(maxsize=1)
def _losses() -> dict[str, list[dict[str, Any]]]:
    """What `head.py` prints, round after round of both ways."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "naive": []}
    for _ in range(ROUNDS):
        for way, rounds in found.items():
            command = [sys.executable, "-m", "tests.bench.head", way, PRECISION, str(CORES)]
            rounds.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"  {way}: {rounds[-1]}", flush=True)
    return found


def distill_online_vs_parts() -> Figure:
    """Seconds of a distilled step over those of the student's step and the teacher's forward, measured apart."""
    rounds = _steps(PARTS_ROUNDS, "plain", "online", "teacher")
    ratio = statistics.median(one["online"] / (one["plain"] + one["teacher"]) for one in rounds)
    return Figure(ratio, "x", "<= 1.05", _how(rounds))


def distill_cached_vs_plain() -> Figure:
    """Seconds of a step that learns from kept answers over those of one that learns from none."""
    rounds = _steps(PAIRS_ROUNDS, "plain", "cached")
    ratios = [one["cached"] / one["plain"] for one in rounds]
    lower, _, upper = statistics.quantiles(ratios, n=4)
    scatter = f"half of the rounds within {lower:.3f} to {upper:.3f}"
    return Figure(statistics.median(ratios), "x", "<= 1.10", f"{_how(rounds)}, {scatter}")


def _how(rounds: list[dict[str, float]]) -> str:
    medians = (f"{name} {statistics.median(one[name] for one in rounds):.2f} s" for name in sorted(rounds[0]))
    return (
        f"{', '.join(medians)}; student {STUDENT}, teacher {TEACHER}, {SENTENCES} x {LENGTH} tokens of {CODES:,} codes, all "
        f"places, {PRECISION}, {CORES} threads, AdamW and ZeRO 1, medians of {len(rounds)} rounds, each begun by the next"
    )


def _steps(rounds: int, *names: str) -> list[dict[str, float]]:
    """What `steps.py` prints, in a process of its own."""
    prepared()
    command = [sys.executable, "-m", "tests.bench.steps", str(rounds), *names]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
