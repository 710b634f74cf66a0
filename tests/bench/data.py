"""The data side: tokenizing, memory, reading and feeding. All on the demo's drawn scenes and its tokenizer."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.data.listing import UNIT_ITEMS, survey, tasks_of, units_of, write_units
from lvm_ray.data.shards import Manifest, count_rows, open_shards, write_manifest, write_part
from lvm_ray.progress import Bar
from tests.bench.figure import Figure
from tests.faults.tokenizing import descendants

PLACE = Path("runs/bench")
IMAGES = 6000  # training pairs of the segmentation task; every other task has few
ROUNDS = 3
CORES = 2
ROWS_READ = 20_000
BATCH = 32  # rows that are read at once
WARM_UNITS = 4  # finished before the clock starts: workers are up and loaded by then


def recipe_of(folder: Path, pairs: int = IMAGES, workers: int = CORES) -> Recipe:
    """The demo's recipe in another folder, with another number of segmentation pairs and nothing held back."""
    settings = [
        f"synth={{train: {{segmentation: {pairs}, pose: 64, derain: 64}}}}",
        *(f"tasks.{task}.{split}=null" for task in ("segmentation", "pose", "derain") for split in ("validation", "test")),
        "tasks.pose.copies=2",
        "tasks.derain.copies=2",
        "tokenizer.steps=40",
        f"compute.workers={workers}",
        "compute.threads=1",
    ]
    return config.load("recipes/demo.yaml", settings, run=str(folder))


@lru_cache(maxsize=1)
def prepared() -> Recipe:
    """The tokenised data set that the figures share; made once. No Ray is left running, since it would share their CPUs."""
    from lvm_ray import pipeline, ray_session

    recipe = recipe_of(PLACE)
    pipeline.synth(recipe)
    pipeline.tokenize(recipe)
    ray_session.shutdown()
    return recipe


def bytes_per_token() -> Figure:
    """Bytes of the shards' files over the tokens in them."""
    shards = open_shards(prepared().shard_folder)
    size = sum((Path(shards.folder) / path).stat().st_size for path in shards.manifest.files)
    tokens = 2 * shards.manifest.image_tokens * sum(entry["rows"] for entry in shards.manifest.files.values())
    how = f"{size:,} bytes of Parquet hold {tokens:,} tokens of the demo's pairs, ids and originals included"
    return Figure(size / tokens, "bytes", "<= 2.1", how)


def read_vs_official() -> Figure:
    """Rows in a random order from our shards, and from the official text format as its loader reads it: tokens a second.

    Pairs of the paper's size, 512 tokens of 8,192 codes, in parts of as many rows as tokenizing writes.
    """
    tokens_RT = np.random.default_rng(0).integers(0, 8192, (ROWS_READ, 512)).astype(np.uint16)
    order = np.random.default_rng(1).permutation(ROWS_READ)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, tokens_RT)
        path = Path(folder) / "train.bin"
        write_official(path, tokens_RT)
        ours, theirs = [], []
        for _ in range(5):
            theirs.append(_seconds(lambda: _read_official(path, order)))
            ours.append(_seconds(lambda: _read_ours(folder, order)))
    rate, official = tokens_RT.size / statistics.median(ours), tokens_RT.size / statistics.median(theirs)
    how = f"{rate / 1e6:,.0f} M tokens/s of shards opened anew, {official / 1e6:.1f} M of JSON lines (mmap, seek, readline)"
    return Figure(rate / official, "x", ">= 20", how)


def write_shards(folder: str, tokens_RT: np.ndarray) -> None:
    files = {}
    for part, start in enumerate(range(0, len(tokens_RT), UNIT_ITEMS[1])):
        rows = tokens_RT[start : start + UNIT_ITEMS[1]]
        ids = [f"{start + i:08d}" for i in range(len(rows))]
        path, entry = write_part(folder, "train", "pairs", 0, part, ids, ids, np.ascontiguousarray(rows))
        files[path] = entry
    counts = count_rows(files)
    write_manifest(folder, Manifest(256, 16, 256, "bench", 8192, 0, "bench", counts, files, {"pairs": 0}, {"pairs": 2}))


def write_official(path: Path, tokens_RT: np.ndarray) -> None:
    offsets, place = [], 0
    with path.open("wb") as file:
        for row in tokens_RT:
            offsets.append((place, len(row)))
            place += file.write(json.dumps({"tokens": row.tolist()}).encode() + b"\n")
    np.save(f"{path}.meta.npy", np.array(offsets))


def _read_ours(folder: str, order: np.ndarray) -> int:
    tokens_RT = open_shards(folder).tokens("train", "pairs", 0)
    return sum(int(tokens_RT[rows].shape[1]) for rows in np.array_split(order, len(order) // BATCH))


def _read_official(path: Path, order: np.ndarray) -> int:
    """As the official loader does: map the file, seek to the row's offset, read the line, parse it."""
    offsets = np.load(f"{path}.meta.npy")
    total = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for row in order:
            mapped.seek(int(offsets[row, 0]))
            total += len(np.array(json.loads(mapped.readline())["tokens"]))
    return total


def stream_vs_train() -> Figure:
    """What Ray Data's stream hands to one worker, over what the demo's student trains on: tokens a second."""
    from lvm_ray import ray_session
    from lvm_ray.data.plan import make_plan
    from lvm_ray.data.stream import ray_dataset, worker_batches
    from lvm_ray.train import launch

    recipe = prepared()
    run = PLACE / "train"
    shutil.rmtree(run, ignore_errors=True)
    single = recipe.model_copy(
        update={
            "run": str(run),
            "shards": recipe.shard_folder,
            "teacher": None,
            "distill": None,
            "train": recipe.train.model_copy(update={"steps": 60, "log_every": 10}),
        }
    )
    launch.train(single, Bar("train", None, "steps"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [
        (later["tokens"] - earlier["tokens"]) / (later["seconds"] - earlier["seconds"]) for earlier, later in pairwise(lines[1:])
    ]
    trained = statistics.median(rates)

    ray_session.start(recipe)
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 8000})})
    plan = make_plan(open_shards(recipe.shard_folder).manifest, longer)
    fed = []
    for _ in range(ROUNDS):
        batches = worker_batches(ray_dataset(longer, plan).iterator(), recipe.train.micro_batch)
        next(batches)  # the readers are up
        began, tokens = time.perf_counter(), 0
        for batch in batches:
            tokens += batch["tokens"].size
        fed.append(tokens / (time.perf_counter() - began))
    stream = statistics.median(fed)
    how = f"{stream / 1e3:,.0f} k tokens/s fed, {trained / 1e3:.1f} k trained on by 2 workers of one thread without a teacher"
    return Figure(stream / trained, "x", ">= 20", how)


