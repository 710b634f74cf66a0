"""From shards to token files: `lvm-ray export SHARDS --format delvm|lvm --out DIR`. Training rows only.

    delvm   DIR/vision/TASK/train.bin, train.bin.meta    its loader takes a folder a data set, below one called vision
    lvm     DIR/TASK.jsonl

A row becomes a line; rows of imported files become the lines that they were. Files are streamed, and moved to their names
when they are whole.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from lvm_ray.data.shards import Shards, open_shards
from lvm_ray.errors import UserError
from lvm_ray.interchange.lines import LINES, Codes, Format, write_meta
from lvm_ray.progress import Bar
from lvm_ray.storage import file_size, join, new_file

LOADER_PACK = 32_768  # tokens: DeLVM's loader cuts a file into so many at once, and drops the rest


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: str
    lines: int
    tokens: int


def export_tokens(folder: str, form: Format, out: str, bar: Bar, copies: bool = False) -> list[Exported]:
    """Write the training rows of every task as one token file each, or pair of files. `bar` counts tokens.

    `copies`: also the augmented copies, after the originals. Raises UserError where the folder is no data set.
    """
    if file_size(join(folder, "manifest.json")) is None and file_size(join(folder, "config.yaml")) is not None:
        raise UserError(f"{folder}: a run or a pipeline: name its folder of token shards, or export its model with --format hf")
    shards = open_shards(folder)
    tasks = shards.manifest.rows.get("train", {})
    if not tasks:
        raise UserError(f"{folder}: holds no training rows to export")
    chosen = {task: sorted(rows) if copies else [0] for task, rows in tasks.items()}
    bar.total = sum(tasks[task][copy] * _width(shards, task) for task, numbers in chosen.items() for copy in numbers)
    written: list[Exported] = []
    for task, numbers in chosen.items():
        done = sum(file.tokens for file in written)
        written.append(_export_task(shards, task, numbers, form, out, bar, done))
    return written


def _export_task(shards: Shards, task: str, copies: list[int], form: Format, out: str, bar: Bar, done: int) -> Exported:
    path = f"vision/{task}/train.bin" if form == "delvm" else f"{task}.jsonl"
    places = array("q")  # byte offset and tokens of every line
    offset = tokens = lines = 0
    with new_file(out, path) as stream:
        for codes in _lines(shards, task, copies):
            content = LINES[form](codes)
            stream.write(content)
            if form == "delvm":
                places.extend((offset, len(codes)))
            offset += len(content)
            tokens += len(codes)
            lines += 1
            if lines % 1000 == 0:
                bar.set(done + tokens)
        if form == "delvm":
            with new_file(out, f"{path}.meta") as meta:
                write_meta(meta, np.frombuffer(places, np.int64).reshape(-1, 2))
    bar.set(done + tokens)
    return Exported(join(out, path), lines, tokens)


def _lines(shards: Shards, task: str, copies: list[int]) -> Iterator[Codes]:
    """The tokens of each line: a row, or the rows of one imported line."""
    imported = task in shards.manifest.imported.get("train", {})
    for copy in copies:
        rows = _rows(shards, task, copy)
        if imported:
            for _, members in groupby(rows, key=lambda row: row[0]):
                yield np.concatenate([tokens for _, tokens in members])
        else:
            for _, tokens in rows:
                yield tokens


def _rows(shards: Shards, task: str, copy: int) -> Iterator[tuple[str, Codes]]:
    for _, originals, tokens in shards.parts("train", task, copy):
        yield from zip(originals, tokens, strict=True)


def _width(shards: Shards, task: str) -> int:
    return shards.manifest.images_per_row[task] * shards.manifest.image_tokens
