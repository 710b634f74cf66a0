"""LMDBs of degraded and clean images, as BasicSR makes them (Rain13K): `data.mdb`, and `meta_info.txt` with the names.

An LMDB is listed as a tar is, as names and where their bytes lie, by reading its pages here. The `lmdb` library maps the file
into memory and believes what its pages say: a file that was cut short or made to hurt ends the process by a signal. Here
every page number and every length is checked against the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from lvm_ray.errors import UserError
from lvm_ray.sources.base import Item, Sample, Source
from lvm_ray.sources.files import LARGEST_BYTES, decode_image, printable, problem_of, usable
from lvm_ray.sources.folders import same_size
from lvm_ray.sources.tar import read_member
from lvm_ray.storage import file_size, join, open_file, read_file

HEADER = 16  # bytes of a page's header: number, unused, kind, and the free space's bounds or the number of pages
META = struct.Struct("<IIQQ")  # magic, version, address, size of the map
TREE = struct.Struct("<IHHQQQQQ")  # unused (of the first: page size), flags, depth, pages of three kinds, entries, root
MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW = 1, 2, 4
ELSEWHERE, PLAIN = 1, 0  # a node's flags: its value lies on pages of its own, or beside its key
NOTHING = 2**64 - 1  # the root of an empty tree
DEEPEST = 32


class PairLmdb(Source):
    """Two LMDB folders of encoded images under the same keys: degraded and clean."""

    label: ClassVar[str] = "image"

    format: Literal["lmdb"] = "lmdb"
    degraded: str = Field(description="LMDB folder of degraded images (`input.lmdb`)")
    clean: str = Field(description="LMDB folder of their clean images (`target.lmdb`)")

    def items(self, where: str) -> Iterator[Item]:
        """Sorted by name: the names of `meta_info.txt`, where there is one, or all keys. The keys are in memory."""
        yield from usable(self._items(where), where)

    def _items(self, where: str) -> Iterator[Item]:
        folders = (self.degraded, self.clean)
        paths = tuple(join(folder.rstrip("/"), "data.mdb") for folder in folders)
        places = [list_values(path, f"{where}.{name}") for path, name in zip(paths, ("degraded", "clean"), strict=True)]
        names = {name for folder, place in zip(folders, places, strict=True) for name in _names(folder) or place}
        for name in sorted(names):
            problem = problem_of(name)
            for path, place in zip(paths, places, strict=True):
                if name not in place:
                    problem = problem or f"{path}: has no key {name}"
                elif place[name][1] > LARGEST_BYTES:
                    problem = problem or f"{path}: {name} has {place[name][1]:,} bytes; at most {LARGEST_BYTES:,} are read"
            extra = {} if problem else {"degraded": list(places[0][name]), "clean": list(places[1][name])}
            yield Item(printable(name), printable(name), paths, extra, problem)

    def load(self, item: Item) -> Sample:
        names = tuple(f"{path}: {item.id}" for path in item.paths)
        image, clean = (
            decode_image(read_member(path, item.extra[key], item.id), name)
            for path, key, name in zip(item.paths, ("degraded", "clean"), names, strict=True)
        )
        return Sample(same_size(image, clean, names), clean)


def list_values(path: str, where: str) -> dict[str, tuple[int, int]]:
    """{key: (offset, size)} of an LMDB file's main tree: the bytes of each value.

    Raises UserError where the file is not an LMDB, was cut short, or is damaged anywhere on the way.
    """
    size = file_size(path)
    if size is None:
        raise UserError(f"{where}: no file {path}; give an LMDB folder")
    with open_file(path) as stream:
        try:
            return dict(_Tree.open(stream, size).values())
        except (_Damage, struct.error) as error:
            raise UserError(f"{where}: {path}: {error}: it is damaged or no LMDB; get it again") from None


def _names(folder: str) -> list[str]:
    """The keys that `meta_info.txt` names: each line's text before the first dot."""
    content = read_file(folder.rstrip("/"), "meta_info.txt") or b""
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    return [line.partition(".")[0] for line in lines if line.strip()]


