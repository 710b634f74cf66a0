"""Token shards: Parquet files of (image, label) pairs as tokens, and the manifest that makes them a data set.

    FOLDER/{split}/{task}/copy-{copy:03d}/part-{part:05d}.parquet    columns: pair, original, tokens
    FOLDER/manifest.json                                             written last: without it there is no data set
    FOLDER/bad_items.jsonl                                           what was set aside, and why

`tokens` is fixed-size binary: the image's N tokens, then the label picture's N, uint16 little-endian. Plain pyarrow reads
it; the files are uncompressed because that reads four times faster. Every copy of a task holds the same pairs in the same
order. FOLDER is a path or any `pyarrow.fs` URI.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
from numpy.typing import NDArray

from lvm_ray.errors import UserError
from lvm_ray.storage import open_folder, read_bytes, write_file

SCHEMA = 1
IMAGES_PER_ROW = 2

Tokens = NDArray[np.uint16]  # [P, 2N]: image tokens, then label tokens


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds: `manifest.json` as a value.

    size, patch, image_tokens  side of a picture, side of a token's patch, tokens of a picture
    tokenizer, codes           hash of the codebook, and its number of codes
    seed                       of the augmented copies
    settings                   fingerprint of everything that the tokens depend on
    rows                       {split: {task: {copy: pairs}}}
    files                      {path below the folder: {"rows", "sha256"}}
    bad                        {task: items set aside}
    """

    size: int
    patch: int
    image_tokens: int
    tokenizer: str
    codes: int
    seed: int
    settings: str
    rows: dict[str, dict[str, dict[int, int]]]
    files: dict[str, dict[str, Any]] = field(repr=False)
    bad: dict[str, int]
    images_per_row: int = IMAGES_PER_ROW
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """Sixteen hex digits that change with the tokens, their order or their codebook."""
        values = [self.tokenizer, self.codes, sorted((path, entry["sha256"]) for path, entry in self.files.items())]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class Shards:
    """An opened data set. Tables are kept once read, so one object serves many batches."""

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._tables: dict[tuple[str, str, int], tuple[list[str], list[str], Tokens]] = {}

    def pairs(self, split: str, task: str, copy: int) -> tuple[list[str], Tokens]:
        """The ids and the tokens uint16 [P, 2N] of one copy of a task's pairs, in a fixed order."""
        ids, _, tokens = self._table(split, task, copy)
        return ids, tokens

    def originals(self, split: str, task: str) -> list[str]:
        """The original image of every pair, in the order of `pairs`."""
        return self._table(split, task, 0)[1]

    def require_tokenizer(self, wanted: str) -> None:
        """Raises UserError where the tokens are of another codebook than the model's or the tokenizer's."""
        if self.manifest.tokenizer != wanted:
            raise UserError(
                f"{self.folder}: tokens of codebook {self.manifest.tokenizer}, but codebook {wanted} is wanted: "
                "tokenize into another folder, or use the model that belongs to these tokens"
            )

    def verify(self) -> None:
        """Read every file and compare its checksum. Raises UserError naming the first file that differs."""
        for path, entry in self.manifest.files.items():
            if _sha256(read_bytes(f"{self.folder}/{path}")) != entry["sha256"]:
                raise UserError(f"{self.folder}/{path}: changed since it was written (checksum): run lvm-ray tokenize again")

    def _table(self, split: str, task: str, copy: int) -> tuple[list[str], list[str], Tokens]:
        key = (split, task, copy)
        if key not in self._tables:
            self._tables[key] = self._read_table(*key)
        return self._tables[key]

    def _read_table(self, split: str, task: str, copy: int) -> tuple[list[str], list[str], Tokens]:
        if copy not in self.manifest.rows.get(split, {}).get(task, {}):
            raise UserError(f"{self.folder}: holds no copy {copy} of task {task}'s {split} pairs: run lvm-ray tokenize")
        filesystem, root = open_folder(self.folder)
        prefix = f"{split}/{task}/copy-{copy:03d}/"
        tables = [
            _read_part(filesystem, root, self.folder, path) for path in sorted(self.manifest.files) if path.startswith(prefix)
        ]
        ids = [text for table in tables for text in table["pair"].to_pylist()]
        originals = [text for table in tables for text in table["original"].to_pylist()]
        parts = [_tokens_of(table, self.manifest.image_tokens) for table in tables]
        tokens = np.concatenate(parts) if parts else np.zeros((0, 2 * self.manifest.image_tokens), np.uint16)
        expected = self.manifest.rows[split][task][copy]
        if len(ids) != expected:
            raise UserError(f"{self.folder}/{prefix}: {len(ids)} rows, the manifest says {expected}: run lvm-ray tokenize again")
        return ids, originals, tokens


