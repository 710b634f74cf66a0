"""Two sides of one run: a folder of this machine and the URI whose copy it is.

    FOLDER/.mirror.json   the URI, and each file's size and time, here and there, when both were last the same

A file that has changed there is fetched, one that has changed here is sent, and clocks are never compared. Of a run's
checkpoints, the side that has the newest decides. A checkpoint's state.json goes last and is removed first, so that a kill at
any time leaves checkpoints that are whole. One machine at a time may work on a run. Hidden files and checkpoints that were set
aside stay here; a file that was removed there stays here and is sent again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs

from lvm_ray.errors import UserError
from lvm_ray.storage import changing, is_temporary, join, new_file, open_folder, read_file, reading, redacted

MARK = ".mirror.json"
AT_ONCE = 8  # files
CHUNK = 8 << 20  # bytes
CHECKPOINT = re.compile(r"^((?:.*/)?checkpoints/)step-(\d{6,})/")
STATE = "/state.json"
JOURNAL = "metrics.jsonl"
# An object appears once all of it is written. A move would be a copy, of 5 GB at most.
OBJECT_STORES = ("s3", "gcs", "abfs")

Stat = tuple[int, int]  # bytes, time of the last change in nanoseconds
Wanted = Callable[[str], bool]


@dataclass(frozen=True)
class Copy:
    """A folder of this machine and the URI whose copy it is."""

    folder: Path
    uri: str


def make_copy(copy: Copy) -> None:
    """Make the folder of a copy where there is none."""
    copy.folder.mkdir(parents=True, exist_ok=True)
    if not (copy.folder / MARK).is_file():
        _write_record(copy, {})


def copy_of(folder: str | Path) -> tuple[Copy, str] | None:
    """The copy that a folder is, with "", or that it is a run of, with "student/"; None where it is at home here."""
    folder = Path(os.path.abspath(folder))
    for root, below in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if (root / MARK).is_file():
            return Copy(root, str(_content(root)["uri"])), below
    return None


def fetch(copy: Copy, wanted: Wanted) -> None:
    """Bring the wanted files that have changed there since both sides were last the same. Raises UserError where it cannot."""
    record, there = _record(copy), _there(copy)
    # The journal only grows. A longer one here is ahead of what a killed upload left there.
    longer = {path for path, (size, _) in there.items() if path.endswith(JOURNAL) and _size(copy, path) > size}
    paths = [
        path
        for path, stat in there.items()
        if wanted(path) and path not in longer and (path not in record or record[path][1] != stat or _size(copy, path) < 0)
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda path: _download(copy, path, copy.folder / path), paths))
    for path in paths:
        record[path] = (_stat(copy.folder / path), there[path])
    _write_record(copy, record)


def checkpoints_there(copy: Copy, below: str) -> dict[int, str]:
    """The whole checkpoints of a run at the URI: their steps, and their folders in the copy."""
    return _steps(_there(copy), f"{below}checkpoints/")


def fetch_folder(copy: Copy, path: str, damage: Callable[[Path], str | None]) -> str | None:
    """Bring a folder from there, whole or not at all: not where `damage` says what is wrong with it. What that was, or None."""
    target = copy.folder / path
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    there = {name: stat for name, stat in _there(copy).items() if name.startswith(f"{path}/")}
    try:
        for name in there:
            _download(copy, name, temporary / name.removeprefix(f"{path}/"))
        found = damage(temporary)
        if found is None:
            temporary.rename(target)
            _write_record(copy, _record(copy) | {name: (_stat(copy.folder / name), stat) for name, stat in there.items()})
        return found
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def send(copy: Copy, wanted: Wanted) -> None:
    """Send the wanted files that have changed here, and remove there what was removed here.

    Raises UserError that names what could not be sent.
    """
    record, here, listed = _record(copy), _here(copy), _listed(copy)
    there, killed = _visible(listed), [path for path in listed if is_temporary(path.rpartition("/")[2])]
    ahead = tuple(_ahead(there, here))
    mine = [path for path in here.keys() | there.keys() if wanted(path) and not path.startswith(ahead)]
    changed = [
        path for path in mine if path in here and (path not in there or path not in record or record[path][0] != here[path])
    ]
    gone = [path for path in mine if path not in here and (path in record or CHECKPOINT.match(path))]
    same = _same(copy, changed, here, there)
    states = [path for path in changed if CHECKPOINT.match(path) and path.endswith(STATE) and path not in same]
    others = [path for path in changed if path not in same and path not in states]
    sent = {path: here[path] for path in same}
    problems: list[str] = []

    def upload(path: str) -> None:
        if problems:
            return
        try:
            _upload(copy, path)
            sent[path] = here[path]
        except FileNotFoundError:
            pass  # of an old checkpoint that was removed meanwhile: what is there stays until the next round
        except (OSError, UserError) as error:
            problems.append(str(error))

    try:
        _delete(copy, [*killed, *(path for path in states if path in there)])
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(upload, others))
        for path in states:
            folder = path.removesuffix(STATE)
            if all(other in sent for other in others if other.startswith(f"{folder}/")):
                upload(path)
        if all(path in sent for path in changed):
            _delete(copy, sorted(gone, key=lambda path: not path.endswith(STATE)))
        there = _there(copy)
        known = {path: sides for path, sides in record.items() if path in there}
        _write_record(copy, known | {path: (stat, there[path]) for path, stat in sent.items() if path in there})
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError(_not_sent(copy, [path for path in changed if path not in sent], problems[0]))


def _same(copy: Copy, paths: Sequence[str], here: dict[str, Stat], there: dict[str, Stat]) -> list[str]:
    """Those of the paths whose checkpoint is there as a whole, only not on record: a kill came before it was written down.

    A state.json has the checksums of the other files, and is there only after them.
    """
    found = []
    for state in (path for path in paths if CHECKPOINT.match(path) and path.endswith(STATE) and path in there):
        folder = state.removesuffix(STATE) + "/"
        files = [path for path in here if path.startswith(folder)]
        sizes = all(path in there and there[path][0] == here[path][0] for path in files)
        if sizes and read_file(copy.uri, state) == (copy.folder / state).read_bytes():
            found += files
    return found


def _not_sent(copy: Copy, names: Sequence[str], reason: str) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return (
        f"{copy.uri}: not there yet: {', '.join(names[:2]) or 'the last changes'}{more} ({redacted(reason)}): "
        f"all is safe in {copy.folder}, and the same command sends it"
    )


def _here(copy: Copy) -> dict[str, Stat]:
    """Every file of the copy that belongs to the run; of checkpoints those with a state.json."""
    found: dict[str, Stat] = {}
    for root, folders, names in os.walk(copy.folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        place = Path(root)
        if place.parent.name == "checkpoints" and not (place.name.startswith("step-") and "state.json" in names):
            continue
        for name in names:
            if not name.startswith("."):
                with suppress(FileNotFoundError):
                    found[(place / name).relative_to(copy.folder).as_posix()] = _stat(place / name)
    return found


def _there(copy: Copy) -> dict[str, Stat]:
    """Every file at the URI that belongs to the run, by its path there."""
    return _visible(_listed(copy))


def _visible(paths: dict[str, Stat]) -> dict[str, Stat]:
    """Without names that are hidden, or lead out of the folder: they are none of ours."""
    return {path: stat for path, stat in paths.items() if not any(part.startswith(".") for part in path.split("/"))}


def _listed(copy: Copy) -> dict[str, Stat]:
    filesystem, root = open_folder(copy.uri)
    with reading(copy.uri):
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True, recursive=True))
    return {info.path[len(root) :].lstrip("/"): (int(info.size), int(info.mtime_ns or 0)) for info in found if info.is_file}


def _steps(paths: dict[str, Stat], folder: str) -> dict[int, str]:
    """Checkpoints of a checkpoints' folder among the paths: {step: folder}, those with a state.json."""
    matches = ((CHECKPOINT.match(path), path) for path in paths if path.endswith(STATE))
    return {int(match[2]): path.removesuffix(STATE) for match, path in matches if match and match[1] == folder}


