"""The tables of docs/scale.md as Markdown, each between marks of its name in the page.

<!-- scale NAME -->
...
<!-- end of scale NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from lvm_ray import estimate
from lvm_ray.data.listing import MOST_UNITS
from lvm_ray.data.stream import MOST_UNITS as MOST_READS
from tests.scale import simulate
from tests.scale.formulas import (
    BATCH,
    GPUS,
    HOUR,
    IMAGES,
    PICTURES,
    SENTENCES,
    STEPS,
    answers,
    answers_rate,
    checkpoint_seconds,
    cores,
    cores_needed,
    dollars,
    driver,
    encoder_operations,
    evaluation_hours,
    expected_seconds,
    files,
    interval_steps,
    most_images,
    mtbf,
    nodes,
    operations,
    pictures_a_gpu,
    readers_needed,
    restart_seconds,
    runs,
    shard_bytes,
    step,
    students_to_pay,
    teacher_hours,
    tokenizing,
    tokens,
    training,
    unit_items,
    units,
    whole,
    young,
    zero_step,
)
from tests.scale.inputs import INPUTS, ROOT, measured, measurements, value
from tests.scale.words import hours, money, number, percent, scaled, seconds

PAGE = ROOT / "docs" / "scale.md"
Rows = Sequence[Sequence[str]]


def table(head: Sequence[str], rows: Rows) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def by_gpus(what: str, of: Callable[[int], str], how: str | None = None) -> list[str]:
    """A row with a cell for each size of cluster, and the arithmetic behind it."""
    return [what, *([] if how is None else [how]), *(of(gpus) for gpus in GPUS)]


def summary() -> str:
    rows = []
    for changed, title in ((False, "the code as it is"), (True, "with the changes below")):
        plans = {gpus: whole(gpus, changed) for gpus in GPUS}
        rows.append([f"**{title}**", "", "", ""])
        for stage in ("tokenize", "teacher", "student", "evaluate"):
            rows.append(by_gpus(stage, lambda gpus, stage=stage, plans=plans: hours(getattr(plans[gpus], stage))))
        rows.append(
            by_gpus(
                "together, and at what cost",
                lambda gpus, plans=plans: f"**{hours(plans[gpus].total)}**, {money(dollars(plans[gpus].total, gpus))}",
            )
        )
        rows.append(
            by_gpus(
                "the same at spot prices", lambda gpus, plans=plans: money(dollars(plans[gpus].total, gpus) * value("spot_share"))
            )
        )
    return table(["", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def work() -> str:
    teacher, student = runs(8)
    rows = [
        ["sentences", "images / 4 pairs", number(SENTENCES)],
        ["tokens", "images x 2 pictures x 256", scaled(tokens(), "tokens")],
        ["shards", f"tokens x {value('bytes_per_token')} bytes", scaled(shard_bytes(), "B")],
        ["steps", f"sentences / {BATCH:,} a step, {scaled(BATCH * student.sentence_tokens, 'tokens')}", number(STEPS, 5)],
        ["encoder", "its convolutions and the nearest of 8,192 codes", f"{number(encoder_operations() / 1e9)} GFLOP a picture"],
        ["1B teacher", "6 x parameters + 6 x layers x width x length", f"{number(operations(teacher) / 1e9)} GFLOP a token"],
        ["80M student", "the same", f"{number(operations(student) / 1e9)} GFLOP a token"],
        [
            "80M student that asks the teacher",
            "and a third of the teacher's",
            f"{number(operations(student, teacher) / 1e9)} GFLOP a token",
        ],
    ]
    return table(["", "arithmetic", ""], rows)


def tokenize() -> str:
    now, remote, then = (
        {gpus: tokenizing(gpus, *kind) for gpus in GPUS} for kind in ((False, False), (False, True), (True, False))
    )
    rate = f"{number(pictures_a_gpu('bf16'))} a GPU and second"
    rows = [
        ["**now**", "", "", "", ""],
        by_gpus("list", lambda gpus: hours(now[gpus].listing), f"images x {measured('list_item') * 1e6:.0f} us, one driver"),
        by_gpus("read and draw", lambda gpus: hours(now[gpus].read), f"images x {measured('decode_core') * 1e3:.0f} ms / cores"),
        by_gpus(
            "encode",
            lambda gpus: hours(now[gpus].encode),
            f"2 x images x {measured('encode_core'):.2g} s / cores: on the CPU, in fp32",
        ),
        by_gpus("together", lambda gpus: f"**{hours(now[gpus].total)}**", "their sum: one thread does all three"),
        by_gpus(
            "list, photos in tars of an object store",
            lambda gpus: hours(remote[gpus].listing),
            f"4 x images x {measured('header_requests'):.2g} requests x {seconds(value('request'))}, one after another",
        ),
        by_gpus(
            "wait for that store",
            lambda gpus: hours(remote[gpus].wait),
            f"2 x images x {measured('read_requests'):.2g} requests x {seconds(value('request'))} / cores",
        ),
        ["**then**", "", "", "", ""],
        by_gpus("encode", lambda gpus: hours(then[gpus].encode), f"2 x images / {rate}, in bf16 at 30 % of its peak"),
        by_gpus("read and draw", lambda gpus: hours(then[gpus].read), "as now, beside the GPUs"),
        by_gpus(
            "bytes of the photos",
            lambda gpus: hours(then[gpus].storage),
            f"{scaled(IMAGES * value('image_bytes'), 'B')} / nodes / {scaled(value('node_storage'), 'B/s')}",
        ),
        by_gpus("together", lambda gpus: f"**{hours(then[gpus].total)}**", "the slowest of the three"),
        by_gpus(
            "photos read", lambda gpus: scaled(IMAGES * value("image_bytes") / (then[gpus].total * HOUR), "B/s"), "bytes / time"
        ),
        by_gpus(
            "requests, a photo each",
            lambda gpus: f"{number(IMAGES / (then[gpus].total * HOUR))} /s",
            f"a prefix answers {value('gets'):,.0f} /s",
        ),
    ]
    return table(["", "arithmetic", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


UNITS_AN_ACTOR = (2, 4, 10, 40, 160)
ACTORS = 512


def tail_times() -> list[tuple[int, float, float, float]]:
    """(units an actor, idle part with equal, exponential and heavy-tailed units) of a run of ACTORS actors, simulated."""
    found = []
    for each in UNITS_AN_ACTOR:
        rng, count = np.random.default_rng(each), each * ACTORS
        kinds = (lambda n, rng: np.ones(n), lambda n, rng: rng.exponential(1.0, n), simulate.unit_times)
        idle = []
        for kind in kinds:
            drawn = [kind(count, rng) for _ in range(5)]
            idle.append(fmean(1 - float(times.sum()) / ACTORS / simulate.drain(times, ACTORS) for times in drawn))
        found.append((each, *idle))
    return found


def tail() -> str:
    rows = [[str(each), *(percent(idle) for idle in shares)] for each, *shares in tail_times()]
    return table(["units for each of 512 actors", "equal units", "exponential", "heavy-tailed: 1 % take ten times as long"], rows)


def unit_size() -> str:
    rows = []
    for what, actors, unit in (
        ("now, a core an actor", cores, PICTURES * unit_items() * measured("encode_core")),
        ("then, a GPU an actor", float, PICTURES * unit_items() / pictures_a_gpu("bf16")),
    ):
        rows.append([what, seconds(unit), *(number(units() / actors(gpus)) for gpus in GPUS)])
    return table(["", "a unit takes", *(f"units an actor, {gpus} GPUs" for gpus in GPUS)], rows)


READERS = (1, 4, 16, 64, 256)


def request_rates() -> list[tuple[int, float, float]]:
    """(readers of each of 64 nodes, requests a second simulated, and by formula) of one prefix."""
    found = []
    for readers in READERS:
        rng, count = np.random.default_rng(readers), 64 * readers
        latency = value("request")
        drawn = lambda rng=rng, latency=latency: float(rng.lognormal(np.log(latency) - 0.5**2 / 2, 0.5))  # noqa: E731
        rate = simulate.request_rate(count, drawn, value("gets"), 60 * count if count > 1000 else 60_000)
        found.append((readers, rate, min(count / latency, value("gets"))))
    return found


def requests() -> str:
    rows = [[str(readers), f"{number(rate)} /s", f"{number(formula)} /s"] for readers, rate, formula in request_rates()]
    return table(["requests under way on each of 64 nodes", "simulated", "min(readers / latency, limit of a prefix)"], rows)


def drivers() -> str:
    found = driver()
    node = value("node_memory")
    rows = [
        [
            "plan",
            f"rows x {measured('plan_bytes'):.0f} bytes at its highest",
            scaled(found.plan_bytes, "B"),
            seconds(found.plan_seconds),
        ],
        ["rows packed for readers", f"rows x {measured('packed_bytes'):.0f} bytes", scaled(found.packed_bytes, "B"), ""],
        [
            "manifest",
            f"{number(files())} files x {measured('manifest_bytes'):.0f} bytes",
            scaled(found.manifest_bytes, "B"),
            seconds(found.manifest_seconds),
        ],
        ["ids while listing", "images x 16 bytes, sorted once more", scaled(IMAGES * 24, "B"), ""],
        [
            "**each process that reads rows**",
            f"images x {number(measured('reader_held'))} bytes",
            f"**{scaled(found.reader_bytes, 'B')}**",
            f"**{seconds(found.reader_seconds)}** for the order alone",
        ],
        ["of these the tokens", "images x 2 x 256 x 2 bytes", scaled(found.reader_tokens, "B"), ""],
        ["and the names", f"images x {57 + value('id_bytes'):.0f} bytes", scaled(found.reader_names, "B"), ""],
        ["images at which 8 readers fill a node", f"{scaled(node, 'B')} / 8 / bytes an image", number(most_images(8)), ""],
        ["images at which 88 readers do", "the cores that 8 workers leave free", number(most_images(88)), ""],
    ]
    return table(["", "arithmetic", "memory", "time"], rows)


def steps() -> str:
    rows = []
    for name, taught in (("1B teacher", False), ("80M student", True)):
        for changed in (False, True):

            def of(gpus: int, taught: bool = taught, changed: bool = changed) -> object:
                teacher, student = runs(gpus)
                return step(student, gpus, teacher, changed) if taught else step(teacher, gpus, changed=changed)

            rows.append([f"**{name}, {'then' if changed else 'now'}**", "", "", "", ""])
            parts = {
                "compute": "tokens x operations / (GPUs x 396 TFLOP/s)",
                "gradients": "left over beside the backward pass"
                if changed
                else "2 (N - 1) / N x 2 bytes x parameters / bandwidth",
                "weights": "half of that",
                "votes": "1.1 votes through NCCL" if changed else "1.5 votes x 2 (N - 1) hops of gloo's ring",
                "feed": "" if changed else f"micro batches / {number(measured('block_rate'))} blocks a second, beside the rest",
            }
            for part, how in parts.items():
                if not (changed and part == "feed"):
                    rows.append(by_gpus(part, lambda gpus, part=part, of=of: seconds(getattr(of(gpus), part)), how))
            rows.append(
                by_gpus("a step", lambda gpus, of=of: f"**{seconds(of(gpus).total)}**", "the slower of feed and all else")
            )
            rows.append(
                by_gpus(
                    "tokens a second",
                    lambda gpus, of=of: scaled(BATCH * 2048 / of(gpus).total, "tokens/s"),
                    f"{BATCH:,} x 2,048 / step",
                )
            )
    return table(["", "arithmetic", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


ZERO_COLUMNS = ((1, False), (1, True), (2, False), (2, True), (3, False), (3, True))
MICRO = {"80m": 16, "300m": 8, "1b": 4}


def zero() -> str:
    rows = []
    for size, micro in MICRO.items():
        for gpus in GPUS:
            ideal = (
                BATCH
                * 2048
                * estimate.operations_per_token(_model(size), 8192, 2048)
                / (gpus * value("gpu_bf16") * estimate.GPU_SHARE)
            )
            cells = [
                f"{seconds(found := zero_step(size, gpus, stage, overlaps, micro))}, {percent(ideal / found)}"
                for stage, overlaps in ZERO_COLUMNS
            ]
            rows.append([size, str(gpus), str(BATCH // (gpus * min(micro, BATCH // gpus))), *cells])
    head = [f"ZeRO {stage}{', overlapped' if overlaps else ''}" for stage, overlaps in ZERO_COLUMNS]
    return table(["model", "GPUs", "micro batches", *head], rows)


def _model(size: str) -> object:
    from tests.scale.formulas import model_of

    return model_of(size)


def network() -> str:
    rows = []
    for name in ("1B teacher", "80M student"):

        def sent(gpus: int, name: str = name) -> float:
            run = runs(gpus)[0 if name == "1B teacher" else 1]
            return 3 * (gpus - 1) / gpus * 2 * estimate.trained_parameters(run.model, run.tokenizer.codes)

        def seconds_of(gpus: int, name: str = name) -> float:
            teacher, student = runs(gpus)
            return step(teacher, gpus, changed=True).total if name == "1B teacher" else step(student, gpus, teacher, True).total

        rows.append(
            by_gpus(
                f"{name}: through each link, a step",
                lambda gpus, sent=sent: scaled(sent(gpus), "B"),
                "3 (N - 1) / N x 2 x parameters",
            )
        )
        rows.append(
            by_gpus(
                "on the average",
                lambda gpus, sent=sent, of=seconds_of: scaled(sent(gpus) / of(gpus), "B/s"),
                f"of {scaled(value('nvlink'), 'B/s')} within a node, {scaled(value('node_network') * value('network_share'), 'B/s')} between",
            )
        )
        rows.append(
            by_gpus(
                "rows read, whole cluster",
                lambda gpus, of=seconds_of: scaled(BATCH * 2048 * value("bytes_per_token") / of(gpus), "B/s"),
                "tokens a second x bytes a token",
            )
        )
    return table(["", "arithmetic", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def hours_of_training() -> str:
    rows = []
    for name, taught in (("1B teacher", False), ("80M student", True)):
        for changed in (False, True):

            def of(gpus: int, taught: bool = taught, changed: bool = changed) -> object:
                teacher, student = runs(gpus)
                return training(student, gpus, teacher, changed) if taught else training(teacher, gpus, changed=changed)

            rows.append([f"**{name}, {'then' if changed else 'now'}**", "", "", ""])
            for part in ("compute", "network", "votes", "feed", "saving", "failures", "start"):
                rows.append(
                    by_gpus(
                        part, lambda gpus, part=part, of=of: hours(getattr(of(gpus), part)) if getattr(of(gpus), part) else "–"
                    )
                )
            rows.append(by_gpus("together", lambda gpus, of=of: f"**{hours(of(gpus).total)}**"))
            rows.append(by_gpus("GPUs compute", lambda gpus, of=of: percent(of(gpus).compute / of(gpus).total)))
    return table(["", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def teacher_answers() -> str:
    rows = []
    for sparse in (False, True):
        found = answers(sparse)
        rows.append([f"**{'likely tokens (`sparse`)' if sparse else 'hidden states'}**", "", "", "", ""])
        rows.append(["size", "sentences x places x 2 x numbers", *[scaled(found.size, "B")] * 3])
        rows.append(["files", "of 32 MiB, as `caching.PART_BYTES` says", *[number(found.files)] * 3])
        rows.append(["a month in an object store", "", *[money(found.month)] * 3])
        rows.append(
            by_gpus(
                "read while the student trains",
                lambda gpus, sparse=sparse: scaled(answers_rate(gpus, sparse), "B/s"),
                "size / its time without a teacher",
            )
        )
        rows.append(
            by_gpus(
                "of what the nodes can read",
                lambda gpus, sparse=sparse: percent(answers_rate(gpus, sparse) / (nodes(gpus) * value("node_storage"))),
                f"/ nodes / {scaled(value('node_storage'), 'B/s')}",
            )
        )
        rows.append(
            ["students a month from which it pays", "(making + month) / asking", *[number(students_to_pay(sparse), 2)] * 3]
        )
    asked = teacher_hours()
    rows.append(["**asked in every step**", "", "", "", ""])
    rows.append(
        [
            "of each student",
            "a third of the teacher's operations",
            *[f"{number(asked)} GPU-hours, {money(asked * value('gpu_hour'))}"] * 3,
        ]
    )
    return table(["", "arithmetic", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def checkpoints() -> str:
    rows = []
    for name, which in (("1B teacher", 0), ("80M student", 1)):
        rows.append([f"**{name}**", "", "", "", ""])

        def run(gpus: int, which: int = which) -> object:
            return runs(gpus)[which]

        def one(gpus: int, changed: bool, which: int = which) -> object:
            teacher, student = runs(gpus)
            return step(student, gpus, teacher, changed) if which else step(teacher, gpus, changed=changed)

        rows.append(
            by_gpus("size", lambda gpus, run=run: scaled(estimate.checkpoint_bytes(run(gpus)), "B"), "12 bytes x parameters")
        )
        rows.append(
            by_gpus(
                "host memory of a node while it saves, now",
                lambda gpus, run=run: scaled(8 * estimate.checkpoint_bytes(run(gpus)), "B"),
                "8 processes hold all of it",
            )
        )
        rows.append(
            by_gpus(
                "all wait, now",
                lambda gpus, run=run: seconds(checkpoint_seconds(run(gpus), gpus)),
                "gather + copy + write + checksum",
            )
        )
        rows.append(
            by_gpus(
                "every 1,000 steps, now",
                lambda gpus, run=run, one=one: (
                    f"{seconds(1000 * one(gpus, False).total)}, "
                    f"{percent(checkpoint_seconds(run(gpus), gpus) / (1000 * one(gpus, False).total))} of it lost"
                ),
                "1,000 x step",
            )
        )
        rows.append(
            by_gpus(
                "Young's interval, now",
                lambda gpus, run=run: seconds(young(checkpoint_seconds(run(gpus), gpus), mtbf(gpus))),
                "sqrt(2 x waiting x time between failures)",
            )
        )
        rows.append(
            by_gpus(
                "read at a restart, now",
                lambda gpus, run=run: scaled(nodes(gpus) * estimate.checkpoint_bytes(run(gpus)), "B"),
                "nodes x size",
            )
        )
        rows.append(
            by_gpus(
                "all wait, then",
                lambda gpus, run=run: seconds(checkpoint_seconds(run(gpus), gpus, True)),
                "size / GPUs / 5 GB/s + 0.1 s; written meanwhile",
            )
        )
        rows.append(
            by_gpus(
                "steps between two, then",
                lambda gpus, run=run, one=one: number(interval_steps(run(gpus), gpus, one(gpus, True), True), 5),
                "Young's interval, at most half of the run",
            )
        )
    return table(["", "arithmetic", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


KINDS = ("on demand", "spot, calm", "spot, rough")


def failures() -> str:
    teacher, _ = runs(512)
    rows = [by_gpus(f"time between failures, {kind}", lambda gpus, kind=kind: seconds(mtbf(gpus, kind))) for kind in KINDS]
    rows.append(by_gpus("from a failure to the next step, now", lambda gpus: seconds(restart_seconds(teacher, gpus))))
    return table(["", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
WORK = 24 * HOUR  # seconds of a run long enough for the mean to be one
REPEATS = 200


def throughput(interval: float, save: float, restart: float, between: float, noticed: bool = False) -> tuple[float, float]:
    """(simulated, by Daly's formula) part of the time that is work."""
    rng = np.random.default_rng(0)
    times = [simulate.run_with_failures(WORK, interval, save, restart, between, rng, noticed) for _ in range(REPEATS)]
    return WORK / fmean(times), WORK / expected_seconds(WORK, interval, save, restart, between)


def intervals() -> str:
    """On 512 rough spot GPUs: what the interval between checkpoints leaves of the time."""
    rows = []
    teacher, _ = runs(512)
    between = mtbf(512, "spot, rough")
    for changed in (False, True):
        save, restart = checkpoint_seconds(teacher, 512, changed), restart_seconds(teacher, 512, changed)
        optimum = young(save, between)
        for factor in FACTORS:
            interval = factor * optimum
            simulated, formula = throughput(interval, save, restart, between)
            warned, _ = throughput(interval, save, restart, between, noticed=True)
            rows.append(
                [
                    "then" if changed else "now",
                    f"{seconds(save)} and {seconds(restart)}",
                    f"{factor:g} x Young's = {seconds(interval)}",
                    percent(simulated),
                    percent(formula),
                    percent(warned),
                ]
            )
    head = [
        "",
        "saving and restarting take",
        "interval",
        "of the time is work, simulated",
        "Daly's formula",
        "simulated, with a notice before",
    ]
    return table(head, rows)


SPREADS = (0.02, 0.05, 0.1)


def stragglers() -> str:
    rows = []
    for spread in SPREADS:
        rng = np.random.default_rng(1)
        rows.append([percent(spread), *(f"{percent(simulate.slowest(gpus, spread, 300, rng) - 1)}" for gpus in GPUS)])
    return table(["spread of a GPU's time for a step", *(f"longer steps, {gpus} GPUs" for gpus in GPUS)], rows)


def evaluate() -> str:
    rows = [
        by_gpus("GPU work", lambda gpus: hours(evaluation_hours(gpus))),
        ["the driver's training pairs", *[scaled(driver().reader_bytes, "B")] * 3],
    ]
    return table(["", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def counts() -> str:
    """Files, requests and Ray's objects."""
    hidden = answers(False)
    write = measured("write_requests") * value("request")
    blocks = SENTENCES / runs(512)[0].train.micro_batch
    rows = [
        ["units of tokenizing, and files of a copy", f"at most {MOST_UNITS:,} (`listing.MOST_UNITS`)", number(units(), 5)],
        ["a file's size", "shards / files", scaled(shard_bytes() / files(), "B")],
        [
            "written by the driver before it starts",
            f"units x {measured('write_requests'):.0f} requests x {seconds(value('request'))}",
            hours(units() * write / HOUR),
        ],
        [
            "asked whether they are there",
            f"files x {seconds(value('request'))}, at every tokenize",
            hours(files() * value("request") / HOUR),
        ],
        ["reads of a training", f"at most {MOST_READS:,} (`stream.MOST_UNITS`)", number(min(MOST_READS, SENTENCES / 128), 5)],
        [
            "Ray's driver hands them out in",
            f"reads x {seconds(value('unit_consumed'))}",
            hours(MOST_READS * value("unit_consumed") / HOUR),
        ],
        ["blocks of one micro batch", "sentences / micro batch of 2", number(blocks)],
        [
            "they pass one actor in",
            f"blocks / {number(measured('block_rate'))} a second",
            hours(blocks / measured("block_rate") / HOUR),
        ],
        ["parts of a cache of hidden states", "sentences / those in 32 MiB", number(hidden.files)],
        [
            "Ray's driver hands them out in",
            f"parts x {seconds(value('unit_consumed'))}",
            hours(hidden.files * value("unit_consumed") / HOUR),
        ],
    ]
    return table(["", "arithmetic", "at an object store"], rows)


def needs() -> str:
    rows = [
        ["cores that decode", "photos a GPU encodes / photos a core decodes", number(cores_needed(), 2)],
        ["photos under way from an object store", "photos a second x requests x latency", number(readers_needed(), 2)],
    ]
    return table(["for each GPU that encodes", "arithmetic", ""], rows)


def given() -> str:
    rows = [[one.what, f"{_given(one.value, one.unit)}", one.source] for one in INPUTS.values()]
    return table(["input", "value", "source"], rows)


def _given(amount: float, unit: str) -> str:
    if unit == "$":
        return f"${amount:g}"
    if unit in ("bytes", "bytes/s", "operations/s"):
        return scaled(amount, {"bytes": "B", "bytes/s": "B/s", "operations/s": "FLOP/s"}[unit])
    if unit == "s" and amount >= 120:
        return f"{number(amount / HOUR)} hours"
    return f"{number(amount)} {unit}".strip()


def found() -> str:
    rows = [
        [str(one["how"]), f"{_given(float(str(one['value'])), str(one['unit']))}", f"{one['machine']}, {one['date']}"]
        for one in measurements().values()
    ]
    return table(["measured", "value", "where and when"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "work": work,
    "tokenize": tokenize,
    "needs": needs,
    "unit_size": unit_size,
    "tail": tail,
    "requests": requests,
    "drivers": drivers,
    "counts": counts,
    "steps": steps,
    "zero": zero,
    "network": network,
    "stragglers": stragglers,
    "training": hours_of_training,
    "answers": teacher_answers,
    "checkpoints": checkpoints,
    "failures": failures,
    "intervals": intervals,
    "evaluate": evaluate,
    "given": given,
    "measured": found,
}


def filled(text: str) -> str:
    """The page with every table computed anew. Raises AssertionError where a table has no place."""
    for name, make in TABLES.items():
        pattern = _place(name)
        assert pattern.search(text), (
            f"{PAGE.name} has no place for {name}: write <!-- scale {name} --> and <!-- end of scale {name} -->"
        )
        block = f"<!-- scale {name} -->\n{make()}\n<!-- end of scale {name} -->"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def written(text: str, name: str) -> str:
    """A table as it stands in the page."""
    match = _place(name).search(text)
    assert match, f"{PAGE.name} has no place for {name}"
    return match[1].strip("\n")


def _place(name: str) -> re.Pattern[str]:
    return re.compile(f"<!-- scale {name} -->(.*?)<!-- end of scale {name} -->", re.S)


def write(page: Path = PAGE) -> None:
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