def tokenize_vs_loop() -> Figure:
    """Pictures a second of our tokenizing on Ray Data, over a bare loop of read, draw, encode in two plain processes."""
    from lvm_ray.data import tokenize
    from lvm_ray.data.tokenize_unit import Job
    from lvm_ray.tokenizer import load_tokenizer

    recipe = prepared()
    ours, bare = [], []
    for number in range(ROUNDS):
        bare.append(_bare_rate(recipe))
        work = recipe.model_copy(update={"shards": str(PLACE / f"again-{number}")})
        shutil.rmtree(work.shard_folder, ignore_errors=True)
        tokenizer = load_tokenizer(work.tokenizer_folder)
        found = survey(work, tokenizer.hash)
        write_units(work, found)
        units = [unit for unit in units_of(work, found.counts) if unit.task == "segmentation"]
        job = Job(work, load_tokenizer, found.settings)
        ours.append(_steady_rate(tokenize._run(job, units, tokenizer)))
        shutil.rmtree(work.shard_folder)
    rate, loop = statistics.median(ours), statistics.median(bare)
    how = f"{rate:,.0f} pictures/s with shards written, against {loop:,.0f} of two plain processes; {2 * IMAGES:,} of 64 x 64"
    return Figure(rate / loop, "x", ">= 0.9", how)


def _steady_rate(records: Iterator[tuple[str, dict[str, Any]]]) -> float:
    """Pictures a second between the first units and the last that all workers had company in."""
    times, pictures = [], []
    for _, record in records:
        times.append(time.perf_counter())
        pictures.append(2 * record["versions"])
    last = len(times) - CORES
    return sum(pictures[WARM_UNITS + 1 : last]) / (times[last - 1] - times[WARM_UNITS])


def _bare_rate(recipe: Recipe) -> float:
    """Pictures a second of two processes with half of the images each, once both are loaded."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(CORES)
    with context.Pool(CORES, initializer=_keep_barrier, initargs=(barrier,)) as pool:
        results = pool.map(_bare_loop, [(recipe, k) for k in range(CORES)], chunksize=1)
    return 2 * sum(count for count, _ in results) / max(seconds for _, seconds in results)


_barrier: Any = None


def _keep_barrier(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _bare_loop(work: tuple[Recipe, int]) -> tuple[int, float]:
    import torch

    from lvm_ray.seeds import stable_hash
    from lvm_ray.tokenizer import load_tokenizer

    recipe, part = work
    torch.set_num_threads(1)
    tokenizer, task = load_tokenizer(recipe.tokenizer_folder), tasks_of(recipe)["segmentation"]
    items = list(task.items("train"))[part::CORES]
    tokenizer.encode(np.zeros((32, recipe.size, recipe.size, 3), np.uint8))
    _barrier.wait()
    began, pictures = time.perf_counter(), []
    for item in items:
        seed = (recipe.seed, stable_hash("segmentation", "train", item.id))
        pictures += task.see(task.load(item, "train"), 0, seed, recipe.size).pictures
        if len(pictures) == 32:
            tokenizer.encode(np.stack(pictures))
            pictures = []
    if pictures:
        tokenizer.encode(np.stack(pictures))
    return len(items), time.perf_counter() - began


def memory_10x() -> Figure:
    """Most memory (PSS, shared pages counted once) of all processes of `lvm-ray tokenize`, for ten times the images over once."""
    peaks: dict[int, list[int]] = {600: [], 6000: []}
    for _ in range(ROUNDS):
        for images, found in peaks.items():
            run = PLACE / f"memory-{images}"
            recipe = recipe_of(run, images)
            (run / "recipe.yaml").parent.mkdir(parents=True, exist_ok=True)
            (run / "recipe.yaml").write_text(config.dump(recipe))
            for verb in ("synth", "tokenize"):
                shutil.rmtree(run / "data" / "shards", ignore_errors=True)
                peak = _peak_memory([sys.executable, "-m", "lvm_ray", verb, str(run / "recipe.yaml")])
            found.append(peak)
    small, large = (statistics.median(found) for found in peaks.values())
    how = f"{large / 2**20:,.0f} MiB for 6,000 pairs against {small / 2**20:,.0f} MiB for 600, all processes, at their highest"
    return Figure(large / small, "x", "<= 1.10", how)


def _peak_memory(command: list[str]) -> int:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            peak = max(peak, sum(_pss(pid) for pid in (process.pid, *descendants(process.pid))))

    thread = threading.Thread(target=watch)
    thread.start()
    code = process.wait()
    done.set()
    thread.join()
    assert code == 0, command
    return peak


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
