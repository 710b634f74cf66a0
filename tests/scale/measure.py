"""What is measured here for docs/scale.md, on small cases: seconds and bytes a row, a pair, a file, a block, a request.

    python -m tests.scale.measure [NAME ...]     into docs/results/scale.json, with machine and date

Each is what one process of ours costs that grows with the data: what a cluster cannot make faster by being larger.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tests.scale.inputs import MEASURED

PAIRS = 1_000_000
ROWS = 1_048_576
READ = 200_000
ROUNDS = 3

Found = tuple[float, str, str]  # value, unit, how


def encode_core() -> Found:
    """The published tokenizer's network, with weights of no meaning, on one core."""
    import torch
    from diffusers import VQModel

    from lvm_ray.tokenizer.vqmodel import VQTokenizer
    from tests.scale.data import PUBLISHED

    torch.set_num_threads(1)
    tokenizer = VQTokenizer(VQModel(**PUBLISHED), (0.0, 1.0))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
    seconds = _median(lambda: tokenizer.encode(pictures)) / len(pictures)
    return seconds, "s", "the published tokenizer encodes a picture of 256 x 256 on one core in fp32"


def decode_core() -> Found:
    """A photo of one million pixels from JPEG to a picture of 256 x 256."""
    from lvm_ray.sources.base import Sample
    from lvm_ray.sources.files import decode_image
    from lvm_ray.tasks.images import Images
    from tests.layouts import encoded

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (100, 100, 3)).astype(np.float32)
    photo = np.clip(coarse.repeat(10, 0).repeat(10, 1) + rng.normal(0, 8, (1000, 1000, 3)), 0, 255).astype(np.uint8)
    content, task = encoded(photo, "JPEG", quality=85), Images()
    seconds = _median(lambda: [task.see(Sample(decode_image(content, "photo"), None), 1, (0,), 256) for _ in range(10)]) / 10
    return (
        seconds,
        "s",
        f"a photo of 1,000 x 1,000 pixels ({len(content):,} bytes of JPEG) decoded and seen through a copy's view",
    )


def list_item() -> Found:
    """Both passes of the listing over tars on a local disk."""
    from lvm_ray.data.listing import survey, write_units
    from tests.layouts import make_tar, member

    count = 20_000
    with tempfile.TemporaryDirectory() as folder:
        make_tar(Path(folder) / "images.tar", [member(f"{number:09d}.jpg", b"x") for number in range(count)])
        recipe = _recipe(folder, {"images": {"train": {"format": "webdataset", "tars": f"{folder}/images.tar"}}})

        def both() -> None:
            write_units(recipe, survey(recipe, "no tokenizer"))

        seconds = _median(both) / count
    return seconds, "s", f"an item of a tar listed, in both passes ({count:,} items)"


def sentences_seconds() -> Found:
    names = _names(PAIRS)
    return _median(lambda: _sentences(names)) / PAIRS, "s", f"`sentences` of {PAIRS:,} pairs with names, a pair"


def sentences_bytes() -> Found:
    names = _names(PAIRS)
    return (
        _peak(lambda: _sentences(names)) / PAIRS,
        "bytes",
        f"`sentences` of {PAIRS:,} pairs at its highest, a pair, without the names",
    )


def plan_seconds() -> Found:
    work = _plan()
    return _median(work) / ROWS, "s", f"`make_plan` of {ROWS:,} rows, a row"


def plan_bytes() -> Found:
    return _peak(_plan()) / ROWS, "bytes", f"`make_plan` of {ROWS:,} rows at its highest, a row"


def packed_bytes() -> Found:
    from lvm_ray.data.stream import pack

    plan = _plan()()
    return len(pack(plan.rows(0, 1000))) / 1000, "bytes", "a row of the plan, packed for a reader"


def reader_held() -> Found:
    """What a process keeps that has read one sentence out of many pairs."""
    return _reader("RssAnon"), "bytes", f"a pair of 512 tokens, in a process that has read one sentence of {READ:,} pairs"


def reader_peak() -> Found:
    return _reader("VmHWM"), "bytes", "the same at its highest, with the pages of the files that it maps"


def manifest_bytes() -> Found:
    return len(json.dumps(_file_entries(1000), indent=1)) / 1000, "bytes", "a file's entry in manifest.json"


def manifest_seconds() -> Found:
    from lvm_ray.data.shards import Manifest, count_rows, read_manifest, write_manifest

    files = _file_entries(20_000)
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(folder, Manifest(256, 16, 256, "none", 8192, 0, "none", count_rows(files), files, {}, {"images": 2}))
        seconds = _median(lambda: read_manifest(folder).digest) / len(files)
    return seconds, "s", "a file of the manifest, read and in its digest"


def sha256_rate() -> Found:
    content = os.urandom(2**28)
    return len(content) / _median(lambda: hashlib.sha256(content).digest()), "bytes/s", "sha256 on one core"


