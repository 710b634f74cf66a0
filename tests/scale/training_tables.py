"""The tables of docs/scale.md about teacher and student."""

from __future__ import annotations

from functools import lru_cache
from statistics import fmean

import numpy as np

from lvm_ray import estimate
from lvm_ray.config import Recipe
from tests.scale import simulate
from tests.scale.inputs import measured, value
from tests.scale.tables import COLUMNS, Row, by_gpus, same, table
from tests.scale.training import (
    Step,
    Training,
    answers,
    answers_rate,
    checkpoint_seconds,
    expected_seconds,
    interval_steps,
    moved_bytes,
    mtbf,
    restart_seconds,
    step,
    students_to_pay,
    teacher_hours,
    training,
    young,
    zero_step,
)
from tests.scale.words import hours, money, number, percent, scaled, seconds
from tests.scale.workload import BATCH, GPUS, HOUR, gpu_rate, model_of, nodes, runs

NAMES = {"teacher": "1B teacher", "student": "80M student"}


def run_of(name: str, gpus: int) -> tuple[Recipe, Recipe | None]:
    """A training, and the teacher that it asks in every step."""
    teacher, student = runs(gpus)
    return (teacher, None) if name == "teacher" else (student, teacher)


@lru_cache(maxsize=16)
def step_of(name: str, gpus: int, changed: bool) -> Step:
    run, teacher = run_of(name, gpus)
    return step(run, gpus, teacher, changed)


@lru_cache(maxsize=16)
def training_of(name: str, gpus: int, changed: bool) -> Training:
    run, teacher = run_of(name, gpus)
    return training(run, gpus, teacher, changed)


def steps() -> str:
    rows: list[Row] = []
    for name, title in NAMES.items():
        for changed in (False, True):
            rows.append([f"**{title}, {'then' if changed else 'now'}**"])
            arithmetic = {
                "compute": f"tokens x operations / GPUs / {number(gpu_rate() / 1e12)} TFLOP/s",
                "gradients": "what the backward pass leaves of that" if changed else "2 (N - 1) / N x 2 x parameters / bandwidth",
                "weights": "(N - 1) / N x 2 x parameters / bandwidth",
                "votes": "1.1 votes by NCCL" if changed else f"1.5 votes x 2 (N - 1) x {seconds(value('gloo_hop'))}",
                "feed": f"micro batches / {number(measured('block_rate'))} a second, beside all that",
            }
            for part, how in arithmetic.items():
                if not changed or part != "feed":
                    rows.append(
                        by_gpus(
                            part, lambda gpus, k=(name, changed, part): seconds(getattr(step_of(k[0], gpus, k[1]), k[2])), how
                        )
                    )
            rows.append(
                by_gpus(
                    "a step",
                    lambda gpus, k=(name, changed): f"**{seconds(step_of(k[0], gpus, k[1]).total)}**",
                    "the sum" if changed else "the sum, or the feed where that is slower",
                )
            )
            rows.append(
                by_gpus(
                    "tokens a second",
                    lambda gpus, k=(name, changed): number(BATCH * 2048 / step_of(k[0], gpus, k[1]).total),
                    f"{BATCH:,} x 2,048 / step",
                )
            )
        rows.append(
            by_gpus(
                "memory of a GPU",
                lambda gpus, name=name: _memory(name, gpus),
                f"`estimate.memory`, of {scaled(value('gpu_memory'), 'B')}",
            )
        )
    return table(["", "arithmetic", *COLUMNS], rows)


def _memory(name: str, gpus: int) -> str:
    run, teacher = run_of(name, gpus)
    return scaled(estimate.memory(run, [teacher.model] if teacher else []).total, "B")


ZERO_COLUMNS = ((1, False), (1, True), (2, False), (2, True), (3, False), (3, True))
MICRO = {"80m": 16, "300m": 8, "1b": 4}  # sentences, as in the recipes


