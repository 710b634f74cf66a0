"""The tables of docs/scale.md about images, tokens and rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from statistics import fmean

import numpy as np

from lvm_ray.data.listing import MOST_UNITS
from lvm_ray.data.stream import MOST_UNITS as MOST_READS
from tests.scale import simulate
from tests.scale.data import (
    Tokenizing,
    cores_needed,
    driver,
    encoder_operations,
    files,
    most_images,
    pictures_a_gpu,
    readers_needed,
    shard_bytes,
    tokenizing,
    unit_seconds,
    units,
)
from tests.scale.inputs import measured, value
from tests.scale.tables import COLUMNS, by_gpus, table
from tests.scale.training import answers
from tests.scale.words import hours, money, number, percent, scaled, seconds
from tests.scale.workload import BATCH, GPUS, HOUR, IMAGES, PICTURES, SENTENCES, STEPS, cores, operations, runs, tokens

RANGE = 16e6  # bytes of a tar that are asked for at once, where it is read from front to end


def work() -> str:
    teacher, student = runs(8)
    rows = [
        ["sentences", "images / 4 pairs", number(SENTENCES)],
        ["tokens", "images x 2 pictures x 256", f"{number(tokens() / 1e9)} billion"],
        ["shards", f"tokens x {value('bytes_per_token')} bytes", scaled(shard_bytes(), "B")],
        ["steps", f"sentences / {BATCH:,}; {number(BATCH * student.sentence_tokens / 1e6)} million tokens each", f"{STEPS:,}"],
        ["encoder", "its convolutions and the nearest of 8,192 codes", f"{number(encoder_operations() / 1e9)} GFLOP a picture"],
        ["1B teacher", "6 x parameters + 6 x layers x width x length", f"{number(operations(teacher) / 1e9)} GFLOP a token"],
        ["80M student", "the same", f"{number(operations(student) / 1e9)} GFLOP a token"],
        [
            "and the teacher that it asks",
            "a third of the teacher's",
            f"{number(operations(student, teacher) / 1e9)} GFLOP a token",
        ],
    ]
    return table(["", "arithmetic", ""], rows)


def tokenize() -> str:
    def of(part: Callable[[Tokenizing], float], changed: bool, remote: bool = False) -> Callable[[int], str]:
        return lambda gpus: hours(part(tokenizing(gpus, changed, remote)))

    request, header, read = seconds(value("request")), number(measured("header_requests")), number(measured("read_requests"))
    bf16, fp32 = (f"2 x images / {number(pictures_a_gpu(kind))} a second and GPU, in {kind}" for kind in ("bf16", "fp32"))
    fp32_hours = partial(_encode_hours, "fp32")
    rows = [
        ["**now**"],
        by_gpus("list", of(lambda one: one.listing, False), f"images x {seconds(measured('list_item'))}, one driver"),
        by_gpus("read and draw", of(lambda one: one.read, False), f"images x {seconds(measured('decode_core'))} / cores"),
        by_gpus("encode", of(lambda one: one.encode, False), f"2 x images x {seconds(measured('encode_core'))} / cores"),
        by_gpus("the end", of(lambda one: one.tail, False), "some actors have a unit left, simulated"),
        by_gpus("together", lambda gpus: f"**{hours(tokenizing(gpus).total)}**", "the sum: one thread does it all"),
        ["**now, out of tars in an object store: beside that**"],
        by_gpus(
            "list",
            lambda gpus: hours(tokenizing(gpus, remote=True).listing - tokenizing(gpus).listing),
            f"2 passes x 2 files x images x {header} requests x {request}, one after another",
        ),
        by_gpus(
            "wait for photos", of(lambda one: one.wait, False, True), f"2 files x images x {read} requests x {request} / cores"
        ),
        ["**then**"],
        by_gpus("encode", of(lambda one: one.encode, True), bf16),
        by_gpus("or in fp32", lambda gpus: hours(fp32_hours(gpus)), fp32),
        by_gpus("read and draw", of(lambda one: one.read, True), "as now, beside the GPUs"),
        by_gpus(
            "carry the photos",
            of(lambda one: one.storage, True),
            f"{scaled(IMAGES * value('image_bytes'), 'B')} / nodes / {scaled(value('node_storage'), 'B/s')}",
        ),
        by_gpus("the end", of(lambda one: one.tail, True), "simulated"),
        by_gpus("together", lambda gpus: f"**{hours(tokenizing(gpus, True).total)}**", "the slowest of the three, and the end"),
        by_gpus("photos read", lambda gpus: scaled(_photo_rate(gpus) * value("image_bytes"), "B/s"), "bytes / time"),
        by_gpus(
            "requests of a photo each",
            lambda gpus: f"{number(_photo_rate(gpus))} /s",
            f"a prefix answers {value('gets'):,.0f} /s; {money(IMAGES / 1000 * value('thousand_gets'))} in all",
        ),
        by_gpus(
            f"or of {scaled(RANGE, 'B')} of a tar",
            lambda gpus: f"{number(_photo_rate(gpus) * value('image_bytes') / RANGE)} /s",
            "bytes a second / bytes of a request",
        ),
    ]
    return table(["", "arithmetic", *COLUMNS], rows)


def _encode_hours(kind: str, gpus: int) -> float:
    return IMAGES * PICTURES / (gpus * pictures_a_gpu(kind)) / HOUR


def _photo_rate(gpus: int) -> float:
    return IMAGES / (tokenizing(gpus, True).total * HOUR)


def needs() -> str:
    rows = [
        ["cores that decode", "photos a GPU encodes / photos a core decodes", number(cores_needed(), 2)],
        ["photos under way from an object store", "photos a second x 2 files x requests x latency", number(readers_needed(), 2)],
    ]
    return table(["for each GPU that encodes", "arithmetic", ""], rows)


def unit_size() -> str:
    rows = [
        ["now, a core an actor", seconds(unit_seconds(8, False)), *(number(units() / cores(gpus)) for gpus in GPUS)],
        ["then, a GPU an actor", seconds(unit_seconds(8, True)), *(number(units() / gpus) for gpus in GPUS)],
    ]
    return table([f"of {units():,} units", "one takes", *(f"each actor has, {column}" for column in COLUMNS)], rows)


UNITS_AN_ACTOR = (2, 4, 10, 40, 160)
ACTORS = 512


@lru_cache(maxsize=1)
def tail_times() -> list[tuple[int, float, float]]:
    """(units an actor, idle part with exponential and with heavy-tailed units) of ACTORS actors, simulated."""
    kinds = (lambda count, rng: rng.exponential(1.0, count), simulate.unit_times)
    found = []
    for each in UNITS_AN_ACTOR:
        rng, idle = np.random.default_rng(each), []
        for kind in kinds:
            drawn = [kind(each * ACTORS, rng) for _ in range(5)]
            idle.append(fmean(1 - float(times.sum()) / ACTORS / simulate.drain(times, ACTORS) for times in drawn))
        found.append((each, *idle))
    return found


def tail() -> str:
    rows = []
    for each, exponential, heavy in tail_times():
        last = sum(1 / k for k in range(1, ACTORS + 1))
        rows.append([str(each), percent(heavy), percent(exponential), percent(1 - each / (each - 1 + last))])
    head = [
        "units for each of 512 actors",
        "idle, 1 % of the units take ten times as long",
        "idle, exponential units",
        "by formula",
    ]
    return table(head, rows)


READERS = (1, 2, 4, 16, 64)
STORE_NODES = 64


@lru_cache(maxsize=1)
def request_rates() -> list[tuple[int, float, float]]:
    """(requests under way on each of STORE_NODES nodes, requests a second of one prefix: simulated, and by formula)."""
    latency, spread, found = value("request"), 0.5, []
    for readers in READERS:
        rng, count = np.random.default_rng(readers), STORE_NODES * readers
        drawn = partial(rng.lognormal, np.log(latency) - spread**2 / 2, spread)
        rate = simulate.request_rate(count, drawn, value("gets"), max(60_000, 30 * count))
        found.append((readers, rate, min(count / latency, value("gets"))))
    return found


def requests() -> str:
    rows = [[str(readers), f"{number(rate)} /s", f"{number(formula)} /s"] for readers, rate, formula in request_rates()]
    return table(["requests under way on each of 64 nodes", "simulated", "readers / latency, at most a prefix's limit"], rows)


def counts() -> str:
    """Files, requests and Ray's objects."""
    hidden, request, write = answers(False), value("request"), measured("write_requests")
    blocks = SENTENCES / runs(512)[0].train.micro_batch
    handed = f"x {seconds(value('unit_consumed'))}, one process"
    rows = [
        ["units of tokenizing, and files of a copy", f"at most {MOST_UNITS:,}: `listing.MOST_UNITS`", f"{units():,}"],
        ["a file's size", "shards / files", scaled(shard_bytes() / files(), "B")],
        [
            "their lists written by the driver first",
            f"{write:.0f} requests each x {seconds(request)}",
            hours(units() * write * request / HOUR),
        ],
        [
            "asked whether they are there, at every tokenize",
            f"a request each x {seconds(request)}",
            hours(files() * request / HOUR),
        ],
        ["reads of a training", f"at most {MOST_READS:,}: `stream.MOST_UNITS`", f"{MOST_READS:,}"],
        [
            "listed and handed out by Ray Data",
            f"x {seconds(value('unit_listed'))} and {handed}",
            seconds(MOST_READS * (value("unit_listed") + value("unit_consumed"))),
        ],
        ["blocks of one micro batch, 512 GPUs", "sentences / 2", f"{blocks:,.0f}"],
        [
            "handed out",
            f"/ {number(measured('block_rate'))} a second, one process",
            hours(blocks / measured("block_rate") / HOUR),
        ],
        ["parts of a cache of hidden states", "of 32 MiB: `caching.PART_BYTES`", f"{hidden.files:,.0f}"],
        ["handed out to be made", handed, hours(hidden.files * value("unit_consumed") / HOUR)],
        [
            "opened by each reader out of an object store",
            f"2 requests x {seconds(request)}",
            hours(hidden.files * 2 * request / HOUR),
        ],
    ]
    return table(["", "arithmetic", ""], rows)