def _ahead(there: dict[str, Stat], here: dict[str, Stat]) -> list[str]:
    """The checkpoints' folders whose newest checkpoint is there and not here."""
    folders = {match[1] for path in there if (match := CHECKPOINT.match(path))}
    return [folder for folder in folders if max(_steps(there, folder), default=-1) > max(_steps(here, folder), default=-1)]


def _upload(copy: Copy, path: str) -> None:
    """Write a file there. Where files appear before they are whole, it is moved into its place; but not a checkpoint's tensors,
    which are large, and nothing before its state.json is there."""
    filesystem, root = open_folder(copy.uri)
    with (copy.folder / path).open("rb") as source:
        tensors = CHECKPOINT.match(path) and not path.endswith(STATE)
        if not tensors and filesystem.type_name not in OBJECT_STORES:
            with new_file(copy.uri, path) as stream:
                shutil.copyfileobj(source, stream, CHUNK)
            return
        target = f"{root}/{path}"
        with changing(join(copy.uri, path)):
            filesystem.create_dir(os.path.dirname(target), recursive=True)
            try:
                with filesystem.open_output_stream(target) as stream:
                    shutil.copyfileobj(source, stream, CHUNK)
            except BaseException:
                with suppress(OSError):
                    filesystem.delete_file(target)
                raise


def _download(copy: Copy, path: str, target: Path) -> None:
    filesystem, root = open_folder(copy.uri)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        reading(join(copy.uri, path)),
        filesystem.open_input_stream(f"{root}/{path}") as source,
        temporary.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, CHUNK)
    temporary.replace(target)


def _delete(copy: Copy, paths: Sequence[str]) -> None:
    """Remove files there in this order, then the checkpoints' folders that they leave empty."""
    filesystem, root = open_folder(copy.uri)
    with changing(copy.uri):
        for path in paths:
            with suppress(FileNotFoundError):
                filesystem.delete_file(f"{root}/{path}")
        for folder in {f"{root}/{match[0]}" for path in paths if (match := CHECKPOINT.match(path))}:
            found = filesystem.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True, recursive=True))
            if not found:
                with suppress(FileNotFoundError):
                    filesystem.delete_dir(folder.rstrip("/"))


def _stat(path: Path) -> Stat:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _size(copy: Copy, path: str) -> int:
    """Bytes of a file here, -1 where there is none."""
    place = copy.folder / path
    return place.stat().st_size if place.is_file() else -1


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return {"uri": str(content["uri"]), "files": dict(content["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MARK}: cannot be read ({error}): remove {folder} to fetch it again from its URI") from None


def _record(copy: Copy) -> dict[str, tuple[Stat, Stat]]:
    """Each file's size and time, here and there, when both were last the same."""
    return {path: (tuple(here), tuple(there)) for path, (here, there) in _content(copy.folder)["files"].items()}


def _write_record(copy: Copy, record: dict[str, tuple[Stat, Stat]]) -> None:
    temporary = copy.folder / f"{MARK}.new"
    temporary.write_text(json.dumps({"uri": copy.uri, "files": record}), encoding="utf-8")
    temporary.replace(copy.folder / MARK)