def write_requests() -> Found:
    from lvm_ray.storage import join, write_file
    from tests.scale.store import running

    with running() as store:
        folder = join(store.uri, "run/shards")
        write_file(folder, "train/images/copy-000/part-00000.parquet", b"x" * 1000)
        store.requests.clear()
        write_file(folder, "train/images/copy-000/part-00001.parquet", b"x" * 1000)
        asked = _counted(store.requests)
    return sum(asked.values()), "requests", f"`storage.write_file` into a folder that is there: {_said(asked)}"


def read_requests() -> Found:
    from lvm_ray.storage import join, read_bytes
    from tests.scale.store import running

    with running() as store:
        place = join(store.uri, "images/0.tar")
        store.objects["images/0.tar"] = bytes(2**20)
        read_bytes(place, 512, 1000)
        store.requests.clear()
        read_bytes(place, 2048, 1000)
        asked = _counted(store.requests)
    return sum(asked.values()), "requests", f"`storage.read_bytes` of a part of a file: {_said(asked)}"


def header_requests() -> Found:
    """A tar's walk over an object store, a header."""
    from lvm_ray.sources.tar import list_members
    from lvm_ray.storage import join
    from tests.layouts import make_tar, member
    from tests.scale.store import running

    count = 50
    with running() as store, tempfile.TemporaryDirectory() as folder:
        tar = make_tar(Path(folder) / "0.tar", [member(f"{number}.jpg", bytes(20_000)) for number in range(count)])
        store.objects["images/0.tar"] = tar.read_bytes()
        assert len(list(list_members(join(store.uri, "images/0.tar")))) == count
        asked = _counted(store.requests)
    return sum(asked.values()) / count, "requests", f"`list_members` of a tar of {count} files, a file: {_said(asked)}"


def block_rate() -> Found:
    """Blocks of one micro batch over the time that the one process through which all of them pass computes for them."""
    from unittest import mock

    from lvm_ray import ray_session
    from lvm_ray.data import stream
    from lvm_ray.data.plan import make_plan
    from tests.toys import make_toy_shards, toy_recipe

    blocks, of_unit = 512, 128
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(stream, "UNIT_TOKENS", of_unit * 2 * 32):
        recipe = toy_recipe(folder, train={"steps": blocks // 4, "batch": 8, "micro_batch": 2})
        make_plan(make_toy_shards(recipe.shard_folder), recipe)
        ray_session.start(2)
        import ray

        @ray.remote(num_cpus=1)
        def read(shard: Any) -> int:
            return sum(1 for _ in stream.worker_batches(shard, recipe.train.micro_batch))

        rates, clocks = [], []
        for _ in range(ROUNDS):
            dataset = stream.training_dataset(recipe, lambda: 0)()
            shards = [worker["train"] for worker in stream.data_config().configure({"train": dataset}, 2, None, None)]
            before, began = _coordinators(), time.perf_counter()
            count = sum(ray.get([read.remote(shard) for shard in shards], timeout=600))
            clocks.append(count / (time.perf_counter() - began))
            after = _coordinators()
            rates.append(count / max(seconds - before.get(pid, 0.0) for pid, seconds in after.items()))
            del shards, dataset
        ray_session.shutdown()
    how = (
        f"blocks of one micro batch that the one actor of a stream's splitting hands out for each second of its own computing; "
        f"on two cores, with all that Ray does beside it, {statistics.median(clocks):.0f} a second came out"
    )
    return statistics.median(rates), "blocks/s", how


def _coordinators() -> dict[int, float]:
    """Seconds of computing so far of Ray's actors that split a stream, by process."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"SplitCoordinator" in (place / "cmdline").read_bytes():
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                found[int(place.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def gloo_hop() -> Found:
    """A vote of three numbers among 2, 4 and 8 processes of this machine, over the 2 (N - 1) hops of gloo's ring."""
    hops = {count: _vote_seconds(count) / (2 * (count - 1)) for count in (2, 4, 8)}
    said = ", ".join(f"{count}: {1e6 * seconds:.0f} us" for count, seconds in hops.items())
    return hops[8], "s", f"a hop of gloo's ring within this machine, by processes: {said}"


MEASUREMENTS: dict[str, Callable[[], Found]] = {
    work.__name__: work
    for work in (
        encode_core,
        decode_core,
        list_item,
        sentences_seconds,
        sentences_bytes,
        plan_seconds,
        plan_bytes,
        packed_bytes,
        reader_held,
        reader_peak,
        manifest_bytes,
        manifest_seconds,
        sha256_rate,
        write_requests,
        read_requests,
        header_requests,
        block_rate,
        gloo_hop,
    )
}


def main() -> None:
    from tests.bench.figure import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*MEASUREMENTS, []], help="names of measurements; default: all")
    for name in parser.parse_args().only or MEASUREMENTS:
        value, unit, how = MEASUREMENTS[name]()
        print(f"{name}: {value:.4g} {unit} ({how})", flush=True)
        known = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
        known[name] = {
            "value": float(f"{value:.3g}"),
            "unit": unit,
            "how": how,
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
        }
        MEASURED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def _median(work: Callable[[], Any]) -> float:
    """Median seconds of some rounds, after one that does not count."""
    work()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _peak(work: Callable[[], Any]) -> int:
    """Bytes that Python and numpy hold at the most while a function works."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def _recipe(folder: str, tasks: dict[str, Any]) -> Any:
    from lvm_ray.config import Recipe

    return Recipe.model_validate({"run": folder, "size": 256, "pairs": 4, "tasks": tasks, "tokenizer": {"patch": 16}})


def _names(pairs: int) -> list[str]:
    return [f"sa_000000/sa_{number:08d}" for number in range(pairs)]


def _sentences(names: list[str]) -> Any:
    from lvm_ray.data.sentences import sentences

    return sentences(len(names), 4, 0, "images", 0, 0, names)


def _plan() -> Callable[[], Any]:
    """What makes a plan of ROWS rows over one task of as many pairs as a run would show once."""
    from lvm_ray.data.plan import make_plan
    from lvm_ray.data.shards import Manifest
    from tests.toys import IMAGE_TOKENS, PATCH, SIZE, toy_recipe

    recipe = toy_recipe("runs/none", tasks={"invert": {}}, train={"steps": ROWS // 1024, "batch": 1024, "micro_batch": 4})
    rows = {"train": {"invert": {0: 4 * ROWS}}}
    manifest = Manifest(SIZE, PATCH, IMAGE_TOKENS, "none", 64, 0, "none", rows, {}, {}, {"invert": 2})
    return lambda: make_plan(manifest, recipe)


def _flat_shards(folder: str, pairs: int) -> None:
    """Pairs of 512 tokens in parts as long as those of a hundred million images."""
    from lvm_ray.data.shards import Manifest, count_rows, write_manifest, write_part
    from tests.scale.data import unit_items

    files, rng = {}, np.random.default_rng(0)
    for part, start in enumerate(range(0, pairs, unit_items())):
        names = _names(pairs)[start : start + unit_items()]
        tokens = rng.integers(0, 8192, (len(names), 512)).astype(np.uint16)
        path, entry = write_part(folder, "train", "pairs", 0, part, names, names, tokens)
        files[path] = entry
    write_manifest(folder, Manifest(256, 16, 256, "none", 8192, 0, "none", count_rows(files), files, {}, {"pairs": 2}))


def _reader(field: str) -> float:
    """Bytes a pair by which a process grows that reads one sentence out of READ pairs."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        _flat_shards(folder, READ)
        found = []
        for reads in (False, True):
            with context.Pool(1) as pool:
                found.append(pool.apply(_read_one, (folder, reads, field)))
    return (found[1] - found[0]) / READ