def zero() -> str:
    rows = []
    for size, micro in MICRO.items():
        for gpus in GPUS:
            of_a_token = estimate.operations_per_token(model_of(size), 8192, 2048)
            ideal = BATCH * 2048 * of_a_token / (gpus * gpu_rate())
            times = [zero_step(size, gpus, stage, overlaps, micro) for stage, overlaps in ZERO_COLUMNS]
            passes = BATCH // (gpus * min(micro, BATCH // gpus))
            rows.append([size, str(gpus), str(passes), *(f"{seconds(time)}, {percent(ideal / time)}" for time in times)])
    head = [f"ZeRO {stage}{', overlapped' if overlaps else ''}" for stage, overlaps in ZERO_COLUMNS]
    return table(["model", "GPUs", "micro batches", *head], rows)


def network() -> str:
    rows: list[Row] = []
    for name, title in NAMES.items():

        def sent(gpus: int, name: str = name) -> float:
            return 3 * (gpus - 1) / gpus * moved_bytes(run_of(name, gpus)[0].model)

        def time(gpus: int, name: str = name) -> float:
            return step_of(name, gpus, True).total

        between = scaled(value("node_network") * value("network_share"), "B/s")
        rows += [
            [f"**{title}**"],
            by_gpus(
                "through each link, a step", lambda gpus, sent=sent: scaled(sent(gpus), "B"), "3 (N - 1) / N x 2 x parameters"
            ),
            by_gpus(
                "on the average",
                lambda gpus, sent=sent, time=time: scaled(sent(gpus) / time(gpus), "B/s"),
                f"/ step; of {scaled(value('nvlink'), 'B/s')} within a node, {between} between nodes",
            ),
            by_gpus(
                "rows read by all",
                lambda gpus, time=time: scaled(BATCH * 2048 * value("bytes_per_token") / time(gpus), "B/s"),
                "tokens a second x bytes a token",
            ),
        ]
    return table(["", "arithmetic", *COLUMNS], rows)


SPREADS = (0.02, 0.05, 0.1)


def stragglers() -> str:
    rows = []
    for spread in SPREADS:
        rng = np.random.default_rng(1)
        rows.append([percent(spread), *(percent(simulate.slowest(gpus, spread, 300, rng) - 1) for gpus in GPUS)])
    return table(["spread of a GPU's time for a step", *(f"longer steps, {column}" for column in COLUMNS)], rows)


def hours_of_training() -> str:
    rows: list[Row] = []
    for name, title in NAMES.items():
        for changed in (False, True):
            rows.append([f"**{title}, {'then' if changed else 'now'}**"])
            for part in ("compute", "network", "votes", "feed", "saving", "failures", "start"):
                if not changed or part != "feed":
                    rows.append(
                        by_gpus(part, lambda gpus, k=(name, changed, part): _hours(getattr(training_of(k[0], gpus, k[1]), k[2])))
                    )
            rows.append(by_gpus("together", lambda gpus, k=(name, changed): f"**{hours(training_of(k[0], gpus, k[1]).total)}**"))
            rows.append(by_gpus("GPUs compute", lambda gpus, k=(name, changed): _busy(training_of(k[0], gpus, k[1]))))
    return table(["", *COLUMNS], rows)


def _hours(amount: float) -> str:
    return hours(amount) if amount else "–"


def _busy(one: Training) -> str:
    return percent(one.compute / one.total)


def teacher_answers() -> str:
    asked = teacher_hours()
    rows: list[Row] = [
        ["**asked in every step**"],
        same(
            "of each student",
            f"{number(asked)} GPU-hours, {money(asked * value('gpu_hour'))}",
            "a third of the teacher's operations",
        ),
    ]
    for sparse in (False, True):
        found = answers(sparse)
        rows += [
            [f"**kept: {'likely tokens (`sparse`)' if sparse else 'hidden states'}**"],
            same("size", scaled(found.size, "B"), f"sentences x 2,047 places x {found.of_sentence / 2047:,.0f} bytes"),
            same("a month in an object store", money(found.month), f"x ${value('month')} a GB"),
            by_gpus(
                "read while a student trains",
                lambda gpus, sparse=sparse: scaled(answers_rate(gpus, sparse), "B/s"),
                "size / its time without a teacher",
            ),
            by_gpus(
                "of what the nodes can read",
                lambda gpus, sparse=sparse: percent(answers_rate(gpus, sparse) / (nodes(gpus) * value("node_storage"))),
                f"/ nodes / {scaled(value('node_storage'), 'B/s')}",
            ),
            same("students a month from which it pays", number(students_to_pay(sparse), 2), "(making + month) / asking"),
        ]
    return table(["", "arithmetic", *COLUMNS], rows)


