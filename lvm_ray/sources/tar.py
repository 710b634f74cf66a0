"""Plain tars, listed without unpacking anything: where each member's bytes lie. A member's name is a label and never a path.

`tarfile` reads single headers here and no more: its own walk ends without a word at a damaged header, so that whatever
comes after would be missing and nobody would know.
"""

from __future__ import annotations

import fnmatch
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lvm_ray.errors import BadItem, UserError
from lvm_ray.sources.files import LARGEST_BYTES, list_names, natural, printable, problem_of
from lvm_ray.storage import file_size, join, open_file, read_bytes, split_name

BLOCK = 512
LARGEST_HEADER = 2**20  # bytes of a long name or of a header's additions
LARGEST_PADDING = 2**20  # bytes of zeros after a tar's end
KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


@dataclass(frozen=True)
class Member:
    """A file of a tar: its bytes are `size` from `offset` on. With a `problem` it cannot be used, and says why; `damage` is
    one of the whole tar's, after which there is nothing more."""

    name: str
    offset: int
    size: int
    problem: str | None = None
    damage: bool = False


def list_tars(place: str, where: str) -> list[str]:
    """The tars that a recipe names, in natural order: one file, those of a folder, or those of a pattern (`tars/sa_*.tar`).

    Raises UserError where there is none.
    """
    folder, name = split_name(place)
    if not name.endswith(".tar"):
        folder, name = place.rstrip("/"), "*.tar"
    elif "*" not in name:
        return [place]
    names = [
        found for found in list_names(folder or ".", where, "a tar, a folder of tars")[0] if fnmatch.fnmatchcase(found, name)
    ]
    if not names:
        raise UserError(f"{where}: no tars in {place}; expected files ending in .tar, not compressed")
    return [join(folder, found) if folder else found for found in sorted(names, key=natural)]


def list_members(path: str) -> Iterator[Member]:
    """The files of a tar, as a stream in their order there; folders are passed over.

    What cannot be used (links, devices, names that are absolute, lead upwards or stood before) comes as a member with a
    `problem`, and so does damage, as the last one. Raises nothing for what a tar holds.
    """
    size = file_size(path)
    if size is None:
        yield Member("", 0, 0, f"{printable(path)}: cannot be read: no such file", damage=True)
        return
    seen: set[str] = set()
    try:
        with open_file(path) as stream:
            for member in _walk(stream, size):
                problem = member.problem or (f"the name {printable(member.name)} stood before" if member.name in seen else None)
                seen.add(member.name)
                yield Member(member.name, member.offset, member.size, problem and f"{path}: {problem}", member.damage)
    except (OSError, UserError) as error:
        yield Member("", 0, 0, f"{path}: cannot be read: {' '.join(str(error).split())}", damage=True)


def read_member(path: str, place: list[int], name: str) -> bytes:
    """The bytes of a member at [offset, size]. Raises BadItem where the tar has become shorter."""
    offset, size = place
    try:
        content = read_bytes(path, offset, size)
    except UserError as error:
        raise BadItem(str(error)) from None
    if len(content) != size:
        raise BadItem(f"{path}: {name}: {len(content)} of {size} bytes are there")
    return content


def _walk(stream: Any, size: int) -> Iterator[Member]:
    offset = 0
    renamed: dict[str, str] = {}  # by headers that stand before the member's own
    while True:
        stream.seek(offset)
        block = bytes(stream.read(BLOCK))
        if not any(block) or len(block) < BLOCK:
            yield from _end(block, offset, size)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            compressed = offset == 0 and block[:2] == b"\x1f\x8b"
            reason = "it is compressed: unpack it with gunzip" if compressed else f"damaged at byte {offset:,} ({error})"
            yield _damage(f"{reason}; what comes after is not read")
            return
        start = offset + BLOCK
        length = _length(renamed.get("size"), header.size)
        has_bytes = header.type not in (*KINDS, tarfile.DIRTYPE)  # whatever the header of such a one says
        if length < 0 or (has_bytes and start + length > size):
            name = printable(header.name)
            yield _damage(f"{name} should have {length:,} bytes, the tar ends before; what comes after is not read")
            return
        offset = start + (-(-length // BLOCK) * BLOCK if has_bytes else 0)
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if length > LARGEST_HEADER:
                yield _damage(f"a header of {length:,} bytes at byte {start:,}; what comes after is not read")
                return
            renamed |= _additions(header.type, bytes(stream.read(length)))
            continue
        if header.type == tarfile.XGLTYPE:
            continue
        member = _member(renamed.get("path", header.name), header.type, start, length)
        renamed = {}
        if header.type != tarfile.DIRTYPE:
            yield member


def _member(name: str, kind: bytes, offset: int, size: int) -> Member:
    name = name.removeprefix("./")
    problem = None
    if kind not in FILES:
        problem = f"{printable(name)} is {KINDS.get(kind, 'no plain file')}: only plain files are read"
    elif problem_of(name):
        problem = problem_of(name)
    elif name.startswith("/") or ".." in name.split("/"):
        problem = f"{name} leads out of the tar: only names below it are read"
    elif size > LARGEST_BYTES:
        problem = f"{name} has {size:,} bytes; at most {LARGEST_BYTES:,} are read"
    return Member(name, offset, size, problem)


def _additions(kind: bytes, content: bytes) -> dict[str, str]:
    """What a header before the member's own says of it: its long `path`, its `size`."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    additions: dict[str, str] = {}
    while kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) and content:  # records of "LENGTH key=value\n"
        length, _, _ = content[:20].partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            additions[key.decode()] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return additions


def _length(said: str | None, size: int) -> int:
    if said is None:
        return size
    return int(said) if said.isascii() and said.isdigit() and len(said) < 20 else -1


def _end(block: bytes, offset: int, size: int) -> Iterator[Member]:
    """What is wrong with a tar's end: its mark is missing, or something stands after it."""
    if len(block) < BLOCK:
        yield _damage(f"ends at byte {size:,} without a tar's end mark: it may be cut short")
    elif size - offset > LARGEST_PADDING:
        yield _damage(f"{size - offset:,} bytes after its end mark are not read: a file made of several tars?")


def _damage(reason: str) -> Member:
    return Member("", 0, 0, reason, damage=True)
