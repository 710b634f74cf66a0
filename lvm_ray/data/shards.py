"""Token shards: Parquet files of pictures as tokens, and the manifest that makes them a data set.

    FOLDER/{split}/{task}/copy-{copy:03d}/part-{part:05d}.parquet    columns: pair, original, tokens
    FOLDER/manifest.json                                             written last: without it there is no data set
    FOLDER/bad_items.jsonl                                           what was set aside, and why

A row is the pictures that one item became: of a pair task the image and its label picture, of other tasks one picture or
some that belong together. `pair` is its id; `tokens` is fixed-size binary: N tokens of each picture after the other, uint16
little-endian. Plain pyarrow reads it; the files are uncompressed because that reads four times faster. Every copy of a task
holds the same rows in the same order. FOLDER is a path or any `pyarrow.fs` URI.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
from numpy.typing import NDArray

from lvm_ray.errors import UserError
from lvm_ray.storage import file_size, join, open_folder, read_bytes, read_file, write_file

SCHEMA = 2
PAIR = 2  # pictures of a row of a pair task

COLUMNS = ["pair", "original", "tokens"]
# Names in a row differ by little: written as differences they are a fiftieth of the file, and not a tenth.
NAMES = {"pair": "DELTA_BYTE_ARRAY", "original": "DELTA_BYTE_ARRAY"}

# The places of parts, and of what is left of a part whose writing was killed, below the folder.
_COPY = r"(train|validation|test)/[A-Za-z0-9_][\w-]*/copy-\d{3,}"
PART = re.compile(rf"{_COPY}/part-\d{{5,}}\.parquet", re.ASCII)
REMAINS = re.compile(rf"{_COPY}/\.part-\d{{5,}}\.parquet\.[0-9a-f]{{8}}", re.ASCII)

Tokens = NDArray[np.uint16]  # [R, KN]: of K pictures a row, N tokens each; of a pair task [P, 2N]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds: `manifest.json` as a value.

    size, patch, image_tokens  side of a picture, side of a token's patch, tokens of a picture
    tokenizer, codes           hash of the codebook, and its number of codes
    seed                       of the augmented copies
    settings                   fingerprint of everything that the tokens depend on
    rows                       {split: {task: {copy: rows}}}
    files                      {path below the folder: {"rows", "sha256"}}
    bad                        {task: items set aside}
    images_per_row             {task: pictures of each row}
    covered                    {split: {task: [mean part of the original's pixels that copy 0, 1, ... shows]}}
    imported                   {split: {task: the token files that its rows came from}}
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
    images_per_row: dict[str, int]
    covered: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    imported: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """Sixteen hex digits that change with the tokens, their order or their codebook."""
        values = [self.tokenizer, self.codes, sorted((path, entry["sha256"]) for path, entry in self.files.items())]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class Shards:
    """An opened data set. Columns are kept once read, so one object serves many batches."""

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._columns: dict[tuple[str, str, int, str], Any] = {}

    def rows(self, split: str, task: str, copy: int) -> tuple[list[str], Tokens]:
        """The ids and the tokens uint16 [R, KN] of one copy of a task's rows, in a fixed order."""
        return self._column(split, task, copy, "pair"), self.tokens(split, task, copy)

    def tokens(self, split: str, task: str, copy: int) -> Tokens:
        """The tokens uint16 [R, KN] of `rows`, without the ids: what training reads."""
        tokens: Tokens = self._column(split, task, copy, "tokens")
        return tokens

    def pairs(self, split: str, task: str, copy: int) -> tuple[list[str], Tokens]:
        """The rows of a pair task: ids, and tokens uint16 [P, 2N]. Raises UserError where the rows are not pairs."""
        pictures = self.manifest.images_per_row.get(task, PAIR)
        if pictures != PAIR:
            raise UserError(
                f"{self.folder}: a row of task {task} holds {pictures} pictures, and examples are (image, label) pairs: "
                f"tokenize or import the task with {PAIR} pictures a row"
            )
        return self.rows(split, task, copy)

    def parts(self, split: str, task: str, copy: int) -> Iterator[tuple[list[str], list[str], Tokens]]:
        """Ids, originals and tokens of one part after the other, in the order of `rows`: no more than one is in memory."""
        filesystem, root = open_folder(self.folder)
        for path in self._paths(split, task, copy):
            table = _read_part(filesystem, root, self.folder, path, COLUMNS)
            yield table["pair"].to_pylist(), table["original"].to_pylist(), self._tokens_of(task, table)

    def take(self, split: str, task: str, copy: int, places: Sequence[int]) -> tuple[list[str], Tokens]:
        """Ids and tokens of single rows by their places in `rows`, ascending, out of the parts that hold them."""
        filesystem, root = open_folder(self.folder)
        ids: list[str] = []
        tokens: list[Tokens] = []
        start = 0
        for path in self._paths(split, task, copy):
            stop = start + int(self.manifest.files[path]["rows"])
            mine = [place - start for place in places if start <= place < stop]
            if mine:
                table = _read_part(filesystem, root, self.folder, path, COLUMNS)
                ids += table["pair"].take(mine).to_pylist()
                tokens.append(self._tokens_of(task, table)[mine])
            start = stop
        return ids, np.concatenate(tokens)

    def originals(self, split: str, task: str) -> list[str]:
        """The original image of every row, in the order of `rows`."""
        originals: list[str] = self._column(split, task, 0, "original")
        return originals

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
            place = join(self.folder, path)
            if _sha256(read_bytes(place)) != entry["sha256"]:
                raise UserError(f"{place}: changed since it was written (checksum): run lvm-ray tokenize again")

    def _column(self, split: str, task: str, copy: int, name: str) -> Any:
        """A column of all parts: tokens as one array, names as a list."""
        key = (split, task, copy, name)
        if key not in self._columns:
            filesystem, root = open_folder(self.folder)
            tables = [_read_part(filesystem, root, self.folder, path, [name]) for path in self._paths(split, task, copy)]
            found, expected = sum(len(table) for table in tables), self.manifest.rows[split][task][copy]
            if found != expected:
                raise UserError(
                    f"{join(self.folder, _copy_path(split, task, copy))}: {found} rows, the manifest says {expected}: "
                    "run lvm-ray tokenize again"
                )
            if name == "tokens":
                self._columns[key] = np.concatenate([self._tokens_of(task, table) for table in tables])
            else:
                self._columns[key] = [text for table in tables for text in table[name].to_pylist()]
        return self._columns[key]

    def _paths(self, split: str, task: str, copy: int) -> list[str]:
        if copy not in self.manifest.rows.get(split, {}).get(task, {}):
            raise UserError(f"{self.folder}: holds no copy {copy} of task {task}'s {split} pairs: run lvm-ray tokenize")
        prefix = f"{_copy_path(split, task, copy)}/"
        return [path for path in sorted(self.manifest.files) if path.startswith(prefix)]

    def _tokens_of(self, task: str, table: pa.Table) -> Tokens:
        cells, width = table["tokens"].combine_chunks(), self.manifest.images_per_row[task] * self.manifest.image_tokens
        values = np.frombuffer(cells.buffers()[1], "<u2", count=len(cells) * width, offset=cells.offset * width * 2)
        return values.reshape(len(cells), width).astype(np.uint16, copy=False)


