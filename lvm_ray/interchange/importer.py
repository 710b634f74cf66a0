"""From token files to shards: `lvm-ray import FILE... --tokenizer FOLDER --task NAME --out SHARDS`.

The lines of the files become rows of the task. A row's `original` is its line, and its id adds the place in the line, so
that no sentence shows two rows of one line as if they were strangers, and export puts the lines together again:

    {split}-{file:04d}-{line:08d}              original: line of the file, from 1
    {split}-{file:04d}-{line:08d}-{row:03d}    id

Parts are written on the way; the manifest, written last, adds them to what the folder held. The tokenizer is copied to
SHARDS/tokenizer, where training finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.fs

from lvm_ray.data.shards import (
    PAIR,
    Manifest,
    Tokens,
    count_rows,
    open_shards,
    read_manifest,
    write_manifest,
    write_part,
)
from lvm_ray.errors import BadItem, UserError
from lvm_ray.interchange.lines import Line, parse_line, read_lines, read_meta
from lvm_ray.interchange.sheet import contact_sheet
from lvm_ray.progress import Bar
from lvm_ray.storage import changing, file_size, is_folder, join, open_folder, read_bytes, read_file, split_name, write_file
from lvm_ray.tasks import TASKS, PairTask, Split
from lvm_ray.tokenizer import Tokenizer, load_tokenizer

PART_ROWS = 8192  # about, of a part
ENOUGH_BAD = 10_000  # bad lines after which the rest of a bad file is not read
SETTINGS = "imported"  # in a manifest's place for the fingerprint of what was tokenised
BAD_ITEMS = "bad_items.jsonl"
SHEET = "verify.png"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Imported:
    """What an import left: the manifest, remarks for the user, and the path of the contact sheet where one was asked for."""

    manifest: Manifest
    remarks: list[str]
    sheet: str | None


@dataclass(frozen=True)
class Job:
    """One import: files to rows of one split of a task.

    codes, image_tokens  of the tokenizer's vocabulary, and of a picture
    max_bad              part of the lines that may be unusable
    """

    paths: tuple[str, ...]
    split: Split
    task: str
    out: str
    codes: int
    image_tokens: int
    max_bad: float


@dataclass
class Found:
    """What reading the files has given so far."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    lines: int = 0


class OddLine(Exception):
    """A line that is no whole number of pairs, where nothing says that the rows must be pairs."""