def _read_one(folder: str, reads: bool, field: str) -> int:
    """Bytes of this process that the kernel counts as `field`, after one sentence was read, or none."""
    from lvm_ray.data.plan import Rows
    from lvm_ray.data.shards import open_shards
    from lvm_ray.data.stream import SentenceReader

    reader = SentenceReader(open_shards(folder), ("pairs",), 4, 0)
    if reads:
        zero = np.zeros(1, np.int32)
        reader.read(Rows(np.zeros(1, np.int64), zero, zero, zero, zero))
    lines = Path("/proc/self/status").read_text().splitlines()
    (size,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(size) * 1024


def _file_entries(count: int) -> dict[str, dict[str, Any]]:
    """Entries of a manifest."""
    from lvm_ray.data.shards import part_path

    digest = hashlib.sha256(b"").hexdigest()
    return {part_path("train", "images", 0, number): {"rows": 5000, "sha256": digest} for number in range(count)}


def _counted(requests: list[tuple[str, str]]) -> dict[str, int]:
    methods = [method for method, _ in requests]
    return {method: methods.count(method) for method in sorted(set(methods))}


def _said(asked: dict[str, int]) -> str:
    return ", ".join(f"{count} {method}" for method, count in asked.items())


def _vote_seconds(processes: int, votes: int = 300) -> float:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        started = [
            context.Process(target=_vote, args=(rank, processes, f"{folder}/store", votes, queue)) for rank in range(processes)
        ]
        for process in started:
            process.start()
        seconds = queue.get()
        for process in started:
            process.join()
    return float(seconds)


def _vote(rank: int, processes: int, store: str, votes: int, queue: Any) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    ballot = torch.zeros(3, dtype=torch.int32)
    for count in (20, votes):
        torch.distributed.barrier()
        began = time.perf_counter()
        for _ in range(count):
            torch.distributed.all_reduce(ballot, op=torch.distributed.ReduceOp.MAX)
        seconds = (time.perf_counter() - began) / count
    if rank == 0:
        queue.put(seconds)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
