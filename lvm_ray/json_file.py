"""A JSON object of a file that others may have written, damaged or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvm_ray.errors import UserError


def read_object(path: Path, remedy: str, absent: str | None = None) -> dict[str, Any]:
    """The object that a file holds. Raises UserError where it holds none, with what to do: `absent` where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file: {absent or remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON: {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of an object: {remedy}")
    return content