def import_tokens(
    paths: Sequence[str],
    tokenizer_folder: str,
    task: str,
    out: str,
    bar: Bar,
    *,
    size: int = 256,
    split: Split = "train",
    pictures: int | None = None,
    max_bad: float = 0.02,
    verify: bool = False,
    load: Callable[[str], Tokenizer] = load_tokenizer,
) -> Imported:
    """Import token files as a split of a task into the data set `out`, which is made or extended. `bar` counts lines.

    size      side of the pictures in pixels
    pictures  of each row; default: what the task's rows hold already, else 2 for a task of pairs, 1 for one of single
              pictures, else 2 where every line is a whole number of pairs and 1 where one is not
    verify    decode some rows into SHARDS/verify.png

    Lines that cannot be used are set aside in SHARDS/bad_items.jsonl. The same command again does nothing. Raises UserError
    where a file is no token file, where more than `max_bad` of the lines are set aside, and where the data set is of another
    tokenizer or size, or holds that split of the task already.
    """
    tokenizer = load(tokenizer_folder)
    if size % tokenizer.patch:
        raise UserError(f"--size {size}: not a multiple of {tokenizer.patch}, the side of a token of {tokenizer_folder}")
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad {max_bad:g}: a part of the lines, so from 0 to 1")
    if task not in TASKS:
        raise UserError(f"--task {task}: no task is called so: there are {', '.join(TASKS)}")
    for path in paths:
        refuse_other_files(path)
    job = Job(tuple(paths), split, task, out, tokenizer.codes, (size // tokenizer.patch) ** 2, max_bad)
    before = _existing(out, tokenizer, size)
    sources = [_source(path) for path in paths]
    if before is not None and before.imported.get(split, {}).get(task) == sources:
        bar.set(0, note="as before")
        return Imported(before, [], _verify(out, split, task, tokenizer) if verify else None)
    if before is not None and task in before.rows.get(split, {}):
        raise UserError(
            f"{out}: holds {split} rows of task {task} already: import all files of a task in one command, into another --out"
        )
    per_row, found = _read_files(job, bar, _row_lengths(task, pictures, before))
    _copy_tokenizer(tokenizer_folder, out, tokenizer.hash, load)
    manifest = _extended(before or _empty(tokenizer, size, job.image_tokens), job, per_row, found, sources)
    write_manifest(out, manifest)
    return Imported(manifest, found.remarks, _verify(out, split, task, tokenizer) if verify else None)


def refuse_other_files(path: str) -> None:
    """Raises UserError where a path is no file of lines, saying what it is instead."""
    if file_size(path) is None:
        if not is_folder(path):
            raise UserError(f"{path}: no such file")
        if file_size(join(path, "config.json")) is not None:
            raise UserError(f"{path}: a folder of a model or a tokenizer: name files of tokens, or one model's folder here alone")
        raise UserError(f"{path}: a folder: name the .bin or .jsonl files of tokens in it")
    head = read_bytes(path, size=6)
    kinds = {
        b"PK": "a zip or PyTorch file",
        b"\x80": "a pickle",
        b"\x93NUMPY": "a .meta or other npy file",
        b"\x1f\x8b": "compressed",
    }
    for magic, kind in kinds.items():
        if head.startswith(magic):
            raise UserError(f'{path}: {kind}: name a .bin or .jsonl file of lines {{"tokens": ...}}')


def _existing(out: str, tokenizer: Tokenizer, size: int) -> Manifest | None:
    """The manifest of the data set that is to be extended, None where there is none yet."""
    if file_size(join(out, "manifest.json")) is None:
        return None
    manifest = read_manifest(out)
    if manifest.tokenizer != tokenizer.hash:
        raise UserError(
            f"{out}: holds tokens of codebook {manifest.tokenizer}, --tokenizer is of {tokenizer.hash}: import into another --out"
        )
    if (manifest.size, manifest.patch) != (size, tokenizer.patch):
        raise UserError(f"{out}: holds tokens of pictures of size {manifest.size}, not {size}: import into another --out")
    return manifest


def _row_lengths(task: str, pictures: int | None, before: Manifest | None) -> tuple[int, ...]:
    """The pictures that a row may hold, the preferred number first. A later one is taken where a line does not divide."""
    known = before.images_per_row.get(task) if before else None
    if pictures is not None and known is not None and pictures != known:
        raise UserError(f"--pictures {pictures}: the rows of task {task} here hold {known} pictures")
    if pictures or known:
        return (pictures or known or PAIR,)
    if issubclass(TASKS[task], PairTask):
        return (PAIR,)
    return (1,) if TASKS[task].pictures == 1 else (PAIR, 1)


def _read_files(job: Job, bar: Bar, lengths: Sequence[int]) -> tuple[int, Found]:
    """Write the files' rows as parts, of the first row length that all lines allow: that length, and what was found."""
    for number, length in enumerate(lengths):
        found = Found()
        try:
            _write_rows(job, bar, length, found, exact=number + 1 < len(lengths))
            return length, found
        except OddLine:
            _remove(job.out, found.files)
        except BaseException:
            _remove(job.out, found.files)
            raise
    raise AssertionError("the last row length takes every line or sets it aside")


def _write_rows(job: Job, bar: Bar, length: int, found: Found, exact: bool) -> None:
    """Read all lines and write their rows. Raises OddLine at a line that `length` does not divide, where `exact`."""
    width = length * job.image_tokens
    ids: list[str] = []
    rows: list[Tokens] = []
    for original, tokens in _usable_lines(job, bar, found):
        if len(tokens) % width:
            if exact:
                raise OddLine
            pictures = len(tokens) // job.image_tokens
            _set_aside(job, found, original, f"{pictures} pictures are no whole number of rows of {length} pictures")
            continue
        rows.append(tokens.reshape(-1, width))
        ids += [f"{original}-{row:03d}" for row in range(len(rows[-1]))]
        if len(ids) >= PART_ROWS:
            _write_part(job, found, ids, rows)
            ids, rows = [], []
    if ids:
        _write_part(job, found, ids, rows)
    _judge(job, found, last=True)
    _keep_bad_items(job, found)


def _usable_lines(job: Job, bar: Bar, found: Found) -> Iterator[tuple[str, Tokens]]:
    """Each usable line of each file as its name (the rows' original) and its tokens; others are set aside."""
    sizes = [file_size(path) or 0 for path in job.paths]
    for number, path in enumerate(job.paths):
        meta = read_meta(path)
        wrong = rows = 0
        for line in read_lines(path):
            found.lines += 1
            original = f"{job.split}-{number:04d}-{line.number:08d}"
            tokens = _parse(job, found, line, original)
            if meta is not None:
                wrong += not _agrees(next(meta, None), line, tokens)
                rows += 1
            if found.lines % 1000 == 0:
                _judge(job, found, last=False)
                read = sum(sizes[:number]) + line.offset
                bar.total = max(found.lines, round(found.lines * sum(sizes) / max(read, 1)))
                bar.set(found.lines, note=_note(found))
            if tokens is not None:
                yield original, tokens
        if meta is not None:
            surplus = sum(1 for _ in meta)
            if wrong or surplus:
                found.remarks.append(
                    f"{path}.meta: {wrong + surplus} of {rows + surplus} entries are not those of the file's lines "
                    "(the official video script writes such): the lines were read in the file's order"
                )
    bar.total = found.lines
    bar.set(found.lines, note=_note(found))


def _parse(job: Job, found: Found, line: Line, original: str) -> Tokens | None:
    try:
        return parse_line(line, job.codes, job.image_tokens)
    except BadItem as error:
        _set_aside(job, found, original, str(error))
        return None


def _agrees(entry: tuple[int, int] | None, line: Line, tokens: Tokens | None) -> bool:
    """Whether a `.meta` names a line rightly; of a line that cannot be read, its beginning."""
    return entry is not None and entry[0] == line.offset and (tokens is None or entry[1] == len(tokens))


def _set_aside(job: Job, found: Found, original: str, reason: str) -> None:
    _, file, line = original.split("-")
    name = split_name(job.paths[int(file)])[1]
    place = {"split": job.split, "task": job.task, "item": original, "paths": [name]}
    found.bad.append({**place, "reason": f"{name}, line {int(line)}: {reason}"})


def _judge(job: Job, found: Found, last: bool) -> None:
    """Raises UserError where too many lines were set aside; before the last line, where that is beyond doubt."""
    bad = len(found.bad)
    if last and not found.files:
        _keep_bad_items(job, found)
        example = f", for example {found.bad[0]['reason']}" if bad else ""
        raise UserError(f"{job.paths[0]}: holds no usable line{example}: name files of tokens of this tokenizer and --size")
    if bad > job.max_bad * found.lines and (last or bad >= ENOUGH_BAD):
        _keep_bad_items(job, found)
        raise UserError(
            f"{job.paths[0]}: {bad} of {found.lines} lines cannot be used, for example {found.bad[0]['reason']}: mend or remove "
            f"them (all of them are in {join(job.out, BAD_ITEMS)}), or raise --max-bad, now {job.max_bad:g}"
        )


def _note(found: Found) -> str:
    return f"{len(found.bad)} set aside" if found.bad else ""


def _write_part(job: Job, found: Found, ids: list[str], rows: list[Tokens]) -> None:
    originals = [name.rpartition("-")[0] for name in ids]
    part = np.ascontiguousarray(np.concatenate(rows))
    path, entry = write_part(job.out, job.split, job.task, 0, len(found.files), ids, originals, part)
    found.files[path] = entry


def _remove(out: str, files: Sequence[str] | dict[str, Any]) -> None:
    filesystem, root = open_folder(out)
    for path in files:
        with suppress(OSError):
            filesystem.delete_file(f"{root}/{path}")


def _keep_bad_items(job: Job, found: Found) -> None:
    """Write what was set aside in place of what an earlier import of the same split and task set aside."""
    kept = []
    for text in (read_file(job.out, BAD_ITEMS) or b"").decode().splitlines():
        entry = json.loads(text)
        if (entry["split"], entry["task"]) != (job.split, job.task):
            kept.append(entry)
    write_file(job.out, BAD_ITEMS, "".join(json.dumps(entry) + "\n" for entry in kept + found.bad).encode())


def _source(path: str) -> dict[str, Any]:
    """What tells a file apart from others, without its folder and without reading it whole."""
    head = read_bytes(path, size=2**20)
    return {"name": split_name(path)[1], "bytes": file_size(path), "begins": hashlib.sha256(head).hexdigest()[:16]}


def _empty(tokenizer: Tokenizer, size: int, image_tokens: int) -> Manifest:
    return Manifest(
        size=size,
        patch=tokenizer.patch,
        image_tokens=image_tokens,
        tokenizer=tokenizer.hash,
        codes=tokenizer.codes,
        seed=0,
        settings=SETTINGS,
        rows={},
        files={},
        bad={},
        images_per_row={},
    )


def _extended(before: Manifest, job: Job, per_row: int, found: Found, sources: list[dict[str, Any]]) -> Manifest:
    files = before.files | found.files
    return replace(
        before,
        rows=count_rows(files),
        files=files,
        bad=before.bad | {job.task: before.bad.get(job.task, 0) + len(found.bad)},
        images_per_row=before.images_per_row | {job.task: per_row},
        imported=before.imported | {job.split: before.imported.get(job.split, {}) | {job.task: sources}},
    )


def _copy_tokenizer(folder: str, out: str, wanted: str, load: Callable[[str], Tokenizer]) -> None:
    """Copy the tokenizer's folder into the data set's, unless it is there already."""
    place = join(out, TOKENIZER)
    with suppress(UserError, OSError):
        if file_size(join(place, "config.json")) is not None and load(place).hash == wanted:
            return
    source, root = open_folder(folder)
    target, target_root = open_folder(place)
    with changing(place):
        target.create_dir(target_root, recursive=True)
        pyarrow.fs.copy_files(root, target_root, source_filesystem=source, destination_filesystem=target)


def _verify(out: str, split: Split, task: str, tokenizer: Tokenizer) -> str:
    write_file(out, SHEET, contact_sheet(open_shards(out), split, task, tokenizer))
    return join(out, SHEET)
