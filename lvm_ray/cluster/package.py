"""This package as a small wheel, made of the files that run here: of a checkout or of an installation alike.

Its name carries a hash of its content as the build tag, `lvm_ray-0.1.0-1c0ffee123456-py3-none-any.whl`, since Ray takes two
packages of one name for the same. It names no requirements: the cluster's image has them, and an installer there would else
fetch gigabytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lvm_ray
from lvm_ray.errors import UserError

LARGEST = 20 << 20  # bytes of the files: something else than code lies among them


@dataclass(frozen=True)
class Package:
    """A wheel: its file's name and its bytes."""

    name: str
    content: bytes


def wheel() -> Package:
    """The wheel of the code that runs. Raises UserError where its folder holds more than code."""
    return make_wheel(Path(lvm_ray.__file__).parent, lvm_ray.__version__)


def make_wheel(folder: Path, version: str) -> Package:
    """The wheel of a package's folder: the same files give the same bytes, whenever and wherever."""
    files = {f"lvm_ray/{name}": content for name, content in _files(folder).items()}
    place = f"lvm_ray-{version}.dist-info"
    tag = f"1{digest(files)[:12]}"  # a build tag begins with a digit
    files[f"{place}/METADATA"] = f"Metadata-Version: 2.1\nName: lvm-ray\nVersion: {version}\nRequires-Python: >=3.11\n".encode()
    wheel = ("Wheel-Version: 1.0", "Generator: lvm-ray", "Root-Is-Purelib: true", "Tag: py3-none-any", f"Build: {tag}", "")
    files[f"{place}/WHEEL"] = "\n".join(wheel).encode()
    record = [f"{name},sha256={_base64(content)},{len(content)}" for name, content in sorted(files.items())]
    files[f"{place}/RECORD"] = "\n".join([*record, f"{place}/RECORD,,", ""]).encode()
    return Package(f"lvm_ray-{version}-{tag}-py3-none-any.whl", pack(files))


def pack(files: Mapping[str, bytes]) -> bytes:
    """A zip of files by name, without a date or an owner in it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name)  # of 1980, the first year that a zip knows
            entry.create_system, entry.external_attr, entry.compress_type = 3, 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content, compresslevel=9)
    return packed.getvalue()


def digest(files: Mapping[str, bytes]) -> str:
    """Hex digits that change with any file's name or content."""
    found = hashlib.sha256()
    for name, content in sorted(files.items()):
        found.update(f"{name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def _files(folder: Path) -> dict[str, bytes]:
    """The package's files by their path below it."""
    found: dict[str, bytes] = {}
    size = 0
    for root, folders, names in os.walk(folder, followlinks=True):  # cluster/files is a link in a checkout
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in names:
            path = Path(root) / name
            if name.startswith(".") or name.endswith(".pyc") or not path.is_file():
                continue
            size += path.stat().st_size
            if size > LARGEST:
                raise UserError(f"{path}: the package's folder holds more than {LARGEST >> 20} MiB: keep data out of it")
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