def drivers() -> str:
    found, node = driver(), value("node_memory")
    workers = int(value("gpus_of_a_node"))
    free = int(value("cores_of_a_node")) - workers
    rows = [
        ["**once, in the driver**"],
        ["ids while it lists", "images x 16 bytes, 8 of them sorted", scaled(IMAGES * 24, "B")],
        [
            "manifest",
            f"{files():,} files x {measured('manifest_bytes'):.0f} bytes",
            scaled(found.manifest_bytes, "B"),
            seconds(found.manifest_seconds),
        ],
        [
            "plan",
            f"sentences x {measured('plan_bytes'):.0f} bytes at its highest",
            scaled(found.plan_bytes, "B"),
            seconds(found.plan_seconds),
        ],
        ["its rows, packed for readers", f"sentences x {measured('packed_bytes'):.0f} bytes", scaled(found.packed_bytes, "B")],
        ["**in each process that reads rows**"],
        [
            "all that it holds",
            f"images x {number(measured('reader_held'))} bytes, as measured",
            f"**{scaled(found.reader_bytes, 'B')}**",
            f"{seconds(found.reader_seconds)} for the order",
        ],
        ["of that tokens", "images x 2 x 256 x 2 bytes", scaled(found.reader_tokens, "B")],
        ["names", f"images x {57 + value('id_bytes'):.0f} bytes", scaled(found.reader_names, "B")],
        ["the order, at its highest", f"images x {number(measured('sentences_bytes'))} bytes", scaled(found.reader_order, "B")],
        [
            f"images at which {workers} readers fill a node",
            f"{scaled(node, 'B')} / {workers} / bytes an image",
            number(most_images(workers)),
        ],
        [f"images at which {free} do", f"of {free + workers} cores {free} are free for Ray Data", number(most_images(free))],
        ["**then, on each node**"],
        [
            "one flat file of tokens, mapped by all",
            "shards",
            scaled(shard_bytes(), "B"),
            f"{seconds(shard_bytes() / value('disk_read'))} to read",
        ],
        ["of the node's disks", f"/ {scaled(value('node_disk'), 'B')}", percent(shard_bytes() / value("node_disk"))],
    ]
    return table(["", "arithmetic", "memory or disk", "time"], rows)
