"""Files by path or `pyarrow.fs` URI (`s3://...`, `gs://...`, `file://...`): the one place that opens either.

A file is written under another name and then moved, so that a reader sees all of it or none.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.fs

from lvm_ray.errors import UserError


def open_folder(folder: str) -> tuple[pa.fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it."""
    if "://" in folder:
        try:
            filesystem, root = pa.fs.FileSystem.from_uri(folder)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{folder}: cannot open: {str(error).splitlines()[0]}") from None
        return filesystem, root
    return pa.fs.LocalFileSystem(), os.path.abspath(folder)


def write_file(folder: str, path: str, content: bytes) -> None:
    """Write a whole file below a folder, atomically."""
    with new_file(folder, path) as stream:
        stream.write(content)


@contextmanager
def new_file(folder: str, path: str) -> Iterator[Any]:
    """A binary stream into a file below a folder, which is there as a whole when the block ends, or not at all."""
    filesystem, root = open_folder(folder)
    target = f"{root}/{path}"
    filesystem.create_dir(os.path.dirname(target), recursive=True)
    temporary = f"{os.path.dirname(target)}/.{os.path.basename(target)}.{uuid.uuid4().hex[:8]}"
    try:
        with filesystem.open_output_stream(temporary) as stream:
            yield stream
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(temporary)
        raise
    filesystem.move(temporary, target)


def read_file(folder: str, path: str) -> bytes | None:
    """The content of a file below a folder, None where there is none."""
    filesystem, root = open_folder(folder)
    if filesystem.get_file_info(f"{root}/{path}").type != pa.fs.FileType.File:
        return None
    return read_bytes(f"{folder}/{path}")


def open_file(path: str) -> Any:
    """A file as a seekable binary stream, to be closed by the caller. Raises UserError where it cannot be opened."""
    filesystem, place = open_folder(path)
    try:
        return filesystem.open_input_file(place)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {_reason(error)}") from None


def read_bytes(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """The content of a file, or `size` bytes of it from `offset` on. Raises UserError where it cannot be read."""
    with open_file(path) as stream:
        try:
            stream.seek(offset)
            return bytes(stream.read() if size is None else stream.read(size))
        except OSError as error:
            raise UserError(f"{path}: cannot read: {_reason(error)}") from None


def file_size(path: str) -> int | None:
    """Bytes of a file, None where there is none."""
    filesystem, place = open_folder(path)
    info = filesystem.get_file_info(place)
    return int(info.size) if info.type == pa.fs.FileType.File else None


def _reason(error: OSError) -> str:
    return error.strerror or str(error).splitlines()[0].rpartition("] ")[2]