def open_shards(folder: str) -> Shards:
    """Open a finished data set. Raises UserError where there is none, or one of another schema version."""
    return Shards(folder, read_manifest(folder))


def write_part(
    folder: str, split: str, task: str, copy: int, part: int, ids: Sequence[str], originals: Sequence[str], tokens: Tokens
) -> tuple[str, dict[str, Any]]:
    """Write one file of rows, atomically. Its path below the folder and its manifest entry {"rows", "sha256"}."""
    assert len(ids) == len(originals) == len(tokens) and tokens.dtype == np.uint16 and tokens.flags.c_contiguous
    width = tokens.shape[1] * tokens.itemsize
    cells = pa.Array.from_buffers(pa.binary(width), len(ids), [None, pa.py_buffer(tokens.astype("<u2", copy=False))])
    table = pa.table([pa.array(ids, pa.string()), pa.array(originals, pa.string()), cells], names=COLUMNS)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(
        table, sink, compression="none", use_dictionary=False, write_statistics=False, store_schema=False, column_encoding=NAMES
    )
    content = sink.getvalue().to_pybytes()
    path = part_path(split, task, copy, part)
    write_file(folder, path, content)
    return path, {"rows": len(ids), "sha256": _sha256(content)}


def part_path(split: str, task: str, copy: int, part: int) -> str:
    """The place of a part below the folder of the data set."""
    return f"{_copy_path(split, task, copy)}/part-{part:05d}.parquet"


def _copy_path(split: str, task: str, copy: int) -> str:
    return f"{split}/{task}/copy-{copy:03d}"


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically: from here on the folder is a data set."""
    values = asdict(manifest)
    values["rows"] = {
        split: {task: {str(copy): rows for copy, rows in copies.items()} for task, copies in tasks.items()}
        for split, tasks in manifest.rows.items()
    }
    write_file(folder, "manifest.json", json.dumps(values, indent=1, sort_keys=True).encode())


def has_manifest(folder: str) -> bool:
    """Whether a folder is a data set, whole or not."""
    return file_size(join(folder, "manifest.json")) is not None


def read_manifest(folder: str) -> Manifest:
    """The manifest of a data set. Raises UserError where it is missing, unreadable, of another schema version, or names
    files that are none of a data set's."""
    place = join(folder, "manifest.json")
    if not has_manifest(folder):
        raise UserError(f"{folder} has no manifest.json, so it is not a data set: run lvm-ray tokenize")
    try:
        values = json.loads(read_bytes(place))
        schema = values["schema"]
        if schema != SCHEMA:
            raise UserError(f"{place}: schema {schema}, this version reads {SCHEMA}: run lvm-ray tokenize again")
        strange = [path for path in values["files"] if not PART.fullmatch(path)]
        if strange:
            raise UserError(f"{place}: names {strange[0]!r}, which is no place of a shard: run lvm-ray tokenize again")
        values["rows"] = {
            split: {task: {int(copy): int(rows) for copy, rows in copies.items()} for task, copies in tasks.items()}
            for split, tasks in values["rows"].items()
        }
        return Manifest(**values)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: not a manifest ({error}): run lvm-ray tokenize again") from None


def require_tokenised(folder: str) -> None:
    """Raises UserError where a data set holds imported tokens, which tokenizing in its place would lose."""
    try:
        values = json.loads(read_file(folder, "manifest.json") or b"{}")
    except ValueError:
        return
    if isinstance(values, dict) and values.get("imported"):  # whatever else this version thinks of the manifest
        raise UserError(f"{folder}: holds imported tokens, which tokenizing would remove: set `shards` to another folder")


def _read_part(filesystem: pa.fs.FileSystem, root: str, folder: str, path: str, columns: list[str]) -> pa.Table:
    try:
        # Parts are small: a pool of threads costs more than it saves.
        with pa.parquet.ParquetFile(f"{root}/{path}", filesystem=filesystem, memory_map=True) as file:
            return file.read(columns, use_threads=False)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{join(folder, path)}: cannot read this shard ({reason}): run lvm-ray tokenize again") from None


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