def checkpoints() -> str:
    rows: list[Row] = []
    for name, title in NAMES.items():

        def run(gpus: int, name: str = name) -> Recipe:
            return run_of(name, gpus)[0]

        def size(gpus: int, run=run) -> float:
            return estimate.checkpoint_bytes(run(gpus))

        def now(gpus: int, run=run) -> float:
            return checkpoint_seconds(run(gpus), gpus)

        def thousand(gpus: int, name: str = name) -> float:
            return 1000 * step_of(name, gpus, True).total

        rows += [
            [f"**{title}**"],
            by_gpus("size", lambda gpus, size=size: scaled(size(gpus), "B"), "12 bytes x parameters"),
            by_gpus(
                "memory of a node while it saves, now",
                lambda gpus, size=size: scaled(8 * size(gpus), "B"),
                "8 processes hold all of it",
            ),
            by_gpus("all wait, now", lambda gpus, now=now: seconds(now(gpus)), "sum + copy + write + checksum"),
            by_gpus(
                "lost to it, at the recipe's 1,000 steps",
                lambda gpus, now=now, t=thousand: percent(now(gpus) / (now(gpus) + t(gpus))),
                "once nothing else is slow: waiting / (waiting + 1,000 steps)",
            ),
            by_gpus(
                "Young's interval, now",
                lambda gpus, now=now: seconds(young(now(gpus), mtbf(gpus))),
                "sqrt(2 x waiting x time between failures)",
            ),
            by_gpus("read at a restart, now", lambda gpus, size=size: scaled(nodes(gpus) * size(gpus), "B"), "nodes x size"),
            by_gpus(
                "all wait, then",
                lambda gpus, run=run: seconds(checkpoint_seconds(run(gpus), gpus, True)),
                f"size / GPUs / {scaled(value('host_copy'), 'B/s')} + 0.1 s; written meanwhile",
            ),
            by_gpus(
                "steps between two, then",
                lambda gpus, run=run, name=name: f"{interval_steps(run(gpus), gpus, step_of(name, gpus, True), True):,}",
                "Young's interval, at most half of the run",
            ),
        ]
    return table(["", "arithmetic", *COLUMNS], rows)


KINDS = ("on demand", "spot, calm", "spot, rough")


def failures() -> str:
    teacher, _ = runs(512)
    rows = [by_gpus(f"time between failures, {kind}", lambda gpus, kind=kind: seconds(mtbf(gpus, kind))) for kind in KINDS]
    rows.append(by_gpus("from a failure to the next step, now", lambda gpus: seconds(restart_seconds(teacher, gpus))))
    return table(["", *COLUMNS], rows)


FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
WORK = 24 * HOUR  # of a run: long enough for its mean to be the formula's
REPEATS = 100


@lru_cache(maxsize=64)
def throughput(interval: float, save: float, restart: float, between: float, noticed: bool = False) -> tuple[float, float]:
    """(simulated, by Daly's formula) part of the time that is work."""
    rng = np.random.default_rng(0)
    times = [simulate.run_with_failures(WORK, interval, save, restart, between, rng, noticed) for _ in range(REPEATS)]
    return WORK / fmean(times), WORK / expected_seconds(WORK, interval, save, restart, between)


def intervals() -> str:
    """On 512 spot GPUs on a bad day: what the interval between checkpoints leaves of the time."""
    rows = []
    teacher, _ = runs(512)
    between = mtbf(512, "spot, rough")
    for changed in (False, True):
        save, restart = checkpoint_seconds(teacher, 512, changed), restart_seconds(teacher, 512, changed)
        for factor in FACTORS:
            interval = factor * young(save, between)
            simulated, formula = throughput(interval, save, restart, between)
            warned, _ = throughput(interval, save, restart, between, noticed=True)
            cells = [percent(part) for part in (simulated, formula, warned)]
            rows.append(
                ["then" if changed else "now", f"{seconds(save)}, {seconds(restart)}", f"{factor:g} x", seconds(interval), *cells]
            )
    head = [
        "",
        "saving, restarting",
        "of Young's interval",
        "",
        "work, simulated",
        "Daly's formula",
        "work, with notice of each failure",
    ]
    return table(head, rows)