class _Damage(ValueError):
    """What is wrong with an LMDB."""


@dataclass(frozen=True)
class _Tree:
    """The main tree of an open LMDB file."""

    stream: Any
    page: int  # bytes of one
    pages: int
    root: int
    entries: int

    @classmethod
    def open(cls, stream: Any, size: int) -> _Tree:
        """By the newer of the two meta pages."""
        first = _meta(_read(stream, 0, 256))
        metas = [first, _meta(_read(stream, first[1], 256))]
        _, page, root, last, entries = max(metas)
        if (last + 1) * page > size:
            raise _Damage(f"has {size:,} bytes, its header counts {(last + 1) * page:,}")
        return cls(stream, page, last + 1, root, entries)

    def values(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(key, (offset, size)) in the order of the keys."""
        before: bytes | None = None
        count = 0
        for key, place in self._below(self.root, 0, [0]) if self.root != NOTHING else ():
            if before is not None and key <= before:
                raise _Damage("its keys are out of order")
            before, count = key, count + 1
            yield key.decode("utf-8", "surrogateescape"), place
        if count != self.entries:
            raise _Damage(f"holds {count} values, its header counts {self.entries}")

    def _below(self, number: int, depth: int, visited: list[int]) -> Iterator[tuple[bytes, tuple[int, int]]]:
        visited[0] += 1
        if depth > DEEPEST or visited[0] > self.pages:
            raise _Damage("its pages go round in circles")
        kind, lower, page = self._page(number)
        for start in struct.unpack_from(f"<{(lower - HEADER) // 2}H", page, HEADER):
            low, high, flags, length = struct.unpack_from("<4H", page, start)
            if kind == BRANCH:
                yield from self._below(low | high << 16 | flags << 32, depth + 1, visited)
                continue
            data = start + 8 + length
            size = low | high << 16
            if flags == PLAIN and data + size <= self.page:
                place = (number * self.page + data, size)
            elif flags == ELSEWHERE:
                place = self._elsewhere(struct.unpack_from("<Q", page, data)[0], size)
            else:
                raise _Damage(f"page {number} holds an entry that is not a plain value")
            yield page[start + 8 : data], place

    def _page(self, number: int) -> tuple[int, int, bytes]:
        """(kind, end of its list of nodes, content) of a page of nodes."""
        page = self._read(number, self.page)
        itself, _, kind, lower, _ = struct.unpack_from("<QHHHH", page)
        if itself != number or kind not in (BRANCH, LEAF) or not HEADER <= lower <= self.page:
            raise _Damage(f"page {number} is none of its tree's")
        return kind, lower, page

    def _elsewhere(self, number: int, size: int) -> tuple[int, int]:
        """The place of a value on pages of its own."""
        itself, _, kind, count = struct.unpack("<QHHI", self._read(number, HEADER))
        if itself != number or kind != OVERFLOW or number + count > self.pages or HEADER + size > count * self.page:
            raise _Damage(f"page {number} does not hold the value that it should")
        return number * self.page + HEADER, size

    def _read(self, number: int, size: int) -> bytes:
        if number >= self.pages:
            raise _Damage(f"names page {number} of {self.pages}")
        return _read(self.stream, number * self.page, size)


def _meta(page: bytes) -> tuple[int, int, int, int, int]:
    """(transaction, page size, root, last page, entries) of a meta page."""
    magic, version, _, _ = META.unpack_from(page, HEADER)
    if magic != MAGIC or version != VERSION:
        raise _Damage("has no LMDB header of version 1")
    trees = HEADER + META.size
    size = TREE.unpack_from(page, trees)[0]
    entries, root = TREE.unpack_from(page, trees + TREE.size)[-2:]
    last, transaction = struct.unpack_from("<QQ", page, trees + 2 * TREE.size)
    if size not in (2**power for power in range(9, 17)) or last > 2**48:
        raise _Damage(f"has pages of {size} bytes")
    return transaction, size, root, last, entries


def _read(stream: Any, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return bytes(stream.read(size))