def open_shards(folder: str) -> Shards:
    """Open a finished data set. Raises UserError where there is none, or one of another schema version."""
    return Shards(folder, read_manifest(folder))


def write_part(
    folder: str, split: str, task: str, copy: int, part: int, ids: Sequence[str], originals: Sequence[str], tokens: Tokens
) -> tuple[str, dict[str, Any]]:
    """Write one file of pairs, atomically. Its path below the folder and its manifest entry {"rows", "sha256"}."""
    assert len(ids) == len(originals) == len(tokens) and tokens.dtype == np.uint16 and tokens.flags.c_contiguous
    width = tokens.shape[1] * tokens.itemsize
    cells = pa.Array.from_buffers(pa.binary(width), len(ids), [None, pa.py_buffer(tokens.astype("<u2", copy=False))])
    table = pa.table({"pair": pa.array(ids, pa.string()), "original": pa.array(originals, pa.string()), "tokens": cells})
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    content = sink.getvalue().to_pybytes()
    path = part_path(split, task, copy, part)
    write_file(folder, path, content)
    return path, {"rows": len(ids), "sha256": _sha256(content)}


def part_path(split: str, task: str, copy: int, part: int) -> str:
    """The place of a part below the folder of the data set."""
    return f"{split}/{task}/copy-{copy:03d}/part-{part:05d}.parquet"


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically: from here on the folder is a data set."""
    values = asdict(manifest)
    values["rows"] = {
        split: {task: {str(copy): rows for copy, rows in copies.items()} for task, copies in tasks.items()}
        for split, tasks in manifest.rows.items()
    }
    write_file(folder, "manifest.json", json.dumps(values, indent=1, sort_keys=True).encode())


def read_manifest(folder: str) -> Manifest:
    """The manifest of a data set. Raises UserError where it is missing, unreadable or of another schema version."""
    filesystem, root = open_folder(folder)
    if filesystem.get_file_info(f"{root}/manifest.json").type != pa.fs.FileType.File:
        raise UserError(f"{folder} has no manifest.json, so it is not a data set: run lvm-ray tokenize")
    try:
        values = json.loads(read_bytes(f"{folder}/manifest.json"))
        schema = values["schema"]
        if schema != SCHEMA:
            raise UserError(f"{folder}/manifest.json: schema {schema}, this version reads {SCHEMA}: run lvm-ray tokenize again")
        values["rows"] = {
            split: {task: {int(copy): int(rows) for copy, rows in copies.items()} for task, copies in tasks.items()}
            for split, tasks in values["rows"].items()
        }
        return Manifest(**values)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/manifest.json: not a manifest ({error}): run lvm-ray tokenize again") from None


def _read_part(filesystem: pa.fs.FileSystem, root: str, folder: str, path: str) -> pa.Table:
    try:
        return pa.parquet.read_table(f"{root}/{path}", filesystem=filesystem, memory_map=True)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}/{path}: cannot read this shard ({reason}): run lvm-ray tokenize again") from None


def _tokens_of(table: pa.Table, image_tokens: int) -> Tokens:
    cells = table["tokens"].combine_chunks()
    width = IMAGES_PER_ROW * image_tokens
    values = np.frombuffer(cells.buffers()[1], "<u2", count=len(cells) * width, offset=cells.offset * width * 2)
    return values.reshape(len(cells), width).astype(np.uint16, copy=False)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def count_rows(files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[int, int]]]:
    """The manifest's `rows`, counted from its `files`."""
    rows: dict[str, dict[str, dict[int, int]]] = {}
    for path, entry in sorted(files.items()):
        split, task, copy, _ = path.split("/")
        copies = rows.setdefault(split, {}).setdefault(task, {})
        number = int(copy.removeprefix("copy-"))
        copies[number] = copies.get(number, 0) + int(entry["rows"])
    return rows
