"""Files by path or `pyarrow.fs` URI (`s3://...`, `gs://...`, `file://...`): the one place that opens either.

Of a URI, `?` and what follows is the query (`?region=us-east-1`); in what stands before, `%3F` is a question mark and `%25` a
per cent sign. A path is what it is, byte for byte. A file is written under another name and then moved, so that a reader sees
all of it or none. No message holds a URI's credentials.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs

from lvm_ray.errors import UserError

SECRET_ENDINGS = "key|token|secret|password|signature|sig"
# A password may hold slashes; digits alone before the first one are a port.
CREDENTIALS = re.compile(r"(://)[^/?#@\s'\"]*:(?!\d+/)[^@?\s'\"]*@")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")
SECRETS = re.compile(rf"(?i)([?&][\w-]*(?:{SECRET_ENDINGS})[\w-]*=)[^&\s'\"]+")


def is_uri(path: str) -> bool:
    return "://" in path


def join(folder: str, name: str) -> str:
    """The path of a name in a folder: of a URI with the name quoted, before the query."""
    if not is_uri(folder):
        return f"{folder}/{name}"
    place, query = split_query(folder)
    return f"{place.removesuffix('/')}/{_quoted(name)}{query}"


def split_name(path: str) -> tuple[str, str]:
    """The folder of a path, empty where it names none, and the name in it: what `join` puts together."""
    place, query = split_query(path)
    folder, _, name = place.rpartition("/")
    return (folder + query, unquote(name)) if is_uri(path) else (folder, name)


def short_names(*paths: str) -> tuple[str, ...]:
    """What paths differ in, without the folders that all begin and end with; the paths where nothing would be left of one."""
    parts = [list(PurePosixPath(path).parts) for path in paths]
    for place in (0, -1):
        while all(parts) and len({one[place] for one in parts}) == 1:
            for one in parts:
                one.pop(place)
    return tuple("/".join(one) for one in parts) if all(parts) else paths


def split_query(path: str) -> tuple[str, str]:
    """A URI without its query, and the query with its `?`; a path as it is, and nothing."""
    place, mark, query = path.partition("?") if is_uri(path) else (path, "", "")
    return place, mark + query


def fill(pattern: str, name: str) -> str:
    """The path that a pattern gives where its `*` stands for a name."""
    return pattern.replace("*", _quoted(name) if is_uri(pattern) else name, 1)


def _quoted(name: str) -> str:
    return quote(name, safe="/*")


def redacted(text: str) -> str:
    """The text without what URIs may carry in secret: `user:password@`, and values of keys, tokens and passwords."""
    text = CREDENTIALS.sub(r"\1***@", text)
    text = re.sub(r"(://)[^/@\s'\"]+@", r"\1***@", text)
    return SECRETS.sub(r"\1***", text)


def has_credentials(text: str) -> bool:
    """Whether a URI in the text carries a password or a key."""
    return is_uri(text) and bool(CREDENTIALS.search(text) or SECRETS.search(text))


def open_folder(folder: str) -> tuple[pa.fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it. Raises UserError where there is no such file system."""
    if not is_uri(folder):
        return pa.fs.LocalFileSystem(), os.path.abspath(folder)
    place, query = split_query(folder)
    scheme, _, rest = place.partition("://")
    authority, _, path = rest.partition("/")
    try:
        filesystem, root = _file_system(f"{scheme}://{authority}/{query}")
    except (pa.ArrowInvalid, OSError, ImportError) as error:
        raise UserError(f"{redacted(folder)}: cannot open: {redacted(str(error).splitlines()[0])}") from None
    path = unquote(path).rstrip("/")
    return filesystem, f"{root.rstrip('/')}/{path}" if root and path else root or path


@lru_cache(maxsize=32)
def _file_system(root: str) -> tuple[pa.fs.FileSystem, str]:
    """Kept, since a new one looks up the region and the credentials again and shares no connection."""
    filesystem, place = pa.fs.FileSystem.from_uri(root)
    return filesystem, place


def write_file(folder: str, path: str, content: bytes) -> None:
    """Write a whole file below a folder, atomically. Raises UserError where it cannot be written."""
    with new_file(folder, path) as stream:
        stream.write(content)


@contextmanager
def new_file(folder: str, path: str) -> Iterator[Any]:
    """A binary stream into a file below a folder, which is there as a whole when the block ends, or not at all.

    Raises UserError where it cannot be written.
    """
    filesystem, root = open_folder(folder)
    target = f"{root}/{path}"
    temporary = f"{os.path.dirname(target)}/.{os.path.basename(target)}.{uuid.uuid4().hex[:8]}"
    with changing(join(folder, path)):
        filesystem.create_dir(os.path.dirname(target), recursive=True)
        try:
            with filesystem.open_output_stream(temporary) as stream:
                yield stream
        except BaseException:
            with suppress(OSError):
                filesystem.delete_file(temporary)
            raise
        filesystem.move(temporary, target)


def is_temporary(name: str) -> bool:
    """Whether `new_file` gives a file such a name before it is whole."""
    return bool(TEMPORARY.fullmatch(name))


@contextmanager
def changing(path: str) -> Iterator[None]:
    """Raises UserError, with the path and the reason, where what its block writes or removes cannot be."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{redacted(path)}: cannot write: {_reason(error)}") from None


@contextmanager
def saving(what: str, then: str = "") -> Iterator[None]:
    """Raises UserError, as what cannot be done and why, where the tensors that its block writes cannot be: safetensors tells what
    the disk says in an error of its own. `then`: what running the same command again does."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error):
            raise
        raise UserError(f"{what} ({error}): free space on that disk and run the same command again{then}") from None


def read_file(folder: str, path: str) -> bytes | None:
    """The content of a file below a folder, None where there is none. Raises UserError where it cannot be read."""
    place = join(folder, path)
    return None if file_size(place) is None else read_bytes(place)


def open_file(path: str) -> Any:
    """A file as a seekable binary stream, to be closed by the caller. Raises UserError where it cannot be opened."""
    filesystem, place = open_folder(path)
    with reading(path):
        return filesystem.open_input_file(place)


def read_bytes(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """The content of a file, or `size` bytes of it from `offset` on. Raises UserError where it cannot be read."""
    with open_file(path) as stream, reading(path):
        stream.seek(offset)
        return bytes(stream.read() if size is None else stream.read(size))


def file_size(path: str) -> int | None:
    """Bytes of a file, None where there is none. Raises UserError where the file system does not say."""
    info = _info(path)
    return int(info.size) if info.type == pa.fs.FileType.File else None


def is_folder(path: str) -> bool:
    """Whether a path or URI is a folder. Raises UserError where the file system does not say."""
    return bool(_info(path).type == pa.fs.FileType.Directory) if is_uri(path) else os.path.isdir(path)


def list_sizes(folder: str) -> dict[str, int]:
    """Bytes of every file of a folder by name; empty where there is none. Raises UserError where it cannot be listed."""
    filesystem, root = open_folder(folder)
    with reading(folder):
        found = filesystem.get_file_info(pa.fs.FileSelector(root, allow_not_found=True))
    return {info.base_name: int(info.size) for info in found if info.type == pa.fs.FileType.File}


def _info(path: str) -> pa.fs.FileInfo:
    filesystem, place = open_folder(path)
    with reading(path):
        return filesystem.get_file_info(place)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Raises UserError, with the path and the reason, where what its block reads cannot be."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{redacted(path)}: cannot read: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return redacted(text.splitlines()[0].rpartition("] ")[2])
