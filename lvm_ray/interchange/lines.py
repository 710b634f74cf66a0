"""The token files of DeLVM and LVM, one line after the other: nothing of a file is in memory but the line that is read.

    DeLVM   NAME.bin        a line: {"tokens": [5, 0, ...]}
            NAME.bin.meta   npy int64 [lines, 2]: the byte at which each line begins, and its tokens
    LVM     NAME.jsonl      a line: {"tokens": base64 of int32 little-endian}

A line is one sample: the tokens of some pictures in a row. Either kind of line is read in either kind of file.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lvm_ray.errors import BadItem, UserError
from lvm_ray.storage import file_size, open_file, split_query

LONGEST_LINE = 4 * 2**20  # bytes: about 700,000 tokens, where the official files have 512 to 4,096
META_ROWS = 8192  # read at once

Format = Literal["delvm", "lvm"]
Codes = NDArray[np.uint16]


@dataclass(frozen=True)
class Line:
    """A line of a file.

    number   from 1, blank lines included
    offset   the byte at which it begins
    content  its bytes; None where it is longer than LONGEST_LINE
    """

    number: int
    offset: int
    content: bytes | None


def read_lines(path: str) -> Iterator[Line]:
    """The lines of a file in their order, without blank ones. Raises UserError where the file cannot be read."""
    with io.BufferedReader(open_file(path), 2**20) as stream:
        number = offset = 0
        while content := stream.readline(LONGEST_LINE + 1):
            number += 1
            size = len(content)
            whole = size <= LONGEST_LINE or content.endswith(b"\n")
            piece = content
            while not whole and not piece.endswith(b"\n") and (piece := stream.readline(2**20)):
                size += len(piece)
            if not whole or content.strip():
                yield Line(number, offset, content if whole else None)
            offset += size


def parse_line(line: Line, codes: int, image_tokens: int) -> Codes:
    """The tokens uint16 [K x image_tokens] of a line, K at least 1. Raises BadItem with the reason where it holds none."""
    if line.content is None:
        raise BadItem(f"longer than {LONGEST_LINE:,} bytes")
    try:
        value = json.loads(line.content)
    except (ValueError, RecursionError):
        raise BadItem("not JSON" if line.content.endswith(b"\n") else "not JSON: the file is cut off here") from None
    tokens = _numbers(value.get("tokens") if isinstance(value, dict) else None)
    if len(tokens) == 0:
        raise BadItem("holds no tokens")
    if tokens.min() < 0 or tokens.max() >= codes:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise BadItem(f"holds code {wrong}, and the tokenizer has codes 0 to {codes - 1}")
    if len(tokens) % image_tokens:
        raise BadItem(f"{len(tokens)} tokens are no whole number of pictures of {image_tokens} tokens")
    return tokens.astype(np.uint16)


def delvm_line(tokens: Codes) -> bytes:
    """A line as DeLVM's scripts write it."""
    return (json.dumps({"tokens": tokens.tolist()}) + "\n").encode()


def lvm_line(tokens: Codes) -> bytes:
    """A line as LVM's scripts write it."""
    return (json.dumps({"tokens": base64.b64encode(tokens.astype("<i4").tobytes()).decode()}) + "\n").encode()


LINES: dict[Format, Callable[[Codes], bytes]] = {"delvm": delvm_line, "lvm": lvm_line}


def read_meta(path: str) -> Iterator[tuple[int, int]] | None:
    """The (byte offset, tokens) of each line by the `.meta` beside a file, None where there is none.

    Raises UserError where it is no npy file of int64 [lines, 2]. Objects, which are pickled, are never read.
    """
    name, query = split_query(path)
    place = f"{name}.meta{query}"
    if file_size(place) is None:
        return None
    stream = io.BufferedReader(open_file(place), 2**20)
    try:
        _check_meta(stream, place)
    except BaseException:
        stream.close()
        raise
    return _meta_rows(stream)


def _check_meta(stream: io.BufferedReader, place: str) -> None:
    """Read a `.meta` up to its rows."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read_header(stream)
    except Exception as error:  # numpy evaluates the header as a literal, which fails with nearly every kind of exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: not an npy file ({reason}): remove it, and the lines are read without it") from None
    if dtype.hasobject:
        raise UserError(f"{place}: holds pickled objects, which are never read: remove it, and the lines are read without it")
    if dtype != np.dtype("<i8") or len(shape) != 2 or shape[1] != 2 or by_column:
        raise UserError(
            f"{place}: holds {dtype} {list(shape)}, and a .meta is int64 [lines, 2]: remove it, and the lines are read without it"
        )


def write_meta(stream: io.BufferedIOBase, rows: NDArray[np.int64]) -> None:
    """Write a `.meta`: int64 [lines, 2]."""
    np.save(stream, rows, allow_pickle=False)


def _meta_rows(stream: io.BufferedReader) -> Iterator[tuple[int, int]]:
    with stream:
        while content := stream.read(16 * META_ROWS):
            # Not more than whole entries: what a cut off file lacks shows in their number.
            entries = np.frombuffer(content[: len(content) // 16 * 16], "<i8").reshape(-1, 2)
            yield from map(tuple, entries.tolist())


def _numbers(tokens: object) -> NDArray[np.int64]:
    """The list or the base64 text of a line as numbers."""
    try:
        if isinstance(tokens, str):
            return np.frombuffer(base64.b64decode(tokens, validate=True), "<i4").astype(np.int64)
        if isinstance(tokens, list) and set(map(type, tokens)) <= {int}:
            return np.array(tokens, np.int64)
    except (ValueError, OverflowError):
        raise BadItem('its "tokens" are no codes') from None
    raise BadItem('holds no "tokens" as a list of codes or as base64 of int32')
